"""Nothing is run on the word of a file that lies beside a dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import open_storage
from pipeline.stored_config import given_config, stored_config
from tests.pipeline.corpora import run_module
from tests.pipeline.damage import copied, first_shard, flip
from tests.pipeline.web import WebServer

Change = Callable[[dict[str, Any]], None]


def changed(copy: Path, change: Change) -> None:
    """Let the progress file and the plan both say something else."""
    path = copy.with_name("copy.progress.json")
    value = json.loads(path.read_bytes())
    change(value["config"])
    path.write_text(json.dumps(value))
    plan = json.loads((copy / ".palimpsest/plan.json").read_bytes())
    for group in ("fetch", "text"):
        plan["transform"][group] |= {
            key: value["config"][group][key] for key in plan["transform"][group]
        }
    (copy / ".palimpsest/plan.json").write_text(json.dumps(plan))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return copied(dataset, tmp_path / "copy")


def test_the_configuration_of_the_run_is_known(copy: Path, corpus: Path) -> None:
    values = stored_config(open_storage(copy))
    assert values["input"] == str(corpus)
    assert values["columns"]["keep"] in ("mood", ["mood"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["filter"].update(function="evil:f"), "run evil:f"),
        (lambda c: c["fetch"].update(allow_private=True), "private addresses"),
        (lambda c: c["fetch"].update(allow=["file:///"]), "below file:///"),
        (lambda c: c.update(images="http://[::1]/"), r"read http://\[::1\]/"),
        (lambda c: c.update(deny_uids="https://x.test/a"), "https://x.test/a"),
        (
            lambda c: c.update(input="simplecache::s3://x/birds.tsv"),
            "read simplecache::s3",
        ),
        # As the progress file has them without their secrets.
        (lambda c: c.update(input="s3://***@b/birds.tsv"), "whose password"),
        (lambda c: c.update(input="s3://b/birds.tsv?***"), "whose query"),
        (lambda c: c["text"].update(placeholders=["/(a+)+$/"]), r"/\(a\+\)\+\$/"),
    ],
)
def test_what_may_have_other_effects_is_named_and_asked_for(
    change: Change, said: str, copy: Path
) -> None:
    changed(copy, change)
    with pytest.raises(ValueError, match=rf"asks to .*{said}.* --preprocess FILE"):
        stored_config(open_storage(copy))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(limit=3), "limit: None -> 3"),
        (lambda c: c["image"].update(size=64), "image.size: 32 -> 64"),
        (lambda c: c.update(input="/etc/passwd"), "sources"),
    ],
)
def test_the_configuration_of_another_run_is_refused(
    change: Change, said: str, copy: Path
) -> None:
    changed(copy, change)
    with pytest.raises(ValueError, match=rf"not of the run .*{said}.* --preprocess"):
        stored_config(open_storage(copy))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": 3}', '{"config": {"inputs": 1}}', "[" * 9_999]
)
def test_what_is_no_configuration_is_one_clear_line(text: str, copy: Path) -> None:
    copy.with_name("copy.progress.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold the configuration"):
        stored_config(open_storage(copy))
    if not text.startswith("{"):
        with pytest.raises(ValueError, match="--preprocess FILE"):
            given_config(str(copy.with_name("copy.progress.json")))


def test_repair_asks_no_server_that_a_dataset_names(copy: Path) -> None:
    for place in (3000, 4000):
        flip(copy / first_shard(copy).name, place)
    with WebServer() as web:
        url = web.url("/birds.tsv")
        changed(copy, lambda config: config.update(input=url))
        result = run_module("pipeline.validate", copy, "--repair")
        assert result.returncode == 1
        assert f"asks to read {url}" in result.stderr
        assert not web.hits
