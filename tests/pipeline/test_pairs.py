"""Pairs of a real dataset: what matches, what does not, and where the rest went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.manifest import PAIR_DTYPE, load_index, load_manifest
from pipeline.pair_draws import Kind, in_dev, matches, negatives, sided
from pipeline.pair_table import NO_VALUE, Table
from pipeline.pairs import main
from tests.conftest import EMOJI, emoji_shards

# Of 120 rows: threes of one value, of which every second begins with the same letter;
# then some without a value, some alone, and two values that lie in both splits.
_THREES, _EMPTY, _ALONE, _SHARED = 90, 10, 12, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = pq.read_table(EMOJI, columns=["image", "label", "hexcode"]).slice(0, 120)
    value = [f"v{row // 3}" for row in range(_THREES)]
    value += [""] * _EMPTY + [f"alone{row}" for row in range(_ALONE)]
    value += [f"shared{row % 2}" for row in range(_SHARED)]
    split = ["val" if row // 3 % 5 == 0 else "train" for row in range(_THREES)]
    split += ["train"] * (_EMPTY + _ALONE)
    split += ["val" if row < 4 else "train" for row in range(_SHARED)]
    captions = [[label, f"second of {label}"] for label in rows["label"].to_pylist()]
    # A train sample that has no second caption.
    captions[5] = captions[5][:1]
    table = pa.table(
        {
            "image": rows["image"],
            "caption": pa.array(captions),
            "hexcode": rows["hexcode"],
            "value": value,
            "kind": [f"k{row // 3 % 4}" for row in range(120)],
            "size": [f"s{row % 2}" for row in range(120)],
            "one": ["the same"] * 120,
            "part": split,
        }
    )
    pq.write_table(table, folder / "corpus.parquet")
    return emoji_shards(
        folder / "shards",
        f"--input={folder / 'corpus.parquet'}",
        "--columns.keep=[value,kind,size,one]",
        "--split.column=part",
        "--split.group=null",
        "--tokenizer=train:400",
        "--shard.samples=50",
        "--workers=1",
    )


def pairs_of(
    dataset: Path, output: Path, *words: str
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """The array and the rows of the table for people."""
    main([str(dataset), "--column=value", f"--output={output}", *words])
    array = np.load(output)
    assert array.dtype == PAIR_DTYPE
    twin = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert len(twin) == len(array)
    return array, twin


def test_what_matches_has_the_value_and_what_is_hard_has_the_other_columns(
    dataset: Path, tmp_path: Path
) -> None:
    array, twin = pairs_of(dataset, tmp_path / "p.npy", "--hard=kind,size")
    listed, _ = pairs_of(dataset, tmp_path / "q.npy", "--hard=[kind, size]")
    assert np.array_equal(listed, array)
    assert {row["kind"] for row in twin} == {"match", "hard", "easy"}
    for record, row in zip(array, twin, strict=True):
        same = row["left_value"] == row["right_value"]
        assert same == (record["label"] == 1) == (row["kind"] == "match")
        assert row["left_key"] != row["right_key"]
        if row["kind"] == "hard":
            assert row["left_kind"] == row["right_kind"]
            assert row["left_size"] == row["right_size"]
    assert array["label"].sum() * 2 == len(array)
    # Both ways about as often, or a side would say something.
    first = [row["left_key"] < row["right_key"] for row in twin]
    assert 0.3 < np.mean(first) < 0.7


def test_the_two_files_and_the_index_name_the_same_samples(
    dataset: Path, tmp_path: Path
) -> None:
    array, twin = pairs_of(
        dataset, tmp_path / "p.npy", "--left_caption=0", "--right_caption=1"
    )
    known = {}
    for shard in load_manifest(dataset).split("train"):
        table = pq.read_table(dataset / shard.sidecar(".parquet")).to_pylist()
        written = [row for row in table if row["status"] == "success"]
        for record, row in zip(load_index(dataset, shard), written, strict=True):
            known[int(record["uid"])] = row
    for record, row in zip(array, twin, strict=True):
        for side, number in (("left", 0), ("right", 1)):
            sample = known[int(record[f"{side}_uid"])]
            assert row[f"{side}_key"] == sample["key"]
            assert row[f"{side}_uid"] == sample["uid"]
            assert row[f"{side}_value"] == sample["value"]
            assert row[f"{side}_caption"] == sample["captions"][number]
            assert record[f"{side}_caption"] == number


def test_every_sample_is_accounted_for(dataset: Path, tmp_path: Path) -> None:
    pairs_of(dataset, tmp_path / "p.npy", "--right_caption=1", "--limit=20")
    found = json.loads((tmp_path / "p.json").read_text())
    manifest = load_manifest(dataset)
    assert found["manifest_sha256"] == manifest.sha256
    went = found["samples"]
    assert sum(went.values()) == manifest.samples("train")
    assert went["no_value"] == _EMPTY
    assert went["no_match"] == _ALONE
    assert went["in_another_split"] == _SHARED // 2
    assert went["no_such_caption"] == 1
    assert found["pairs"]["match"] == 20
    assert found["pairs"]["hard"] + found["pairs"]["easy"] == 20


def test_files_for_learning_and_measuring_share_no_value(
    dataset: Path, tmp_path: Path
) -> None:
    pairs_of(dataset, tmp_path / "train.npy", "--dev=0.3")
    pairs_of(dataset, tmp_path / "val.npy", "--split=val")
    values = []
    for name in ("train", "train-dev", "val"):
        twin = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        sides = ("left_value", "right_value")
        values.append({str(row[side]) for row in twin for side in sides})
        assert values[-1]
    train, dev, val = values
    assert not train & dev
    assert not (train | dev) & val
    # The held-out split keeps what both have.
    assert {"shared0", "shared1"} <= val


def test_the_same_dataset_and_keys_give_the_same_bytes(
    dataset: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        pairs_of(dataset, tmp_path / name / "p.npy", "--hard=kind", f"--seed={seed}")
    for suffix in ("npy", "parquet", "json"):
        first, again, other = (
            (tmp_path / name / f"p.{suffix}").read_bytes() for name in "abc"
        )
        assert first == again
        assert first != other


def test_files_of_another_hand_are_not_replaced(dataset: Path, tmp_path: Path) -> None:
    for name in ("p.parquet", "p-dev.json", "p.npy"):
        other = tmp_path / name
        other.write_text("mine")
        with pytest.raises(ValueError, match=rf"would replace {name}.*another name"):
            pairs_of(dataset, tmp_path / "p.npy", "--dev=0.3")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert other.read_text() == "mine"
        other.unlink()
    for seed in (0, 1):
        pairs_of(dataset, tmp_path / "p.npy", "--dev=0.3", f"--seed={seed}")
    # Its pairs would be in both files.
    with pytest.raises(
        ValueError, match=r"p-dev\.npy is of an earlier call.*--dev 0\.3"
    ):
        pairs_of(dataset, tmp_path / "p.npy")
    for path in tmp_path.glob("p-dev.*"):
        path.unlink()
    pairs_of(dataset, tmp_path / "p.npy")
    # One of another call stays.
    pairs_of(dataset, tmp_path / "p-dev.npy", "--split=val")
    pairs_of(dataset, tmp_path / "p.npy")


def test_a_dataset_is_no_place_for_pairs(dataset: Path, tmp_path: Path) -> None:
    before = sorted(dataset.rglob("*"))
    for inside in (dataset / "p.npy", dataset / "pairs" / "p.npy"):
        with pytest.raises(ValueError, match=r"lies in the dataset.*a path outside"):
            pairs_of(dataset, inside)
    assert sorted(dataset.rglob("*")) == before
    file = tmp_path / "items.parquet"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"items\.parquet has no manifest\.json.*Make"):
        pairs_of(file, tmp_path / "p.npy")


def table_of(values: list[int], hard: list[int], images: list[int]) -> Table:
    """Samples whose uids are spread, so that their order means nothing."""
    uids = np.arange(len(values), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return Table(
        uids=uids,
        values=np.array(values, np.uint64),
        hard=np.array(hard, np.uint64),
        images=np.array(images, np.uint64),
        n_captions=np.ones(len(values), np.int64),
    )


def drawn(table: Table, *, per_value: int = 50) -> set[tuple[int, int, int]]:
    """Unordered pairs of uids with their kinds."""
    rows = np.arange(len(table))
    positive, _ = matches(table, rows, per_value=per_value, limit=None, seed=3)
    negative, kinds = negatives(
        table, rows, positive, ratio=2.0, hard_share=0.5, seed=3
    )
    whole = np.concatenate([positive, negative])
    kinds = np.concatenate([np.zeros(len(positive), np.int64), kinds])
    found = sided(table, whole, kinds, seed=3)
    sides = zip(found.left, found.right, found.kind, strict=True)
    pairs = [
        (*sorted((int(table.uids[a]), int(table.uids[b]))), int(k)) for a, b, k in sides
    ]
    assert len({pair[:2] for pair in pairs}) == len(pairs)
    return set(pairs)


def test_the_order_of_samples_changes_no_pair() -> None:
    values = [1 + row // 4 for row in range(60)]
    table = table_of(values, [1 + v % 3 for v in values], list(range(60)))
    turned = np.random.default_rng(0).permutation(60)
    other = replace(
        table, **{name: getattr(table, name)[turned] for name in Table.__annotations__}
    )
    assert drawn(table) == drawn(other)


def test_all_pairs_of_a_value_come_once_unless_there_are_too_many() -> None:
    sizes = (2, 3, 4, 7)
    values = [value for value, size in enumerate(sizes, 1) for _ in range(size)]
    table = table_of(values, [0] * 16, list(range(16)))
    rows = np.arange(16)
    every, _ = matches(table, rows, per_value=50, limit=None, seed=0)
    pairs = {tuple(sorted(pair)) for pair in every.tolist()}
    assert len(pairs) == len(every) == sum(n * (n - 1) // 2 for n in sizes)
    few, _ = matches(table, rows, per_value=7, limit=None, seed=0)
    per_value = np.bincount(table.values[few[:, 0]].astype(int))
    assert per_value.tolist() == [0, 1, 3, 6, 7]
    # Of the large one each sample comes twice.
    of_last = few[table.values[few[:, 0]] == 4]
    assert set(np.bincount(of_last.ravel())[-7:]) == {2}


def test_equal_images_are_no_pair() -> None:
    table = table_of([1, 1, 1, 2, 2, 3, 3], [1] * 7, [7, 7, 8, 9, 7, 9, 5])
    rows = np.arange(7)
    positive, same = matches(table, rows, per_value=9, limit=None, seed=0)
    assert same == 1
    negative, _ = negatives(table, rows, positive, ratio=6.0, hard_share=1.0, seed=0)
    for pairs in (positive, negative):
        assert (table.images[pairs[:, 0]] != table.images[pairs[:, 1]]).all()
    assert (table.values[negative[:, 0]] != table.values[negative[:, 1]]).all()


def test_a_sample_without_hard_partners_gets_easy_ones() -> None:
    values = [1, 1, 2, 2, 3, 3, 4, 4]
    hard = [int(NO_VALUE), int(NO_VALUE), 5, 5, 6, 6, 6, 6]
    table = table_of(values, hard, list(range(8)))
    positive, _ = matches(table, np.arange(8), per_value=9, limit=None, seed=0)
    negative, kinds = negatives(
        table, np.arange(8), positive, ratio=2.0, hard_share=1.0, seed=0
    )
    is_hard = kinds == Kind.HARD
    assert is_hard.any()
    assert (table.hard[negative[is_hard]] == 6).all()
    assert {1, 2} <= set(table.values[negative[~is_hard, 0]].tolist())


def test_what_is_put_aside_follows_from_the_value_alone() -> None:
    values = np.arange(1, 4001, dtype=np.uint64)
    aside = in_dev(values, 0.25, seed=0)
    assert 0.2 < aside.mean() < 0.3
    assert np.array_equal(in_dev(values[::-1], 0.25, seed=0), aside[::-1])
    assert not np.array_equal(in_dev(values, 0.25, seed=1), aside)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--column=valeu"], "Did you mean 'value'"),
        (["--column=value", "--split=test"], "it has: train, val"),
        (["--column=caption"], "Kept are: value, kind, size, one"),
        (["--column=value", "--hard=value"], "a hard negative differs in it"),
        (["--column=value", "--output=p.txt"], "ends in .npy"),
        (["--column=value", "--dev=1"], "--dev is 1"),
        (
            ["--column=value", "--right_caption=7"],
            r"no two samples match.*split train, \d+ lack the caption of .*lower it",
        ),
        (["--column=size", "--dev=0"], r"\d+ have a size that a held-out split.*group"),
        (["--column=one", "--split=val"], r"matching pairs and no others.*1 values of"),
    ],
)
def test_wrong_calls_are_refused(
    dataset: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    output = [f"--output={tmp_path / 'p.npy'}"]
    with pytest.raises((ConfigError, ValueError), match=expected):
        main([str(dataset), *output, *words])
    assert not list(tmp_path.iterdir())
