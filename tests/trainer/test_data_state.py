"""What a checkpoint says about data: what is a change, and what is only growth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.manifest import Accounting, load_manifest, manifest_seal
from tests.trainer.datasets import growing_copy, preprocess, repaired, show, slices
from tests.trainer.tiny import column, config, launch
from trainer import replay
from trainer.contract import complete_checkpoints
from trainer.data_state import MOST_FROZEN, DataState, difference, resumed
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.epochs import Frozen
from trainer.feed import STEPS_BEYOND, Feed
from trainer.growth import freeze_until
from trainer.loader import Loader, StepBatch
from trainer.order import Began
from trainer.sources import sources_of

SMALL = ("--lanes=4", "--global_batch=8", "--micro_batch=8")


def state_of(path: Path, step: int = 7) -> DataState:
    keys = config(path, Path("unused"), *SMALL, "--mixture=none")
    loader = Loader(Dataset(path, "train"), keys, rank=0, world_size=1)
    return DataState.of(loader.dataset, loader.order, step=step)


def test_a_state_survives_json_and_stays_under_a_kilobyte(mixed: Path) -> None:
    state = state_of(mixed)
    assert DataState.from_plain(json.loads(json.dumps(state.to_plain()))) == state
    row = Frozen(first=10**7, shards=10**5, records="0" * 20)
    full = dataclasses.replace(
        state,
        step=10**8,
        epoch=10**4,
        last_epoch=10**4,
        seed=2**64 - 1,
        began=Began(step=10**7, epoch=10**4),
        frozen=((row,) * (MOST_FROZEN + 1),),
    )
    assert full.size() < 1_024


def test_appended_shards_are_no_change_and_lost_or_other_ones_are(
    mixed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    dataset = Dataset(copy, "train")
    show(copy, whole, 5)
    early = Dataset(copy, "train", growing=True)
    keys = config(copy, Path("unused"), *SMALL, "--mixture=none")
    loader = Loader(early, keys, rank=0, world_size=1)
    state = DataState.of(early, loader.order, step=3)
    assert difference(state, dataset, sources_of(dataset, "none")) is None
    late = state_of(mixed)
    what = difference(late, early, sources_of(early, "none"))
    assert what == "source '*' has 5 shards of 11"


def test_a_changed_dataset_is_refused_until_the_user_says_what_to_do(
    mixed: Path, shards: Path, tmp_path: Path
) -> None:
    state = state_of(mixed)
    (table,) = slices(tmp_path, 160)
    other = preprocess(
        tmp_path / "other", f"--input={table}", tokenizer=shards / "tokenizer"
    )
    dataset = Dataset(other, "train")
    sources = sources_of(dataset, "none")
    with pytest.raises(ValueError, match="--changed_data new_epoch") as caught:
        resumed(state, dataset, sources, changed="refuse", run="RUN")
    assert state.manifest_hash in str(caught.value)
    assert dataset.manifest_hash in str(caught.value)
    anew = resumed(state, dataset, sources, changed="new_epoch", run="RUN")
    assert anew.began == Began(step=7, epoch=1)
    assert difference(anew, dataset, sources) is None
    with pytest.raises(ValueError, match="as many samples"):
        resumed(state, dataset, sources, changed="continue", run="RUN")


def test_a_repaired_dataset_continues_at_the_same_place(
    mixed: Path, tmp_path: Path
) -> None:
    state = state_of(mixed)
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    other = repaired(whole)
    show(copy, other, len(whole.shards))
    assert load_manifest(copy).shards[0] == other.shards[0] != whole.shards[0]
    dataset = Dataset(copy, "train")
    sources = sources_of(dataset, "none")
    assert difference(state, dataset, sources)
    kept = resumed(state, dataset, sources, changed="continue", run="RUN")
    assert (kept.step, kept.began) == (state.step, state.began)
    assert difference(kept, dataset, sources) is None


def test_a_run_on_other_data_begins_an_epoch_of_its_own_and_stays_pure(
    mixed: Path, extra: Path, tmp_path: Path
) -> None:
    """The real launcher: 5 steps on one dataset, 7 on another, replayed and resumed."""
    run = tmp_path / "run"
    words = (*SMALL, "--mixture=none", f"--output={run}", "--deepspeed.zero_stage=0")
    launch(1, *words, f"--data={mixed}", "--max_steps=5")
    first = column(run, "sample_digest")
    launch(1, *words, f"--data={extra}", "--changed_data=new_epoch", "--max_steps=9")
    launch(2, *words, f"--data={extra}")
    digests = column(run, "sample_digest")
    assert digests[:5] == first
    assert column(run, "epoch")[:6] == [0, 0, 0, 0, 0, 1]
    keys = config(extra, Path("unused"), *SMALL, "--mixture=none")
    loader = Loader(Dataset(extra, "train"), keys, rank=0, world_size=1)
    state = dataclasses.replace(
        DataState.fresh(loader.dataset, loader.order.sources, seed=keys.seed),
        step=5,
        began=Began(step=5, epoch=1),
    )
    pure = Loader(loader.dataset, keys, rank=0, world_size=1, state=state)
    assert [b.counts.digest_text for b in pure.steps(5, 12)] == digests[5:]


def test_a_step_of_before_a_change_of_data_is_replayed_as_the_refusal_says(
    mixed: Path, extra: Path, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    words = (*SMALL, "--mixture=none", f"--output={run}", "--deepspeed.zero_stage=0")
    launch(1, *words, f"--data={mixed}", "--max_steps=5")
    launch(1, *words, f"--data={extra}", "--changed_data=new_epoch", "--max_steps=7")
    assert replay.main([str(run), "--step=6", "--pairs=1"]) == 0
    shutil.copytree(run, copy)
    late = [path for step, path in complete_checkpoints(copy) if step > 5]
    for path in late:
        shutil.rmtree(path)
    for data in (mixed, extra):
        with pytest.raises(ValueError, match=r"after step 5.*name step 6") as refused:
            replay.main([str(run), "--step=5", f"--data={data}"])
        assert "replay step 5 with a copy" in str(refused.value)
    assert replay.main([str(copy), "--step=5", "--pairs=1", f"--data={mixed}"]) == 0
    # Without any checkpoint too.
    shutil.rmtree(copy / "checkpoints")
    assert replay.main([str(copy), "--step=5", "--pairs=1", f"--data={mixed}"]) == 0


def grow(copy: Path, run: Path, *words: str) -> list[str]:
    return [
        *SMALL,
        f"--data={copy}",
        f"--output={run}",
        "--grow=true",
        "--deepspeed.zero_stage=0",
        *words,
    ]


def test_a_run_follows_a_growing_dataset_and_is_a_function_of_its_epochs(
    mixed: Path, tmp_path: Path
) -> None:
    """Shards appear between the calls of one run, whose ranks change too."""
    copy, run = tmp_path / "copy", tmp_path / "run"
    whole = growing_copy(mixed, copy)
    words = grow(copy, run, "--mixture=none", "--schedule.steps=40")
    show(copy, whole, 4)
    told = launch(2, *words, "--max_steps=3")
    assert "64 pairs, 8 steps an epoch" in told
    show(copy, whole, 7)
    told = launch(1, *words, "--max_steps=14")
    assert "epoch 1 will take in what has been committed by now: 7 shards" in told
    show(copy, whole, len(whole.shards))
    launch(2, *words)
    (marker,) = sorted((run / "checkpoints").glob("*40/complete.json"))
    state = json.loads(marker.read_text())
    assert [[first, shards] for first, shards, _ in state["frozen"][0]] == [
        [0, 4],
        [8, 7],
        [21, 11],
    ]
    assert column(run, "epoch") == [0] * 8 + [1] * 13 + [2] * 19
    # Who has only the finished dataset and the state works out the same steps.
    keys = config(mixed, Path("unused"), *SMALL, "--mixture=none")
    loader = Loader(
        Dataset(mixed, "train"),
        keys,
        rank=0,
        world_size=1,
        state=DataState.from_plain(state),
    )
    digests = [batch.counts.digest_text for batch in loader.steps(0, 40)]
    assert digests == column(run, "sample_digest")


class Teller:
    """Keeps what a run has to say."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_a_mixture_grows_source_by_source(mixed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    show(copy, whole, 8)
    # 10 draws of each lane a step: a block is 100 steps.
    keys = config(copy, Path("unused"), "--lanes=4", "--global_batch=40")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    dataset = Dataset(copy, "train", growing=True)
    loader = Loader(dataset, keys, rank=0, world_size=1)
    digests = []
    for batch in steps_of(loader, world, 130):
        digests.append(batch.counts.digest_text)
        if batch.step == 5:
            show(copy, whole, len(whole.shards))
        assert sum(batch.counts.sources) == 40
    state = DataState.of(dataset, loader.order, step=130)
    faces, flags = ([entry.shards for entry in source] for source in state.frozen)
    assert (faces, flags) == ([6], [2, 5])
    later = Loader(
        Dataset(mixed, "train"),
        keys,
        rank=0,
        world_size=1,
        state=DataState.from_plain(json.loads(json.dumps(state.to_plain()))),
    )
    assert [b.counts.digest_text for b in later.steps(0, 130)] == digests


