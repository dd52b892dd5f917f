"""Text that is not UTF-8 fails alone; every rule about text and rows counts what it
drops. One run of the command with all rules on, its rows looked at one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import sample_uid
from tests.pipeline.corpora import Run, encoded, picture

_FUNCTION = """
def no_wide(candidate):
    assert candidate.columns["note"] is not None and candidate.image.mode == "RGB"
    return "wide" if candidate.width > 2 * candidate.height else None
"""
_SPAM = "sale sale sale sale sale sale sale sale cheap"
_NO_CHANGE = {"caption": b"a bird", "note": b"x", "size": (60, 40), "width": "300"}

# What a row is, and what becomes of it.
_ROWS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"caption": "A&amp;B \u202ebird\x07".encode()}, "success"),
    ({"caption": b"caf\xe9"}, "bad_text"),
    ({"note": b"\xff"}, "bad_text"),
    ({"path": b"\xff.jpg"}, "bad_text"),
    ({"path": b"\xff.jpg", "size": None}, "bad_text"),
    ({"id": b"\xff\x00"}, "success"),
    ({"width": "255.9"}, "where"),
    ({"width": "wide"}, "where"),
    ({"width": "256.5"}, "success"),
    ({"caption": b"\xe2\x80\x8b"}, "empty_caption"),
    ({"caption": b"(Untitled)"}, "placeholder_caption"),
    ({"caption": b"ab"}, "short_caption"),
    ({"caption": _SPAM.encode()}, "repetitive_caption"),
    ({"caption": b"bird"}, "short_caption"),
    ({"size": (90, 40)}, "wide"),
    ({"size": (20, 40)}, "too_small"),
    ({"size": (80, 26)}, "aspect"),
    ({"id": b"denied"}, "denied"),
)


def not_utf8(cells: list[bytes]) -> pa.Array:
    """A column of strings whose bytes nobody checked, as other writers make them."""
    _, offsets, data = pa.array(cells, pa.binary()).buffers()
    return pa.Array.from_buffers(pa.string(), len(cells), [None, offsets, data])


def table() -> pa.Table:
    """The rows above; what a row does not say is as in a good one."""
    rows = [
        {"id": f"id{n}".encode(), "path": b"a.jpg", **_NO_CHANGE, **row}
        for n, (row, _) in enumerate(_ROWS)
    ]
    data = [
        encoded(picture(n, row["size"])) if row["size"] else None
        for n, row in enumerate(rows)
    ]
    paths = not_utf8([row["path"] for row in rows])
    return pa.table(
        {
            "image": pa.StructArray.from_arrays(
                [pa.array(data), paths], ["bytes", "path"]
            ),
            "id": pa.array([row["id"] for row in rows], pa.binary()),
            "width": [row["width"] for row in rows],
            **{
                name: not_utf8([row[name] for row in rows])
                for name in ("caption", "note")
            },
        }
    )


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, preprocess: Run
) -> list[dict[str, Any]]:
    """Rows of the dataset's tables, one for each row of the corpus, in order."""
    folder = tmp_path_factory.mktemp("text")
    pq.write_table(table(), folder / "t.parquet")
    (folder / "users_rules.py").write_text(_FUNCTION)
    (folder / "deny.txt").write_text(f"{sample_uid('t', 'denied'):016x}\n")
    result = preprocess(
        f"--input={folder / 't.parquet'}",
        f"--output={folder / 'out'}",
        *("--columns.id=id", "--columns.keep=note", "--split.val=0"),
        *("--where=width >= 256", f"--deny_uids={folder / 'deny.txt'}"),
        *("--text.min_chars=3", "--text.max_word_share=0.5", "--filter.min_tokens=2"),
        *("--filter.min_size=24", "--filter.max_aspect=3"),
        *("--filter.function=users_rules:no_wide", "--image.size=32"),
        *("--tokenizer=train:300", "--workers=1"),
        env={"PYTHONPATH": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    made = sorted((folder / "out").rglob("*.parquet"))
    found = [row for path in made for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: row["key"])


def test_every_row_is_written_or_has_its_reason(rows: list[dict[str, Any]]) -> None:
    found = [row["reason"] or row["status"] for row in rows]
    assert found == [expected for _, expected in _ROWS]


def test_text_that_is_not_utf8_is_named(rows: list[dict[str, Any]]) -> None:
    details = [row["detail"] for row in rows if row["reason"] == "bad_text"]
    columns = ("caption", "note", "image", "image")
    assert len(details) == len(columns)
    for name, detail in zip(columns, details, strict=True):
        assert name in detail


def test_captions_are_written_clean(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["captions"] == ["A&B bird"]


def test_filters_say_what_they_saw(rows: list[dict[str, Any]]) -> None:
    details = {row["reason"]: row["detail"] for row in rows if row["reason"]}
    assert details["too_small"] == "20x40, filter.min_size is 24"
    assert details["aspect"] == "80x26, filter.max_aspect is 3"
    assert details["wide"] == "by users_rules:no_wide"


def test_a_template_makes_captions(tmp_path: Path, preprocess: Run) -> None:
    images = [encoded(picture(n)) for n in range(3)]
    given = {"image": images, "a": ["red", "big", ""], "b": [["x", "y"], [], ["z"]]}
    pq.write_table(pa.table(given), tmp_path / "t.parquet")
    result = preprocess(
        f"--input={tmp_path / 't.parquet'}",
        f"--output={tmp_path / 'out'}",
        *("--columns.template={a}: {b}", "--split.val=0", "--image.size=32"),
        *("--tokenizer=train:300", "--workers=1"),
    )
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["accounting"]["filtered"] == {"empty_caption": 2}
    (made,) = (tmp_path / "out").rglob("shard-000000.parquet")
    written = pq.read_table(made).to_pylist()
    assert [row["caption"] for row in written if row["status"] == "success"] == [
        "red: x, y"
    ]
