"""Damaged corpora, read in a process of their own: a crash there is an exit code.

`python -m tests.pipeline.mutations FOLDER KIND FIRST COUNT` damages a small corpus of a
kind in COUNT ways and reads each, and says how many could be opened and read.
"""

from __future__ import annotations

import csv
import faulthandler
import io
import json
import resource
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.captions import BadText
from pipeline.options import InputOptions
from pipeline.sources import NeedsSpool, Source, open_source
from pipeline.storage import open_storage

ROWS = 40
# Far above what these files need, and far below what a damaged size may claim.
_MEMORY = 16 << 30
_CAPTIONS = ("a bird", 'a "red", kite', "caf\u00e9\n\u4e00 house", "", "x" * 300)
_SPLINTERS = (b'"', b"\t", b",", b"\n", b"\r", b"\0", b"{", b"}", b"[" * 50, b"\xff")
_FILES = {"coco": "coco.json", "webdataset": "corpus.tar"}


def rows() -> list[dict[str, Any]]:
    """The rows of every corpus; every fifth has no image."""
    generator = np.random.default_rng(0)
    return [
        {
            "image": f"{number}.jpg",
            "bytes": generator.bytes(200) if number % 5 else None,
            "caption": _CAPTIONS[number % len(_CAPTIONS)],
            "width": number * 17,
        }
        for number in range(ROWS)
    ]


def _tsv() -> bytes:
    lines = [
        f"{row['image']}\t{row['caption']}\t{row['width']}".replace("\n", " ")
        for row in rows()
    ]
    return "\n".join(["image\tcaption\twidth", *lines, ""]).encode()


def _csv() -> bytes:
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(["image", "caption", "width"])
    table.writerows([row["image"], row["caption"], row["width"]] for row in rows())
    return file.getvalue().encode()


