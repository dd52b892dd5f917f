"""Tables whose columns cannot be used are refused in one line that names the cure."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import resolve_columns
from pipeline.options import ColumnOptions, InputOptions, SplitOptions
from pipeline.sources import NeedsSpool, Source, open_source


def _span(source: Source | NeedsSpool) -> tuple[int, int]:
    """First cursor and end."""
    assert not isinstance(source, NeedsSpool)
    _, cursors = next(iter(source.scan([])))
    return int(cursors[0]), source.end


@pytest.mark.parametrize(
    ("columns", "split", "says"),
    [
        ({}, {}, "--columns.caption caption: 2 columns have this name; rename"),
        ({"id": "tags"}, {}, r"--columns.id tags: it holds list<.*>, not text"),
        ({}, {"group": "place"}, r"--split.group place: it holds struct<.*column of"),
        ({}, {"column": "place"}, "--split.column place: it holds struct<"),
        (
            {"id": "t"},
            {},
            r"--columns.id t: it holds timestamp\[us\].*write them as te",
        ),
        ({}, {"column": "noon"}, r"--split.column noon: it holds time64\[ns\], not te"),
    ],
)
def test_a_column_of_no_use_is_named(
    columns: dict[str, str], split: dict[str, str], says: str
) -> None:
    twice = pa.field("caption", pa.string())
    fields = [
        pa.field("image", pa.binary()),
        twice,
        pa.field("tags", pa.list_(pa.string())),
        pa.field("place", pa.struct([("x", pa.int32())])),
        pa.field("t", pa.timestamp("us")),
        pa.field("noon", pa.time64("ns")),
    ]
    schema = pa.schema(fields if columns or split else [*fields, twice])
    with pytest.raises(ValueError, match=says):
        resolve_columns(schema, ColumnOptions(**columns), SplitOptions(**split))


def test_a_name_that_stands_twice_hurts_only_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("image\tcaption\tnote\tnote\na.jpg\ta bird\tx\ty\n")
    source = open_source(InputOptions(path=str(path)))
    columns = resolve_columns(source.schema, ColumnOptions(), SplitOptions())
    (row,) = source.rows(columns.sample, *_span(source))
    assert dict(row) == {"image": "a.jpg", "caption": "a bird"}
    with pytest.raises(ValueError, match="2 columns have this name"):
        resolve_columns(source.schema, ColumnOptions(id="note"), SplitOptions())


def test_files_whose_types_differ_are_read_as_one_type(tmp_path: Path) -> None:
    columns = [
        pa.array(["a"]),
        pa.array(["b"], pa.large_string()),
        pa.nulls(1),
        pa.array(["c"]).dictionary_encode(),
    ]
    for number, column in enumerate(columns):
        numbers = pa.array([number], pa.int32() if number % 2 else pa.int64())
        table = pa.table({"caption": column, "n": numbers})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    source = open_source(InputOptions(path=str(tmp_path)))
    rows = list(source.rows(["caption", "n"], *_span(source)))
    assert [row["caption"] for row in rows] == ["a", "b", None, "c"]
    assert [row["n"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("other", [pa.array([7]), pa.array([b"a"]), pa.array([["a"]])])
def test_files_whose_types_cannot_be_one_are_named(
    tmp_path: Path, other: pa.Array
) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"caption": other}), tmp_path / "1.parquet")
    says = r"column 'caption' holds .* in 1\.parquet, but .*write all with one type"
    with pytest.raises(ValueError, match=says):
        open_source(InputOptions(path=str(tmp_path)))
