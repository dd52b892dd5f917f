"""Rows become inputs, splits and ranges, the same ones for every driver."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.plan
from pipeline.captions import CaptionCleaner
from pipeline.describe import open_corpora
from pipeline.grouping import Input
from pipeline.manifest import sample_uid
from pipeline.options import (
    ColumnOptions,
    InputOptions,
    PreprocessConfig,
    ShardOptions,
    SplitOptions,
    TextOptions,
)
from pipeline.plan import Corpus, Plan, make_plan, read_table, training_captions
from tests.pipeline.corpora import write_table

Planned = tuple[Plan, tuple[Corpus, ...]]


def planned(given: object, **options: object) -> Planned:
    config = PreprocessConfig(
        input=given if isinstance(given, list) else str(given), output="out", **options
    )
    corpora = open_corpora(config)
    plan = make_plan(corpora, samples=config.shard.samples, limit=config.limit)
    return plan, corpora


def inputs_of(made: Planned) -> list[list[Input]]:
    """Inputs of every range, as a task reads them."""
    plan, corpora = made
    found = []
    for number in range(plan.n_ranges):
        part = plan.range(number)
        corpus = corpora[part.source]
        names = (*corpus.columns.sample, *corpus.grouping.all_columns)
        rows = corpus.source.rows(tuple(dict.fromkeys(names)), part.start, part.stop)
        found.append(list(corpus.grouping.inputs(rows, part.first_row)))
        assert len(found[-1]) == part.inputs
    return found


def all_of(made: Planned) -> list[Input]:
    return [given for part in inputs_of(made) for given in part]


def table_of(
    path: Path,
    images: list[str],
    splits: list[str] | None = None,
    name: str = "t.tsv",
) -> Path:
    rows = [
        {"image": image, "caption": f"caption {n}"} for n, image in enumerate(images)
    ]
    for row, split in zip(rows, splits or [], strict=False):
        row["split"] = split
    return write_table(path / name, rows)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.parquet"])
def test_adjacent_rows_of_an_image_are_one_input_and_never_straddle_a_range(
    tmp_path: Path, name: str
) -> None:
    images = [f"{n // 5}.jpg" for n in range(35)]
    path = table_of(tmp_path, images, name="t.tsv" if name == "t.parquet" else name)
    if name == "t.parquet":
        table = {"image": images, "caption": [f"caption {n}" for n in range(35)]}
        path = tmp_path / name
        pq.write_table(pa.table(table), path, row_group_size=4)
    made = planned(path, shard=ShardOptions(samples=3))
    parts = inputs_of(made)
    assert [len(part) for part in parts] == [3, 3, 1]
    read = [row["caption"] for part in parts for one in part for row in one.rows]
    assert read == [f"caption {n}" for n in range(35)]
    assert {len(one.rows) for one in all_of(made)} == {5}


def test_a_plan_is_stored_and_read_back(tmp_path: Path) -> None:
    plan, _ = planned(
        table_of(tmp_path, [f"{n}.jpg" for n in range(9)]),
        shard=ShardOptions(samples=4),
    )
    assert np.array_equal(read_table(plan.table_bytes()), plan.table)
    with pytest.raises(ValueError, match="not ranges"):
        read_table(plan.table_bytes().replace(b"first_row", b"first_rat"))


def test_a_limit_counts_inputs_and_keeps_the_first(tmp_path: Path) -> None:
    images = [f"{n // 2}.jpg" for n in range(20)]
    made = planned(table_of(tmp_path, images), limit=3)
    found = all_of(made)
    assert [one.locator for one in found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert sum(len(one.rows) for one in found) == 6


def test_a_limit_holds_over_several_sources(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.tsv", "c.tsv"):
        table_of(tmp_path, [f"{name}{n}" for n in range(4)], name=name)
    given = [InputOptions(path=str(tmp_path / f"{name}.tsv")) for name in "abc"]
    found = all_of(planned(given, limit=6))
    assert [one.locator for one in found] == [
        *("a.tsv0", "a.tsv1", "a.tsv2", "a.tsv3", "b.tsv0", "b.tsv1")
    ]


def test_a_range_has_one_source_and_equal_locators_of_two_are_two_inputs(
    tmp_path: Path,
) -> None:
    for name in ("a.tsv", "b.tsv"):
        table_of(tmp_path, [f"{n}.jpg" for n in range(5)], name=name)
    given = [
        InputOptions(path=str(tmp_path / "a.tsv"), weight=2.0),
        InputOptions(path=str(tmp_path / "b.tsv"), name="birds"),
    ]
    made = planned(given, shard=ShardOptions(samples=3))
    assert [len(part) for part in inputs_of(made)] == [3, 2, 3, 2]
    assert [int(row["source"]) for row in made[0].table] == [0, 0, 1, 1]
    assert len({one.uid for one in all_of(made)}) == 10
    with pytest.raises(ValueError, match="two inputs are named 'a'"):
        planned([given[0], InputOptions(path=str(tmp_path / "x" / "a.csv"))])


def test_rows_without_an_image_are_inputs_of_their_own(tmp_path: Path) -> None:
    found = all_of(planned(table_of(tmp_path, ["", "", "a", "", "b", "b"])))
    assert [len(one.rows) for one in found] == [1, 1, 1, 1, 2]
    assert [one.locator for one in found] == ["row:0", "row:1", "a", "row:3", "b"]


def test_a_change_of_split_ends_an_input(tmp_path: Path) -> None:
    path = table_of(tmp_path, ["a", "a", "a"], ["train", "train", "val"])
    made = planned(path, split=SplitOptions(column="split"))
    assert [(len(one.rows), one.split) for one in all_of(made)] == [
        (2, "train"),
        (1, "val"),
    ]


def test_split_names_are_normalised_and_held_out_come_first(tmp_path: Path) -> None:
    names = ["train", "dev", "Validation", "test", "train", ""]
    path = table_of(tmp_path, list("abcdef"), names)
    made = planned(path, split=SplitOptions(column="split"))
    found = all_of(made)
    assert [one.split for one in found] == [
        *("train", "val", "val", "test", "train", "train")
    ]
    assert [one.has_split for one in found] == [True] * 5 + [False]
    assert made[0].split_names == ("test", "val", "train")


@pytest.mark.parametrize("name", ["a/b", "tokenizer", "é", "x" * 65])
def test_a_value_that_cannot_be_a_split_is_named(tmp_path: Path, name: str) -> None:
    path = table_of(tmp_path, ["a", "b"], ["train", name])
    with pytest.raises(ValueError, match=f"split.column split: '{name[:64]}'"):
        planned(path, split=SplitOptions(column="split"))


def test_the_scan_ends_where_a_column_cannot_name_splits(tmp_path: Path) -> None:
    values = ["train", *(f"s{number}" for number in range(300)), *["val"] * 1000]
    table = pa.table({"image": [b"x"] * 1301, "caption": ["c"] * 1301, "s": values})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    config = PreprocessConfig(
        input=str(tmp_path / "t.arrow"), output="out", split=SplitOptions(column="s")
    )
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"split.column s: it names more than 255"):
        make_plan(
            open_corpora(config),
            samples=10,
            limit=None,
            on_scan=lambda _, cursor: seen.append(cursor),
        )
    assert seen == [99, 199]
    few = table.slice(48)
    pq.write_table(few, tmp_path / "t.parquet")
    made = planned(tmp_path / "t.parquet", split=SplitOptions(column="s"))
    assert len(made[0].split_names) == 255


def test_the_scan_ends_where_keys_cannot_number_the_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.plan, "MAX_RANGES", 6)
    table = pa.table({"image": [b"x"] * 20, "caption": ["c"] * 20})
    for name in ("a.arrow", "b.arrow"):
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    given = [InputOptions(path=str(tmp_path / name)) for name in ("a.arrow", "b.arrow")]
    seen: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match=r"samples 5 .* more than 6 ranges.*give more"):
        make_plan(
            open_corpora(PreprocessConfig(input=given, output="out")),
            samples=5,
            limit=None,
            on_scan=lambda *place: seen.append(place),
        )
    assert seen[-1] == (1, 7)
    assert len(planned(given, shard=ShardOptions(samples=7))[0].table) == 6


def test_a_group_never_straddles_splits(tmp_path: Path) -> None:
    groups = [f"group {n % 40}" for n in range(400)]
    captions = [f"caption {n}" for n in range(400)]
    table = pa.table({"image": [b"x"] * 400, "caption": captions, "group": groups})
    pq.write_table(table, tmp_path / "t.parquet")
    split = SplitOptions(group="group", val=0.3)
    by_group: dict[str, set[str]] = {}
    for one in all_of(planned(tmp_path / "t.parquet", split=split)):
        by_group.setdefault(one.rows[0]["group"], set()).add(one.split)
    assert all(len(splits) == 1 for splits in by_group.values())
    assert set.union(*by_group.values()) == {"train", "val"}


def splits_of(made: Planned) -> dict[str, str]:
    return {one.locator: one.split for one in all_of(made)}


def test_the_share_held_out_is_as_asked_and_ignores_other_rows(tmp_path: Path) -> None:
    images = [f"{n}.jpg" for n in range(4000)]
    split = SplitOptions(val=0.25)
    whole = splits_of(planned(table_of(tmp_path, images), split=split))
    share = list(whole.values()).count("val") / 4000
    assert abs(share - 0.25) < 0.03
    some = splits_of(planned(table_of(tmp_path, images[1000:]), split=split))
    assert some.items() <= whole.items()
    none = planned(table_of(tmp_path, images), split=SplitOptions(val=0))
    assert none[0].split_names == ("train",)


def test_a_sample_is_a_share_of_the_inputs_and_their_rows_stay_together(
    tmp_path: Path,
) -> None:
    images = [f"{n // 2}.jpg" for n in range(4000)]
    path = table_of(tmp_path, images)
    whole = {one.locator: len(one.rows) for one in all_of(planned(path))}
    made = planned(path, sample=0.1, shard=ShardOptions(samples=50))
    found = {one.locator: len(one.rows) for one in all_of(made)}
    assert 150 < len(found) < 250
    assert found.items() <= whole.items()
    assert made[0].n_inputs == len(found)


def test_the_tokenizer_sees_no_held_out_caption(tmp_path: Path) -> None:
    names = ["train", "val"] * 5
    path = table_of(tmp_path, [f"{n}.jpg" for n in range(10)], names)
    plan, corpora = planned(path, split=SplitOptions(column="split"))
    seen = training_captions(plan, corpora, CaptionCleaner(TextOptions()))
    assert list(seen) == [f"caption {n}" for n in range(0, 10, 2)]


def test_an_id_column_identifies_and_groups_embedded_images(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [b"x", b"x", b"y"], "caption": list("abc"), "n": [7, 7, 9]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    made = planned(tmp_path / "t.parquet", columns=ColumnOptions(id="n"))
    assert [one.locator for one in all_of(made)] == ["7", "9"]
    alone = all_of(planned(tmp_path / "t.parquet"))
    assert [one.locator for one in alone] == ["0", "1", "2"]


def test_uids_depend_on_source_and_locator() -> None:
    uids = {sample_uid(source, place) for source in "ab" for place in ("1", "2", "12")}
    assert len(uids) == 6
    # Stored in every dataset: it must never change.
    assert f"{sample_uid('birds', 'a.jpg'):016x}" == "44284832e8e29c51"


def test_a_corpus_in_hash_order_is_held_out_evenly(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(2000)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    rows = [{"image": name, "caption": "c", "g": name} for name in names]
    table = write_table(tmp_path / "t.csv", rows)
    made = planned(table, split=SplitOptions(val=0.2, group="g"))
    held_out = np.array([one.split == "val" for one in all_of(made)])
    for part in np.split(held_out, 4):
        assert 0.12 < part.mean() < 0.28
