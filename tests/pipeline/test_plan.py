"""Rows become inputs, splits and ranges, the same ones for every driver."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import resolve_columns
from pipeline.manifest import sample_uid
from pipeline.options import (
    ColumnOptions,
    PreprocessConfig,
    ShardOptions,
    SplitOptions,
)
from pipeline.plan import Plan, across_splits, make_plan
from pipeline.sources import open_source
from tests.pipeline.corpora import write_table


def plan_of(path: Path, **options: object) -> Plan:
    config = PreprocessConfig(input=str(path), output="out", **options)
    source = open_source(str(path))
    return make_plan(
        config, source, resolve_columns(source.schema, config.columns, config.split)
    )


def table_of(path: Path, images: list[str], splits: list[str] | None = None) -> Path:
    rows = [
        {"image": image, "caption": f"caption {n}"} for n, image in enumerate(images)
    ]
    for row, split in zip(rows, splits or [], strict=False):
        row["split"] = split
    return write_table(path / "t.tsv", rows)


def test_adjacent_rows_of_an_image_are_one_input_and_never_straddle_a_range(
    tmp_path: Path,
) -> None:
    images = [f"{n // 5}.jpg" for n in range(35)]
    plan = plan_of(table_of(tmp_path, images), shard=ShardOptions(samples=3))
    assert (plan.n_inputs, plan.n_ranges, plan.n_rows) == (7, 3, 35)
    sizes = [plan.range(number).row_counts.tolist() for number in range(3)]
    assert sizes == [[5] * 3, [5] * 3, [5]]
    read = [
        row["caption"]
        for number in range(3)
        for row in plan.range(number).rows.rows(["caption"])
    ]
    assert read == [f"caption {n}" for n in range(35)]


def test_a_limit_counts_inputs_and_keeps_the_first(tmp_path: Path) -> None:
    images = [f"{n // 2}.jpg" for n in range(20)]
    plan = plan_of(table_of(tmp_path, images), limit=3)
    assert (plan.n_inputs, plan.n_rows) == (3, 6)
    assert plan.range(0).locators == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_later_row_of_a_known_image_is_a_duplicate(tmp_path: Path) -> None:
    plan = plan_of(table_of(tmp_path, ["a", "b", "a", "c", "b", "b"]))
    assert plan.duplicate.tolist() == [False, False, True, False, True]


def test_rows_without_an_image_are_inputs_of_their_own(tmp_path: Path) -> None:
    plan = plan_of(table_of(tmp_path, ["", "", "a", ""]))
    assert plan.n_inputs == 4
    assert not plan.duplicate.any()


def test_split_names_are_normalised_and_held_out_rows_win(tmp_path: Path) -> None:
    names = ["train", "dev", "Validation", "test", "train", "val"]
    images = ["a", "b", "c", "d", "e", "a"]
    path = table_of(tmp_path, images, names)
    plan = plan_of(path, split=SplitOptions(column="split"))
    assert plan.range(0).splits == ["train", "val", "val", "test", "train", "val"]
    assert plan.split_names == ("test", "val", "train")
    assert plan.duplicate.tolist() == [True, False, False, False, False, False]


def test_a_group_never_straddles_splits(tmp_path: Path) -> None:
    groups = [f"group {n % 40}" for n in range(400)]
    captions = [f"caption {n}" for n in range(400)]
    table = pa.table({"image": [b"x"] * 400, "caption": captions, "group": groups})
    pq.write_table(table, tmp_path / "t.parquet")
    split = SplitOptions(group="group", val=0.3)
    plan = plan_of(tmp_path / "t.parquet", split=split)
    by_group: dict[str, set[int]] = {}
    for group, place in zip(groups, plan.splits, strict=True):
        by_group.setdefault(group, set()).add(int(place))
    assert all(len(places) == 1 for places in by_group.values())
    assert {place for places in by_group.values() for place in places} == {0, 1}


def test_the_share_held_out_is_as_asked_and_ignores_other_rows(tmp_path: Path) -> None:
    images = [f"{n}.jpg" for n in range(4000)]
    split = SplitOptions(val=0.25)
    whole = plan_of(table_of(tmp_path, images), split=split)
    share = (whole.splits == whole.split_names.index("val")).mean()
    assert abs(share - 0.25) < 0.03
    some = plan_of(table_of(tmp_path, images[1000:]), split=split)
    assert np.array_equal(whole.splits[1000:], some.splits)
    none = plan_of(table_of(tmp_path, images), split=SplitOptions(val=0))
    assert none.split_names == ("train",)


def test_the_tokenizer_sees_no_held_out_caption(tmp_path: Path) -> None:
    names = ["train", "val"] * 5
    path = table_of(tmp_path, [f"{n}.jpg" for n in range(10)], names)
    plan = plan_of(path, split=SplitOptions(column="split"))
    assert list(plan.tokenizer_captions()) == [f"caption {n}" for n in range(0, 10, 2)]


def test_an_id_column_identifies_and_groups_embedded_images(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [b"x", b"x", b"y"], "caption": list("abc"), "n": [7, 7, 9]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    plan = plan_of(tmp_path / "t.parquet", columns=ColumnOptions(id="n"))
    assert plan.range(0).locators == ["7", "9"]
    assert plan_of(tmp_path / "t.parquet").range(0).locators == ["0", "1", "2"]


def test_uids_depend_on_source_and_locator() -> None:
    uids = {sample_uid(source, place) for source in "ab" for place in ("1", "2", "12")}
    assert len(uids) == 6
    # Stored in every dataset: it must never change.
    assert f"{sample_uid('birds', 'a.jpg'):016x}" == "44284832e8e29c51"


def test_of_equal_images_the_most_held_out_split_keeps_one() -> None:
    digests = np.array([b"one", b"two", b"one", b"", b"", b"two"], dtype="S16")
    splits = np.array([2, 1, 0, 2, 0, 1])
    expected = [True, False, False, False, False, False]
    assert across_splits(digests, splits).tolist() == expected


@pytest.mark.parametrize("number", range(3))
def test_ranges_are_the_same_whoever_plans(tmp_path: Path, number: int) -> None:
    path = table_of(tmp_path, [f"{n}.jpg" for n in range(9)])
    one = plan_of(path, shard=ShardOptions(samples=4)).range(number)
    two = plan_of(path, shard=ShardOptions(samples=4)).range(number)
    assert one.locators == two.locators
    assert one.splits == two.splits


def test_a_corpus_in_hash_order_is_held_out_evenly(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(2000)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    rows = [{"image": name, "caption": "c", "g": name} for name in names]
    table = write_table(tmp_path / "t.csv", rows)
    plan = plan_of(table, split=SplitOptions(val=0.2, group="g"))
    held_out = plan.splits == plan.split_names.index("val")
    for part in np.split(held_out, 4):
        assert 0.12 < part.mean() < 0.28