def test_shards_that_the_data_state_has_no_place_for_are_told_of(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    show(copy, whole, 8)
    keys = config(copy, Path("unused"), "--lanes=4", "--global_batch=40")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    loader = Loader(Dataset(copy, "train", growing=True), keys, rank=0, world_size=1)
    # As many entries as the two sources have to begin with.
    monkeypatch.setattr("trainer.growth.MOST_FROZEN", 2)
    show(copy, whole, 9)
    teller = Teller()
    freeze_until(0, loader=loader, world=world, tell=teller)
    told = teller.told
    assert len(told) == 1
    assert told[0].startswith("1 more shards have been committed; they are taken in")
    shards = [len(source.shards) for source in loader.order.sources]
    assert sum(shards) == 8


def steps_of(loader: Loader, world: World, count: int) -> Iterator[StepBatch]:
    """Steps as the training loop takes them, epochs frozen ahead."""
    with Feed(loader.steps(0, count), world.device) as feed:
        for step in range(count):
            freeze_until(step + STEPS_BEYOND, loader=loader, world=world, tell=None)
            yield feed.next()


def test_an_unfinished_dataset_is_refused_unless_it_may_grow(
    mixed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    show(copy, growing_copy(mixed, copy), 4)
    with pytest.raises(ValueError, match="--grow"):
        Dataset(copy, "train")


def test_one_directory_made_anew_does_not_hold_up_the_growth_of_another(
    mixed: Path, extra: Path, tmp_path: Path
) -> None:
    """And the run bears as much damage as its share of what there is by now."""
    one, other = tmp_path / "one", tmp_path / "other"
    whole = growing_copy(mixed, one)
    show(one, whole, 8)
    shutil.copytree(extra, other)
    dataset = Dataset([str(one), str(other)], "train", growing=True)
    keys = config(one, Path("unused"), "--lanes=4", "--global_batch=40")
    loader = Loader(dataset, keys, rank=0, world_size=1)
    show(one, whole, len(whole.shards))
    damaged = load_manifest(other)
    turned = dataclasses.replace(damaged, shards=damaged.shards[:1], complete=False)
    written = turned.shards[0].samples
    turned = dataclasses.replace(
        turned, accounting=Accounting(inputs=written, written=written), rows=written
    )
    (other / "manifest.json").write_text(turned.to_json())
    (other / "manifest.json.sha256").write_text(
        manifest_seal(turned.to_json().encode())
    )
    teller = Teller()
    before = len(dataset)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    freeze_until(0, loader=loader, world=world, tell=teller)
    told = teller.told
    assert len(dataset) == before + sum(shard.samples for shard in whole.shards[8:])
    assert any("was made anew while a run reads it" in line for line in told)
    assert any("source flags will take in" in line for line in told)
    few = loader.quarantine
    few.resize(1_000_000)
    assert "of 1000000 samples" in few._too_many([])
