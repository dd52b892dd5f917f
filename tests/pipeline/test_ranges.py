"""An input is a sample or counts under its own reason, copies in splits included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import resolve_columns
from pipeline.manifest import Accounting
from pipeline.options import ImageOptions, PreprocessConfig, SplitOptions
from pipeline.plan import Plan, across_splits, make_plan
from pipeline.ranges import Work, range_digests, write_range
from pipeline.sources import open_source
from pipeline.tokenizer import train_tokenizer
from tests.pipeline.corpora import encoded, picture

Row = tuple[bytes, str, str]


def planned(folder: Path, rows: list[Row]) -> tuple[Plan, Work]:
    """Plan and work of a corpus of (image, split, caption) rows."""
    images, splits, captions = zip(*rows, strict=True)
    table = {"image": images, "split": splits, "caption": captions}
    pq.write_table(pa.table(table), folder / "t.parquet")
    split = SplitOptions(column="split")
    config = PreprocessConfig(
        input=str(folder / "t.parquet"), output="out", split=split
    )
    source = open_source(config.input)
    columns = resolve_columns(source.schema, config.columns, config.split)
    (folder / "staging").mkdir()
    work = Work(
        staging=folder / "staging",
        folder=source.folder,
        columns=columns,
        source_name="birds",
        image=ImageOptions(size=32),
        tokenizer=train_tokenizer(["a bird", "a kite"], 64),
    )
    return make_plan(config, source, columns), work


def silent(done: int, failed: int) -> None:
    pass


def outcome(folder: Path, rows: list[Row]) -> tuple[Accounting, dict[str, int]]:
    """Accounting of a corpus, and its samples by split, the way a run makes them."""
    plan, work = planned(folder, rows)
    digests = range_digests(work, plan.range(0), silent)
    plan = plan.without(across_splits(digests, plan.splits))
    staged = write_range(work, plan.range(0), silent)
    staged.accounting.check()
    return staged.accounting, {shard.split: shard.samples for shard in staged.shards}


GOOD = encoded(picture(1))


@pytest.mark.parametrize("broken", [b"not an image", b"", GOOD[: len(GOOD) // 2]])
def test_broken_images_are_no_duplicates_of_each_other(
    tmp_path: Path, broken: bytes
) -> None:
    rows = [(encoded(picture(seed)), "train", "a bird") for seed in range(4)]
    rows += [(broken, split, "a bird") for split in ("train", "val") * 3]
    counts, samples = outcome(tmp_path, rows)
    assert (sum(counts.failed.values()), counts.duplicates) == (6, 0)
    assert samples == {"train": 4}


def test_an_image_in_two_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    rows = [(GOOD, "train", "a bird"), (GOOD, "val", "a bird")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.written, counts.duplicates) == (1, 1)
    assert samples == {"val": 1}


def test_a_held_out_copy_that_is_filtered_keeps_no_image(tmp_path: Path) -> None:
    rows = [(GOOD, "train", "a bird"), (GOOD, "val", " ")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.written, counts.filtered) == (1, {"empty_caption": 1})
    assert samples == {"train": 1}


def test_a_copy_without_a_caption_is_filtered_and_no_duplicate(tmp_path: Path) -> None:
    rows = [(GOOD, "train", ""), (GOOD, "val", "a bird")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.filtered, counts.duplicates) == ({"empty_caption": 1}, 0)
    assert samples == {"val": 1}


def test_a_repeated_identity_keeps_no_image_from_other_splits(tmp_path: Path) -> None:
    plan, work = planned(tmp_path, [(GOOD, "val", "a bird"), (GOOD, "val", "a kite")])
    plan = replace(plan, duplicate=np.array([False, True]))
    digests = range_digests(work, plan.range(0), silent)
    assert (digests != b"").tolist() == [True, False]


@pytest.mark.parametrize("task", [range_digests, write_range])
def test_an_unforeseen_exception_names_its_input(tmp_path: Path, task: object) -> None:
    plan, work = planned(tmp_path, [(GOOD, "train", "a bird"), (GOOD, "val", "a kite")])
    work = replace(work, columns=replace(work.columns, captions=("no such column",)))
    assert callable(task)
    work_range = replace(plan.range(0), rows=_Rows())
    with pytest.raises(RuntimeError, match=r"input 000000000000 \(0\): KeyError"):
        task(work, work_range, silent)


class _Rows:
    """Rows that lack a column which the work names."""

    def rows(self, columns: object) -> object:
        return iter([{"image": GOOD}] * 2)
