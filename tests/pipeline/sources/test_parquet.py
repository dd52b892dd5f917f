"""Parquet and Arrow: ranges of rows over files of any types, damage named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.sources.reading import (
    BAD,
    check_every_range,
    column,
    cursors,
    opened,
    rows,
    scanned,
)


def write_arrow(path: Path, table: pa.Table, *, stream: bool = True) -> Path:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write(path: Path, table: pa.Table) -> Path:
    """A Parquet or Arrow file, by its suffix."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
        return path
    return write_arrow(path, table)


SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


@SUFFIXES
def test_ranges_of_several_files_are_their_rows(tmp_path: Path, suffix: str) -> None:
    for number, (first, last) in enumerate([(0, 9), (9, 9), (9, 10), (10, 24)]):
        table = pa.table({"n": pa.array(range(first, last), pa.int64())})
        write(tmp_path / f"{number}{suffix}", table)
    source = opened(tmp_path)
    assert (source.kind, source.end) == (suffix[1:], 24)
    assert column(source, "n") == cursors(source) == list(range(24))
    check_every_range(source)


@pytest.mark.parametrize("stream", [True, False])
def test_both_forms_of_arrow_files_are_read(tmp_path: Path, stream: bool) -> None:
    table = pa.table({"n": list(range(10))})
    path = write_arrow(tmp_path / "no_suffix", table, stream=stream)
    check_every_range(opened(path))


def test_batches_inside_a_large_row_group_are_cut_right(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(1000)), "image": [b"x"] * 1000})
    pq.write_table(table, tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet")
    for start, stop in [(0, 64), (63, 65), (100, 700), (999, 1000)]:
        found = rows(source, ["n", "image"], start, stop)
        assert [row["n"] for row in found] == list(range(start, stop))


@SUFFIXES
def test_every_usual_type_arrives_in_its_plainest_form(
    tmp_path: Path, suffix: str
) -> None:
    cells: dict[str, tuple[pa.Array, pa.DataType]] = {
        "words": (pa.array(["a", None, "b"]), pa.large_string()),
        "coded": (pa.array(["a", "a", "b"]).dictionary_encode(), pa.large_string()),
        "bytes": (pa.array([b"x", b"", None]), pa.large_binary()),
        "fixed": (pa.array([b"xy"] * 3, pa.binary(2)), pa.large_binary()),
        "lists": (pa.array([["a"], [], None]), pa.large_list(pa.large_string())),
        "number": (pa.array([1, 2, 3], pa.int16()), pa.int16()),
        "image": (
            pa.array([{"bytes": b"x", "path": None}] * 3),
            pa.struct([("bytes", pa.large_binary()), ("path", pa.null())]),
        ),
    }
    table = pa.table({name: array for name, (array, _) in cells.items()})
    source = opened(write(tmp_path / f"t{suffix}", table))
    for name, (array, kind) in cells.items():
        assert source.schema.field(name).type == kind
        assert column(source, name) == scanned(source, name) == array.to_pylist()


@SUFFIXES
def test_types_of_several_files_meet(tmp_path: Path, suffix: str) -> None:
    kinds: list[dict[str, Any]] = [
        {"n": pa.array([1], pa.int32()), "text": pa.array(["a"])},
        {"n": pa.array([2], pa.int64()), "text": pa.array(["b"], pa.large_string())},
        {"n": pa.nulls(1), "text": pa.array(["c"]).dictionary_encode()},
    ]
    for number, table in enumerate(kinds):
        write(tmp_path / f"{number}{suffix}", pa.table(table))
    source = opened(tmp_path)
    assert (column(source, "n"), column(source, "text")) == ([1, 2, None], [*"abc"])
    write(tmp_path / f"3{suffix}", pa.table({"n": ["x"], "text": ["d"]}))
    with pytest.raises(ValueError, match=rf"column 'n' holds .* in 3\{suffix}"):
        opened(tmp_path)
    write(tmp_path / f"3{suffix}", pa.table({"n": [1]}))
    with pytest.raises(ValueError, match=rf"3\{suffix} has other columns"):
        opened(tmp_path)


@SUFFIXES
def test_text_that_is_not_utf8_is_bad_in_its_cell_alone(
    tmp_path: Path, suffix: str
) -> None:
    wrong = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], wrong)
    table = pa.table({"text": wrong, "list": lists, "n": [1, 2, 3]})
    source = opened(write(tmp_path / f"t{suffix}", table))
    assert rows(source) == [
        {"text": "a", "list": ["a"], "n": 1},
        {"text": BAD, "list": BAD, "n": 2},
        {"text": "b", "list": ["b"], "n": 3},
    ]
    assert scanned(source, "text") == ["a", None, "b"]


def test_a_date_that_python_has_no_value_for_is_bad(tmp_path: Path) -> None:
    table = pa.table({"when": pa.array([0, 1 << 62], pa.timestamp("us"))})
    first, second = column(opened(write(tmp_path / "t.parquet", table)), "when")
    assert (first.year, second) == (1970, BAD)


@SUFFIXES
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"n": list(range(100))})
    write(tmp_path / f"a{suffix}", table)
    data = write(tmp_path / f"b{suffix}", table).read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"cannot be read: b\{suffix} .*leave it out"):
        opened(tmp_path)


def test_a_damaged_row_group_is_named_and_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [os.urandom(500) for _ in range(8)]})
    pq.write_table(table, path, row_group_size=4, use_dictionary=False)
    where = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[where : where + 30] = b"\xff" * 30
    path.write_bytes(bytes(data))
    source = opened(path)
    assert len(rows(source, (), 0, 4)) == 4
    with pytest.raises(OSError, match=r"row group 1 of t\.parquet cannot be read"):
        rows(source, (), 4, 8)


def test_a_flipped_bit_of_a_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [os.urandom(500) for _ in range(8)]})
    # Statistics repeat the least and the greatest image, where no checksum covers them.
    options = {"use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, compression="none", write_page_checksum=True, **options)
    assert len(rows(opened(path))) == 8
    data = bytearray(path.read_bytes())
    data[data.index(table["image"][3].as_py()) + 7] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(
        OSError, match=r"row group 0 of t\.parquet cannot be read .*CRC"
    ):
        rows(opened(path))


def test_a_saved_dataset_is_what_its_state_names(tmp_path: Path) -> None:
    table = pa.table({"n": [1, 2]})
    for name in ("data-00000-of-00002", "data-00001-of-00002", "cache-0123", "old"):
        write_arrow(tmp_path / f"{name}.arrow", table)
    files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    (tmp_path / "dataset_info.json").write_text("{}")
    source = opened(tmp_path)
    assert [entry["file"] for entry in source.fingerprint()] == [
        file["filename"] for file in files
    ]
    assert column(source, "n") == [1, 2, 1, 2]


@SUFFIXES
def test_the_fingerprint_knows_the_corpus_but_not_where_it_lies(
    tmp_path: Path, suffix: str
) -> None:
    prints = []
    for folder, caption in (("a", "bird"), ("b", "bird"), ("c", "kite")):
        (tmp_path / folder).mkdir()
        table = pa.table({"image": [b"x"], "caption": [caption]})
        prints.append(
            opened(write(tmp_path / folder / f"t{suffix}", table)).fingerprint()
        )
    assert prints[0] == prints[1] != prints[2]
    assert str(tmp_path) not in json.dumps(prints)


@SUFFIXES
def test_a_corpus_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"n": pa.array([], pa.int64())})
    with pytest.raises(ValueError, match="has no rows: the corpus is empty"):
        opened(write(tmp_path / f"t{suffix}", table))
