"""What a folder cannot give is a failed input that says why."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.options import ImageOptions, PreprocessConfig
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.runs import LocalRun


def test_links_out_and_names_that_are_not_utf8_are_told_apart(tmp_path: Path) -> None:
    corpus, private = tmp_path / "in", tmp_path / "private.txt"
    corpus.mkdir()
    private.write_text("a secret")
    for name in (b"good", b"linked", b"x\xfe", b"x\xff"):
        path = os.path.join(os.fsencode(corpus), name + b".jpg")
        with open(path, "wb") as file:
            file.write(encoded(picture(len(name))))
    for name in ("good", "linked"):
        (corpus / f"{name}.json").write_text('{"caption": "a bird"}')
    (corpus / "linked.txt").symlink_to(private)
    for name in (b"x\xfe", b"x\xff"):
        with open(os.path.join(os.fsencode(corpus), name + b".txt"), "w") as text:
            text.write("a kite")
    config = PreprocessConfig(
        input=str(corpus), output=str(tmp_path / "out"), image=ImageOptions(size=32)
    )
    LocalRun(config).committed()
    (table,) = (tmp_path / "out").glob("*/*.parquet")
    rows = {row["url"]: row for row in pq.read_table(table).to_pylist()}
    assert rows.pop("good.jpg")["captions"] == ["a bird"]
    linked = rows.pop("linked.jpg")
    assert linked["reason"] == "bad_text"
    assert "a link out of the folder" in linked["detail"]
    # Two inputs: what cannot be read of a name must not make them one.
    assert set(rows) == {"x\\udcfe.jpg", "x\\udcff.jpg"}
    for row in rows.values():
        assert row["reason"] == "bad_text"
        assert "name or text is not UTF-8" in row["detail"]
