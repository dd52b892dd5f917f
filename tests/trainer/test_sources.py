"""Sources of one and several datasets, and the weights that they are mixed by."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.datasets import growing_copy, show
from tests.trainer.tiny import config
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.sources import sources_of


def test_the_manifests_weights_are_the_default_and_the_users_win(mixed: Path) -> None:
    dataset = Dataset(mixed, "train")
    found = {one.name: one.weight for one in sources_of(dataset, "weights")}
    assert found == {"faces": 3.0, "flags": 1.0}
    given = sources_of(dataset, {"flags": 5.0, "faces": 1.0})
    assert {one.name: one.weight for one in given} == {"faces": 1.0, "flags": 5.0}
    (alone,) = sources_of(dataset, {"flags": 0.0, "faces": 1.0})
    assert alone.counts.sum() == 90


def test_no_mixture_reads_all_sources_as_one(mixed: Path) -> None:
    (one,) = sources_of(Dataset(mixed, "train"), "none")
    assert one.counts.sum() == 160


def test_several_datasets_are_read_as_their_sources(mixed: Path, extra: Path) -> None:
    dataset = Dataset([str(mixed), str(extra)], "train")
    assert len(dataset) == 220
    found = {one.name: one for one in sources_of(dataset, "weights")}
    assert {name: int(one.counts.sum()) for name, one in found.items()} == {
        "faces": 90,
        "flags": 70,
        "signs": 60,
    }
    records = dataset.records(dataset.places())
    assert len(set(records["uid"].tolist())) == 220
    # In any order, and from several shards and directories at once.
    mixed_up = np.random.default_rng(0).permutation(220)
    again = dataset.records(dataset.places()[mixed_up])
    assert (again == records[mixed_up]).all()


def test_sources_of_one_name_are_told_apart_by_their_folders(
    extra: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(extra, tmp_path / "other")
    dataset = Dataset([str(extra), str(other)], "train")
    names = [one.name for one in sources_of(dataset, "weights")]
    assert names == ["other/signs", "signs/signs"]
    third = shutil.copytree(extra, tmp_path / "deep" / "other")
    with pytest.raises(ValueError, match="rename one of the folders"):
        sources_of(Dataset([str(other), str(third)], "train"), "weights")


def test_wrong_weights_are_refused_with_the_cure(mixed: Path, extra: Path) -> None:
    dataset = Dataset(mixed, "train")
    for weights, cure in (
        ({"faces": 1.0, "flag": 1.0}, "Did you mean 'flags'"),
        ({"faces": 1.0}, "no weight for flags"),
        ({"faces": 1.0, "flags": -1.0}, "give 0 or more"),
        ({"faces": 0.0, "flags": 0.0}, "nothing to draw"),
    ):
        with pytest.raises(ValueError, match=cure):
            sources_of(dataset, weights)
    both = Dataset([str(mixed), str(extra)], "train")
    with pytest.raises(ValueError, match="give each source a weight"):
        sources_of(both, "none")


def test_datasets_of_different_tokenizers_are_refused(
    mixed: Path, shards: Path, tmp_path: Path
) -> None:
    from tests.trainer.datasets import preprocess, slices

    (table,) = slices(tmp_path, 40)
    other = preprocess(tmp_path / "o", f"--input={table}", tokenizer=Path("train:300"))
    with pytest.raises(ValueError, match=r"different tokenizers.*pipeline.retokenize"):
        Dataset([str(mixed), str(other)], "train")


def test_a_mixture_waits_for_all_of_its_sources(mixed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    show(copy, growing_copy(mixed, copy), 4)
    with pytest.raises(ValueError, match="still being written"):
        Dataset(copy, "train")
    dataset = Dataset(copy, "train", growing=True)
    with pytest.raises(ValueError, match=r"no shard of flags yet.*--mixture none"):
        sources_of(dataset, "weights")
    (one,) = sources_of(dataset, "none")
    assert one.counts.sum() == 64


def test_pairs_of_a_mixture_have_the_shares_and_counts_of_their_sources(
    mixed: Path,
) -> None:
    dataset = Dataset(mixed, "train")
    keys = config(mixed, Path("unused"), "--lanes=4", "--global_batch=8")
    loader = Loader(dataset, keys, rank=0, world_size=1)
    faces = set(sources_of(dataset, "weights")[0].shards.tolist())
    total = np.zeros(2, dtype=int)
    for batch in loader.steps(0, 500):
        drawn = loader.order.samples_of(batch.step, loader.lanes)
        from_faces = sum(shard in faces for shard in drawn.places[:, 0].tolist())
        assert batch.counts.sources == (from_faces, 8 - from_faces)
        total += batch.counts.sources
    # 500 steps are whole blocks of every lane: exact, not just on average.
    assert total.tolist() == [3_000, 1_000]
