"""What was frozen stays so after a kill, and what is stale is left alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.config import to_yaml
from tests.trainer.datasets import growing_copy, show
from tests.trainer.test_elastic import launch_and_kill
from tests.trainer.test_replay import replayed
from tests.trainer.tiny import column, config, launch
from trainer import freezes
from trainer.check import check
from trainer.contract import CONFIG, FROZEN, complete_checkpoints
from trainer.data_state import DataState
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.growth import freeze_until
from trainer.loader import Loader
from trainer.options import PretrainConfig
from trainer.order import Began
from trainer.replay import main as replay
from trainer.sources import sources_of

SMALL = ("--lanes=4", "--global_batch=8", "--micro_batch=4", "--mixture=none")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
STEPS = 60


def test_redone_steps_have_the_samples_that_they_had_before_a_kill(
    mixed: Path, tmp_path: Path
) -> None:
    """Real kills, before the first checkpoint and between an epoch's freeze and the
    next one, with more shards and another number of ranks each time.
    """
    copy, run = tmp_path / "copy", tmp_path / "run"
    whole = growing_copy(mixed, copy)
    words = (
        *SMALL,
        *(f"--data={copy}", f"--output={run}", "--grow=true"),
        *(f"--schedule.steps={STEPS}", "--checkpoint.every_steps=10"),
        *("--model.layers=1", "--deepspeed.zero_stage=0"),
    )
    # Fifteen steps an epoch.
    show(copy, whole, 8)
    launch_and_kill(1, 3, run, *words)
    assert not complete_checkpoints(run)
    first = column(run, "sample_digest")
    show(copy, whole, 9)
    # The next epoch is frozen after step 10.
    launch_and_kill(2, 17, run, *words, saved=10)
    assert [step for step, _ in complete_checkpoints(run)] == [10]
    second = column(run, "sample_digest")
    assert column(run, "epoch")[14:17] == [0, 1, 1]
    same = min(len(first), len(second))
    assert first[:same] == second[:same]
    # What comes after the checkpoint can be looked at with the run's own shards.
    show(copy, whole, 10)
    again = replayed(run, 17)
    assert (again["matches"], again["steps_per_epoch"]) == (True, 17)
    assert not again["provisional"]
    show(copy, whole, len(whole.shards))
    told = launch(1, *words)
    assert "resuming after step 10" in told
    assert column(run, "sample_digest")[: len(second)] == second
    marker = complete_checkpoints(run)[-1][1] / "complete.json"
    state = DataState.from_plain(json.loads(marker.read_text()))
    covered = [(entry.first, entry.shards) for entry in state.frozen[0]]
    assert covered == [(0, 8), (15, 9), (32, 11)]
    # Who has only the finished dataset and the state works out the same steps.
    keys = config(mixed, Path("unused"), *SMALL)
    loader = Loader(Dataset(mixed, "train"), keys, rank=0, world_size=1, state=state)
    digests = [batch.counts.digest_text for batch in loader.steps(0, STEPS)]
    assert digests == column(run, "sample_digest")
    assert len((run / FROZEN).read_text()) < 1_024


@pytest.fixture
def begun(mixed: Path, tmp_path: Path) -> tuple[PretrainConfig, Loader]:
    """A run on a growing dataset that has frozen two epochs, over 4 and 6 shards, and
    was killed before its first checkpoint.
    """
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    show(copy, whole, 4)
    keys = keys_of(tmp_path)
    keys.run.mkdir()
    (keys.run / CONFIG).write_text(to_yaml(keys))
    loader = Loader(Dataset(copy, "train", growing=True), keys, rank=0, world_size=1)
    show(copy, whole, 6)
    freeze_until(
        loader.order.undecided,
        loader=loader,
        world=ALONE,
        tell=None,
        keep=lambda: freezes.keep(loader, ALONE, None),
    )
    show(copy, whole, 9)
    return keys, loader


def keys_of(folder: Path, *more: str) -> PretrainConfig:
    words = (*SMALL, "--grow=true", *more)
    return config(folder / "copy", folder / "run", *words)


def covered(state: DataState) -> list[int]:
    return [entry.shards for entry in state.frozen[0]]


def test_a_run_that_begins_again_with_other_keys_or_data_freezes_anew(
    begun: tuple[PretrainConfig, Loader], mixed: Path, extra: Path, tmp_path: Path
) -> None:
    keys, loader = begun
    kept = check(keys).state
    assert (covered(kept), kept.decided) == ([4, 6], loader.order.undecided)
    for other in ("--seed=5", "--lanes=2", "--global_batch=16"):
        assert covered(check(keys_of(tmp_path, other)).state) == [9]
    assert covered(check(keys_of(tmp_path, f"--data={extra}")).state) == [4]
    # Fewer shards than were frozen are other data.
    show(tmp_path / "copy", growing_copy(mixed, tmp_path / "whole"), 5)
    assert covered(check(keys).state) == [5]


def test_a_checkpoint_takes_only_what_was_frozen_after_it(
    begun: tuple[PretrainConfig, Loader],
) -> None:
    keys, _ = begun
    known = freezes.read(keys.run, keys)
    assert known
    dataset = Dataset(keys.data, "train", growing=True)
    sources = sources_of(dataset, keys.mixture)
    early = dataclasses.replace(known, step=3, frozen=(known.frozen[0][:1],))
    found = freezes.restored(early, known, dataset, sources)
    assert (found.step, covered(found)) == (3, [4, 6])
    assert "decided" not in found.to_plain()
    late = dataclasses.replace(early, step=known.step + 1)
    other = dataclasses.replace(early, began=Began(step=2, epoch=1))
    (entry,) = early.frozen[0]
    fewer, repaired = (
        dataclasses.replace(early, frozen=((dataclasses.replace(entry, **changed),),))
        for changed in ({"shards": 3}, {"records": entry.records[:8] + "0" * 12})
    )
    # As after --changed_data continue, which the checkpoint does not know of.
    assert freezes.restored(repaired, known, dataset, sources).frozen == known.frozen
    # Back on the data of before: at the places that were frozen, while they are there.
    rows = [
        dataclasses.replace(row, records=row.records[:8] + "0" * 12)
        for row in known.frozen[0]
    ]
    trial = dataclasses.replace(known, frozen=(tuple(rows),))
    back = freezes.restored(early, trial, dataset, sources)
    assert (back.frozen, back.decided) == (known.frozen, known.step)
    rows[1] = dataclasses.replace(rows[1], shards=12)
    longer = dataclasses.replace(trial, frozen=(tuple(rows),))
    assert freezes.restored(early, longer, dataset, sources) == early
    for state in (late, other, fewer):
        assert freezes.restored(state, known, dataset, sources) == state
    # New data that the user allowed, at a place where the file has none.
    assert freezes.begun(other, known, dataset, sources) == other
    there = dataclasses.replace(known, began=other.began)
    assert covered(freezes.begun(other, there, dataset, sources)) == [4, 6]


def test_a_file_that_is_not_whole_names_its_cure(
    begun: tuple[PretrainConfig, Loader],
) -> None:
    keys, _ = begun
    file = keys.run / FROZEN
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=f"{FROZEN} of .* is damaged.*delete it"):
        check(keys)


def test_a_step_whose_epoch_is_not_frozen_is_shown_as_a_guess(
    begun: tuple[PretrainConfig, Loader],
    mixed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, loader = begun
    last = loader.order.undecided
    page = tmp_path / "step.html"
    for step, sure in ((last, True), (last + 1, False)):
        found = replayed(keys.run, step, f"--html={page}", "--pairs=1")
        assert found["provisional"] is not sure
        for shown in (capsys.readouterr().out, page.read_text()):
            assert ("not frozen yet and may take in more shards" in shown) is not sure
    # The next epoch takes in what is missing even where nothing more is written.
    whole = growing_copy(mixed, tmp_path / "whole")
    show(tmp_path / "copy", whole, len(whole.shards))
    assert replayed(keys.run, last + 1)["provisional"]
    # A run that has not begun takes what there is then.
    (keys.run / FROZEN).unlink()
    assert not replayed(keys.run, last + 1)["provisional"]
    show(tmp_path / "copy", whole, 9)
    assert replay([str(keys.run), "--step=1"]) == 0
    assert "not frozen yet" in capsys.readouterr().out