def _jsonl() -> bytes:
    lines = [{**row, "bytes": None, "tags": [row["caption"], "t"]} for row in rows()]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _table() -> pa.Table:
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    given = rows()
    return pa.table(
        {
            "image": [{"bytes": row["bytes"], "path": row["image"]} for row in given],
            "caption": [row["caption"] for row in given],
            "captions": [[row["caption"]] * (row["width"] % 3) for row in given],
            "width": [row["width"] for row in given],
            "lang": pa.array(["en", "de"] * (ROWS // 2)).dictionary_encode(),
            "at": pa.array([moment] * ROWS, pa.timestamp("us", "Europe/Berlin")),
        }
    )


def _parquet(compression: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(_table(), file, compression=compression, row_group_size=16)
    return file.getvalue()


def _arrow(*, stream: bool) -> bytes:
    file, table = io.BytesIO(), _table()
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows()):
            fields = json.dumps({"width": row["width"], "url": row["image"]}).encode()
            members = {"txt": row["caption"].encode(), "json": fields}
            if row["bytes"]:
                members["jpg"] = row["bytes"]
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"part/{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _coco() -> bytes:
    images = [
        {"id": number, "file_name": row["image"], "width": row["width"], "height": 9}
        for number, row in enumerate(rows())
    ]
    captions = [
        {"id": number, "image_id": number % ROWS, "caption": rows()[number]["caption"]}
        for number in range(ROWS)
    ]
    return json.dumps({"images": images, "annotations": captions}).encode()


CORPORA: dict[str, tuple[Callable[[], bytes], ...]] = {
    "tsv": (_tsv,),
    "csv": (_csv,),
    "jsonl": (_jsonl,),
    "parquet": (lambda: _parquet("none"), lambda: _parquet("zstd")),
    "arrow": (lambda: _arrow(stream=True), lambda: _arrow(stream=False)),
    "webdataset": (_tar,),
    "coco": (_coco,),
}


def damaged(data: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """`data` damaged once to three times."""
    for _ in range(int(generator.integers(1, 4))):
        data = _damaged_once(data, kind, generator)
    return data


def _damaged_once(data: bytes, kind: str, generator: np.random.Generator) -> bytes:
    if not data:
        return data
    at = int(generator.integers(len(data)))
    # Footers and headers say where everything else is.
    if kind in ("parquet", "arrow") and generator.random() < 0.4:
        at = max(len(data) - 1 - int(generator.integers(600)), 0)
    if kind == "webdataset" and generator.random() < 0.4:
        at = at // 512 * 512 + int(generator.integers(512))
    at, size = min(at, len(data) - 1), int(generator.integers(1, 64))
    splinter = _SPLINTERS[int(generator.integers(len(_SPLINTERS)))]
    in_place = (
        lambda: data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :],
        lambda: data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :],
        lambda: data[:at] + generator.bytes(size)[: len(data) - at] + data[at + size :],
        lambda: data[:at] + bytes(min(size, len(data) - at)) + data[at + size :],
        lambda: data[:at] + b"\xff" * min(size, len(data) - at) + data[at + size :],
        lambda: data[:at] + splinter[:1] + data[at + 1 :],
    )
    moving = (
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[at + size :],
        lambda: data[: at + size] + data[at:],
        lambda: data[:at] + splinter + data[at:],
    )
    # Where offsets are stored, bytes that move are found by the first reader.
    binary = kind in ("parquet", "arrow", "webdataset")
    ways = in_place if generator.random() < (0.8 if binary else 0.4) else moving
    return ways[int(generator.integers(len(ways)))]()


def read(path: Path, kind: str | None, spool: Path, seed: int) -> str:
    """Read a corpus in every way that the pipeline does; says how far that went.

    Raises:
        AssertionError: the ways disagree, or an error does not name the file.
    """
    try:
        source = open_source(InputOptions(path=str(path), format=kind))
    except ValueError as error:
        _check_error(error, path)
        return "refused"
    try:
        if isinstance(source, NeedsSpool):
            source = source.spooled(open_storage(spool), f"spool/{seed}")
        every = source.schema.names
        # Columns with one name cannot be asked for; naming them is refused.
        names = [name for name in every if every.count(name) == 1]
        cursors = _scanned(source, names)
        _check_rows(source, names, cursors, np.random.default_rng(seed))
    except (ValueError, OSError) as error:
        _check_error(error, path)
        return "stopped"
    return "read"


def _check_error(error: Exception, path: Path) -> None:
    text = str(error)
    assert path.name in text, f"the file is not named: {error!r}"
    assert "\n" not in text, f"several lines: {error!r}"
    assert len(text) > len(path.name) + 20, f"no cure: {error!r}"


def _scanned(source: Source, columns: list[str]) -> np.ndarray:
    """Cursors of all rows, the same whichever columns are asked for."""
    found = []
    for batch, cursors in source.scan(columns):
        assert batch.schema.names == columns
        assert not columns or batch.num_rows == len(cursors)
        found.append(cursors)
    every = np.concatenate([np.empty(0, np.int64), *found])
    assert (np.diff(every) > 0).all()
    assert not len(every) or (every[0] >= 0 and every[-1] < source.end)
    bare = [cursors for _, cursors in source.scan([])]
    assert np.concatenate([np.empty(0, np.int64), *bare]).tolist() == every.tolist()
    return every


def _check_rows(
    source: Source,
    names: list[str],
    cursors: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """All rows at once are the rows of ranges, as many as the scan counted."""
    if not len(cursors):
        return
    whole = _plain(source, names, int(cursors[0]), source.end)
    assert len(whole) == len(cursors), (len(whole), len(cursors))
    low = int(generator.integers(len(cursors)))
    high = int(generator.integers(low, len(cursors)))
    stop = int(cursors[high])
    assert _plain(source, names, int(cursors[low]), stop) == whole[low:high]
    assert _plain(source, names, stop, source.end) == whole[high:]
    later = sum(len(part) for _, part in source.scan([], int(cursors[low])))
    assert later == len(cursors) - low


def _plain(source: Source, names: list[str], start: int, stop: int) -> list[str]:
    """Rows as text, in which bad cells and numbers that are none are equal."""
    return [
        repr(
            {
                name: "bad" if isinstance(row[name], BadText) else row[name]
                for name in names
            }
        )
        for row in source.rows(names, start, stop)
    ]


def main(folder: Path, kind: str, first: int, count: int) -> Counter[str]:
    """Read `count` damaged corpora; the seed of each is on stdout before it is read."""
    corpora = [make() for make in CORPORA[kind]]
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        print(seed, flush=True)
        generator = np.random.default_rng(seed)
        data = damaged(corpora[seed % len(corpora)], kind, generator)
        given = kind if generator.random() < 0.5 else None
        path = folder / _FILES.get(kind, f"corpus.{kind}")
        path.write_bytes(data)
        outcomes[read(path, given, folder, seed)] += 1
    return outcomes


if __name__ == "__main__":
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
