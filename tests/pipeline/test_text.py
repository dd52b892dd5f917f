"""Text that is not UTF-8, long cells and ragged rows: read, counted, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import resolve_columns
from pipeline.options import (
    ColumnOptions,
    PreprocessConfig,
    ShardOptions,
    SplitOptions,
)
from pipeline.plan import Plan, make_plan
from pipeline.ranges import StagedRange, Work, write_range
from pipeline.sources import open_source
from pipeline.tokenizer import train_tokenizer
from tests.pipeline.corpora import encoded, picture


def not_utf8(*cells: bytes) -> pa.Array:
    """A column of strings whose bytes nobody checked, as other writers make them."""
    _, offsets, data = pa.array(cells).buffers()
    return pa.Array.from_buffers(pa.string(), len(cells), [None, offsets, data])


def plan_of(path: Path, **options: object) -> Plan:
    config = PreprocessConfig(input=str(path), output="out", **options)
    source = open_source(str(path))
    return make_plan(
        config, source, resolve_columns(source.schema, config.columns, config.split)
    )


def staged_rows(table: pa.Table, folder: Path, columns: ColumnOptions) -> StagedRange:
    """All rows of `table`, processed as one range."""
    pq.write_table(table, folder / "t.parquet")
    plan = plan_of(folder / "t.parquet", columns=columns, split=SplitOptions(val=0))
    config = PreprocessConfig(input="t.parquet", output="out")
    work = Work(
        staging=folder,
        folder=folder,
        columns=plan.columns,
        source_name="birds",
        image=config.image,
        tokenizer=train_tokenizer(plan.tokenizer_captions(), 64),
    )
    staged = write_range(work, plan.range(0), lambda done, failed: None)
    staged.accounting.check()
    return staged


def test_a_caption_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    images = [encoded(picture(seed)) for seed in range(4)]
    captions = not_utf8(b"a bird", b"caf\xe9", b"a kite", b"a house")
    notes = not_utf8(b"x", b"x", b"\xff", b"x")
    table = pa.table({"image": images, "caption": captions, "note": notes})
    staged = staged_rows(table, tmp_path, ColumnOptions(keep="note"))
    plan = plan_of(tmp_path / "t.parquet", split=SplitOptions(val=0))
    assert list(plan.tokenizer_captions()) == ["a bird", "a kite", "a house"]
    assert staged.accounting.written == 2
    assert staged.accounting.failed == {"bad_text": 2}
    rows = pq.read_table(staged.directory / "train.parquet").to_pylist()
    assert [row["detail"] for row in rows] == [
        None,
        "column 'caption' is not UTF-8",
        "column 'note' is not UTF-8",
        None,
    ]


def test_an_embedded_path_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    data = pa.array([encoded(picture(1)), None])
    images = pa.StructArray.from_arrays(
        [data, not_utf8(b"a.jpg", b"\xff.jpg")], ["bytes", "path"]
    )
    table = pa.table({"image": images, "caption": ["a bird", "a kite"]})
    staged = staged_rows(table, tmp_path, ColumnOptions())
    # The first one's path is good, and not needed: its bytes are there.
    assert staged.accounting.written == 1
    assert staged.accounting.failed == {"bad_text": 1}


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("columns.id", {"columns": ColumnOptions(id="name")}),
        ("columns.image", {"columns": ColumnOptions(image="path")}),
        ("split.column", {"split": SplitOptions(column="name")}),
        ("split.group", {"split": SplitOptions(group="name", val=0.5)}),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_an_identity_that_is_not_utf8_names_column_and_row(
    tmp_path: Path, flag: str, options: dict[str, object], binary: bool
) -> None:
    text = not_utf8(b"a", b"b", b"\xff\x00")
    name = pa.array([b"a", b"b", b"\xff\x00"]) if binary else text
    table = pa.table({"image": [b"x"] * 3, "caption": ["a"] * 3})
    table = table.append_column("name", name).append_column("path", text)
    pq.write_table(table, tmp_path / "t.parquet")
    says = rf"--{flag} (name|path): row 2 is not UTF-8 text; write the column"
    with pytest.raises(ValueError, match=says):
        plan_of(tmp_path / "t.parquet", **options)


def test_binary_identities_that_are_text_are_used(tmp_path: Path) -> None:
    columns = {"image": [b"x"] * 2, "caption": ["a"] * 2, "name": [b"one", b"two"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    plan = plan_of(tmp_path / "t.parquet", columns=ColumnOptions(id="name"))
    assert plan.range(0).locators == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            "image\tcaption\na.jpg\tbird\nb.jpg\tcafé\n".encode("latin-1"),
            r"column 'caption', row 3: not UTF-8; save the table as UTF-8 \(iconv",
        ),
        (
            "imâge\tcaption\na.jpg\tbird\n".encode("latin-1"),
            r"the header: not UTF-8; save the table as UTF-8 \(iconv",
        ),
        (
            b"image\tcaption\na.jpg\tbird\nb.jpg\n",
            r"Row #3: Expected 2 columns, got 1: b\.jpg; the header is row 1, and "
            "every row needs as many tabs",
        ),
    ],
)
def test_a_table_that_does_not_parse_names_row_and_cure(
    tmp_path: Path, data: bytes, says: str
) -> None:
    (tmp_path / "t.tsv").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        open_source(str(tmp_path / "t.tsv"))


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
@pytest.mark.parametrize("size", [1 << 20, 20_000_000])
def test_a_cell_longer_than_a_block_is_read(
    tmp_path: Path, suffix: str, size: int
) -> None:
    separator = "\t" if suffix == "tsv" else ","
    path = tmp_path / f"t.{suffix}"
    rows = [("image", "caption"), ("a.jpg", "x" * size), ("b.jpg", "a bird")]
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    source = open_source(str(path))
    assert [len(text) for text in source.column("caption").to_pylist()] == [size, 6]


def test_a_table_with_old_line_ends_is_not_taken_for_its_header(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.tsv").write_bytes(b"image\tcaption\ra.jpg\ta bird\r")
    assert open_source(str(tmp_path / "t.tsv")).n_rows == 1


def test_rows_are_read_without_their_whole_row_group(tmp_path: Path) -> None:
    image = os.urandom(100_000)
    images = [image[number:] + image[:number] for number in range(400)]
    path = tmp_path / "t.parquet"
    # Pages of about 1 MB, as writers that know their rows are large make them.
    pq.write_table(
        pa.table({"image": images}),
        path,
        compression="none",
        use_dictionary=False,
        write_batch_size=8,
    )
    assert pq.read_metadata(path).num_row_groups == 1
    del images
    rows = open_source(str(path)).part(0, 400).rows(["image"])
    before = pa.total_allocated_bytes()
    assert next(iter(rows))["image"] == image
    assert pa.total_allocated_bytes() - before < 20_000_000


def test_text_columns_have_offsets_beyond_2_gib(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a"], "more": [["a"]], "data": [b"a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    text = pa.large_string()
    assert source.column("caption").type == text
    assert source.column("more").type == pa.large_list(text)
    assert source.column("data").type == pa.large_binary()


def test_more_ranges_than_keys_can_number_are_refused(tmp_path: Path) -> None:
    n_inputs = 1_000_001
    same = pa.DictionaryArray.from_arrays(np.zeros(n_inputs, np.int8), pa.array(["a"]))
    numbers = pa.table({"image": same, "caption": same, "n": np.arange(n_inputs)})
    pq.write_table(numbers, tmp_path / "t.parquet")
    options = {"columns": ColumnOptions(id="n"), "split": SplitOptions(val=0)}
    path = tmp_path / "t.parquet"
    with pytest.raises(ValueError, match=r"--shard\.samples 1 .*give at least 2"):
        plan_of(path, shard=ShardOptions(samples=1), **options)


@pytest.mark.parametrize("name", ["rejected", "Tokenizer"])
def test_a_split_is_not_called_like_another_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.tsv").write_text(f"image\tcaption\tsplit\na.jpg\ta\t{name}\n")
    with pytest.raises(ValueError, match=r"a folder .* of its own; rename it"):
        plan_of(tmp_path / "t.tsv", split=SplitOptions(column="split"))
