"""The plan and the tasks tell inputs apart alike, whatever the columns hold."""

from __future__ import annotations

import decimal
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.describe import open_corpora
from pipeline.options import ColumnOptions, PreprocessConfig, SplitOptions
from pipeline.plan import make_plan

NAN = float("nan")
FLOATS = [1.0, 1.0, NAN, NAN, None, None, 0.0, -0.0, 3.0, 3.0]
TEXTS = ["a", "a", "", "", None, None, "a", "b", "b", "a"]
# Ten cells a column, equal ones beside each other, and what identifies nothing.
COLUMNS: dict[str, pa.Array] = {
    "text": pa.array(TEXTS),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "text view": pa.array(TEXTS).cast(pa.string_view()),
    "not utf-8": pa.array([b"\xff", b"\xff", b"a", b"a", *[b"\xfe"] * 6]).view(
        pa.string()
    ),
    "bytes": pa.array([b"\xff", b"\xff", b"a", b"a", None, None, *[b""] * 4]),
    "bytes view": pa.array([b"a", b"a", *[b""] * 2, *[None] * 6], pa.binary_view()),
    "fixed bytes": pa.array([b"ab"] * 5 + [None] * 3 + [b"ab"] * 2, pa.binary(2)),
    "integers": pa.array([1, 1, 2**60, 2**60, None, None, 0, 0, -1, -1]),
    "unsigned": pa.array([2**63 + 5] * 3 + [None] * 3 + [0] * 4, pa.uint64()),
    "doubles": pa.array(FLOATS, from_pandas=False),
    "floats": pa.array(FLOATS, pa.float32(), from_pandas=False),
    "halves": pa.array(np.array([0.1, 0.1, NAN, NAN, *[2.5] * 6], np.float16)),
    "booleans": pa.array([True, True, False, None, None, *[False] * 5]),
    "decimals": pa.array(
        [decimal.Decimal("2.50")] * 4 + [None] * 4 + [decimal.Decimal(1)] * 2,
        pa.decimal128(10, 2),
    ),
    "dates": pa.array([1, 1, 2**30, 2**30, None, 5, 5, -(2**30), 3, 3], pa.date32()),
    "nulls": pa.nulls(10),
}


def corpus_file(path: Path, columns: Mapping[str, pa.Array]) -> Path:
    """An Arrow file, in batches of three: inputs go over their ends."""
    table = pa.table({"image": [b"x"] * 10, "caption": ["c"] * 10, **columns})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def cases() -> Iterator[tuple[str, str]]:
    for name in COLUMNS:
        yield from ((name, "id"), (name, "group"))
        if name not in ("doubles", "floats", "halves", "decimals", "dates"):
            # What those hold cannot be names of splits.
            yield name, "split"


@pytest.mark.parametrize("sample", [None, 0.6])
@pytest.mark.parametrize(("name", "role"), list(cases()))
def test_plan_and_tasks_see_the_same_inputs(
    tmp_path: Path, name: str, role: str, sample: float | None
) -> None:
    column = COLUMNS[name]
    split = SplitOptions(val=0)
    columns = {"id": column}
    if role == "split":
        columns = {"id": pa.array(["k"] * 10), "s": column}
        split = SplitOptions(column="s")
    elif role == "group":
        columns |= {"s": column}
        split = SplitOptions(group="s", val=0.5)
    config = PreprocessConfig(
        input=str(corpus_file(tmp_path / "t.arrow", columns)),
        output="out",
        columns=ColumnOptions(id="id"),
        split=split,
        sample=sample,
    )
    (corpus,) = open_corpora(config)
    source, grouping = corpus.source, corpus.grouping
    names = grouping.all_columns
    whole = list(grouping.inputs(source.rows(names, 0, source.end), 0))
    plan = make_plan((corpus,), samples=1, limit=None)
    assert plan.table["first_row"].tolist() == [one.row for one in whole]
    ranges = map(plan.range, range(plan.n_ranges))
    parts = [
        list(grouping.inputs(source.rows(names, one.start, one.stop), one.first_row))
        for one in ranges
    ]
    assert [[(one.uid, one.split) for one in part] for part in parts] == [
        [(one.uid, one.split)] for one in whole
    ]
    assert {one.split for one in whole} <= set(plan.split_names)


def test_what_is_not_a_number_identifies_nothing_and_names_no_split(
    tmp_path: Path,
) -> None:
    columns = {"id": pa.nulls(10), "s": pa.array([NAN] * 10, from_pandas=False)}
    config = PreprocessConfig(
        input=str(corpus_file(tmp_path / "t.arrow", columns)),
        output="out",
        columns=ColumnOptions(id="s"),
        split=SplitOptions(column="id"),
    )
    (corpus,) = open_corpora(config)
    assert make_plan((corpus,), samples=4, limit=None).n_inputs == 10
    rows = corpus.source.rows(corpus.grouping.all_columns, 0, corpus.source.end)
    found = list(corpus.grouping.inputs(rows, 0))
    assert [one.locator for one in found] == [f"row:{n}" for n in range(10)]
    assert not any(one.has_split for one in found)
