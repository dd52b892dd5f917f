"""Corpora on a real S3 server are what they are on a disk, through its errors too."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import open_storage
from tests.pipeline.s3 import DROP, S3Server, status
from tests.pipeline.sources.reading import (
    cursors,
    opened,
    rows,
    write_tar,
)

ROWS = 12


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return server.bucket(monkeypatch)


def corpora(folder: Path) -> list[str]:
    """A corpus of every format, in a folder each; returns their names."""
    for kind in ("parquet", "arrow", "tsv", "csv", "jsonl", "coco", "tars", "images"):
        (folder / kind).mkdir(parents=True)
    cells = [{"image": f"{n % 5}.jpg", "caption": f"number {n}"} for n in range(ROWS)]
    table = pa.Table.from_pylist(cells)
    pq.write_table(table, folder / "parquet" / "t.parquet", row_group_size=5)
    with pa.OSFile(str(folder / "arrow" / "t.arrow"), "wb") as file:
        writer = pa.ipc.new_stream(file, table.schema)
        writer.write_table(table, max_chunksize=5)
        writer.close()
    for kind, separator in (("tsv", "\t"), ("csv", ",")):
        lines = [separator.join(cell) for cell in (cells[0], *map(dict.values, cells))]
        (folder / kind / f"t.{kind}").write_text("\n".join(lines))
    (folder / "jsonl" / "t.jsonl").write_text("\n".join(map(json.dumps, cells)))
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(5)],
        "annotations": [{"image_id": n % 5, "caption": f"{n}"} for n in range(ROWS)],
    }
    (folder / "coco" / "captions.json").write_text(json.dumps(document))
    for tar in range(2):
        members = [(f"{n}.{e}", e.encode()) for n in range(6) for e in ("jpg", "txt")]
        write_tar(folder / "tars" / f"{tar}.tar", members)
    for n in range(ROWS):
        (folder / "images" / f"{n:02}.jpg").write_bytes(b"J")
        (folder / "images" / f"{n:02}.txt").write_text(f"one of {n}\ntwo of {n}")
    (folder / "images" / ".trash").mkdir()
    (folder / "images" / ".trash" / "x.jpg").write_bytes(b"J")
    others = [path.name for path in folder.iterdir() if path.name != "coco"]
    return [*sorted(others), "coco/captions.json"]


def upload(folder: Path, url: str) -> None:
    storage = open_storage(url)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_every_format_is_read_from_s3_as_from_a_disk(
    tmp_path: Path, bucket: str, server: S3Server
) -> None:
    names = corpora(tmp_path / "in")
    upload(tmp_path / "in", f"{bucket}/in")
    # Now and then a request fails or is cut off, and is made again.
    faults = itertools.cycle([*[None] * 12, status(503), *[None] * 12, DROP])
    for name in names:
        local = opened(tmp_path / "in" / name, spool=tmp_path / "out" / name)
        server.inject(faults)
        far = opened(f"{bucket}/in/{name}", spool=f"{bucket}/out/{name}")
        whole = rows(local)
        assert rows(far) == whole
        assert (far.schema, far.kind) == (local.schema, local.kind)
        assert far.base == f"{bucket}/in/{name.partition('/')[0]}"
        assert pickle.loads(pickle.dumps(far)).end == far.end
        places = cursors(far)
        assert rows(far, (), places[3], places[7]) == whole[3:7]
        files = [
            [print_.get("file") for print_ in each.fingerprint()]
            for each in (far, local)
        ]
        assert files[0] == files[1]
        server.inject(())


def test_a_glob_and_a_single_object_are_corpora(tmp_path: Path, bucket: str) -> None:
    corpora(tmp_path / "in")
    upload(tmp_path / "in", f"{bucket}/in")
    for url in (f"{bucket}/in/tsv/t.tsv", f"{bucket}/in/*/*.tsv", f"{bucket}/in/tsv/"):
        source = opened(url)
        assert (source.kind, source.base) == ("tsv", f"{bucket}/in/tsv")
        assert len(rows(source)) == ROWS
    with pytest.raises(ValueError, match="does not exist"):
        opened(f"{bucket}/nowhere")


def test_rows_in_the_middle_of_a_large_object_are_read_alone(
    bucket: str, server: S3Server
) -> None:
    line = b"%09d.jpg\t" + b"x" * 1000 + b"\n"
    data = b"image\tcaption\n" + b"".join(line % n for n in range(20_000))
    open_storage(bucket).write("t.tsv", data)
    source = opened(f"{bucket}/t.tsv")
    start = len(b"image\tcaption\n") + 15_000 * len(line % 0)
    server.requests.clear()
    found = rows(source, ["image"], start, start + 10 * len(line % 0))
    assert [row["image"] for row in found] == [
        f"{n:09}.jpg" for n in range(15_000, 15_010)
    ]
    # A block of 4 MiB of the 20 MB, and what asks for its size.
    reads = [path for method, path in server.requests if method == "GET"]
    assert 1 <= len(reads) <= 3
