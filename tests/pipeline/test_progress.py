"""The progress file informs, and never costs the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.manifest import Accounting
from pipeline.progress import Progress, ProgressFile, duration, reasons
from pipeline.storage import open_storage

THREE = Accounting(inputs=3, written=2, failed={"truncated": 1})


def test_the_file_tells_how_far_it_is_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.progress.json"
    (tmp_path / "out.progress.json.0123.tmp").write_text("torn by a kill")
    file = ProgressFile(open_storage(tmp_path / "out"), {"limit": 4})
    with Progress(phase="p", total=4, file=file) as bar:
        bar.running({6: {"done": 2, "written_bytes": 9, "retried": {"http_503": 1}}})
        bar.ended(6, {"done": 3, "written_bytes": 10, "retried": {"http_503": 2}})
        bar.finish(THREE)
        under_way = {"done": 1, "failed": {"truncated": 1}, "written_bytes": 5}
        bar.running({7: under_way})
        file.write(bar._state(0.0), final=True)
        running = json.loads(path.read_text())
    assert (running["done"], running["failed"]) == (4, {"truncated": 2})
    assert running["written_bytes"] == 15
    state = json.loads(path.read_text())
    assert (state["total"], state["finished"]) == (4, 3)
    assert (state["failed"], state["retried"]) == ({"truncated": 1}, {"http_503": 2})
    assert state["config"] == {"limit": 4}
    assert list(tmp_path.iterdir()) == [path]


def test_secrets_in_urls_are_left_out_and_all_else_stays(tmp_path: Path) -> None:
    secret = {
        "input": [
            {"path": "https://me:pass@host/a.parquet?X-Amz-Signature=ab,c#d"},
            {"path": "s3://key:word@bucket/in?versionId=7"},
        ],
        "allow_uids": "simplecache::HTTPS://host/u.txt?sig",
    }
    open_ = {
        "limit": 4,
        "sample": None,
        "input": ["s3://bucket/a@b/part=?/0000?.parquet", "/data/?.tsv", "a?b=c"],
        "text": {"placeholders": ["/https?://\\S+/"], "min_chars": 1.5},
        "tokenizer": "org/name",
    }
    file = ProgressFile(open_storage(tmp_path / "out"), {"a": secret, "b": open_})
    file.write({}, final=True)
    config = json.loads((tmp_path / "out.progress.json").read_text())["config"]
    assert config["b"] == open_
    assert config["a"] == {
        "input": [
            {"path": "https://***@host/a.parquet?***"},
            {"path": "s3://***@bucket/in?***"},
        ],
        "allow_uids": "simplecache::HTTPS://host/u.txt?***",
    }


def test_a_file_that_cannot_be_written_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A directory in the file's place is in the way of any user.
    path = tmp_path / "out.progress.json"
    path.mkdir()
    file = ProgressFile(open_storage(tmp_path / "out"), {})
    for _ in range(2):
        file.write({}, final=True)
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_an_attempt_that_is_counted_again_does_not_turn_the_bar_back() -> None:
    with Progress(phase="p", total=9, file=None) as bar:
        bar.running({0: {"done": 5}})
        bar.running({0: {"done": 1}})
        assert bar._state(0.0)["done"] == 5


def test_figures_are_told_as_people_read_them() -> None:
    assert [duration(seconds) for seconds in (7, 200, 3900)] == [
        *("7 s", "3 min 20 s", "1 h 05 min")
    ]
    assert reasons({"a": 1, "b": 5, "c": 2, "d": 1}) == "5 b, 2 c, 1 a, 1 others"
