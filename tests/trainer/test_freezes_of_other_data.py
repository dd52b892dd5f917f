"""A start on other data that comes to no checkpoint is told from the run's own data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.trainer.datasets import growing_copy, repaired, show
from tests.trainer.test_elastic import launch_and_kill
from tests.trainer.test_replay import replayed
from tests.trainer.tiny import column, config, launch
from trainer.check import check
from trainer.contract import FROZEN, complete_checkpoints
from trainer.data_state import DataState
from trainer.options import PretrainConfig

SMALL = (
    *("--lanes=4", "--global_batch=8", "--micro_batch=8", "--mixture=none"),
    *("--schedule.steps=60", "--checkpoint.every_steps=50"),
)
FAST = ("--model.layers=1", "--deepspeed.zero_stage=0")
TAKEN = 3


@pytest.fixture(scope="module")
def young(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 3."""
    run = tmp_path_factory.mktemp("young") / "run"
    launch(1, *SMALL, *FAST, f"--data={mixed}", f"--output={run}", "--max_steps=3")
    return run


@pytest.fixture
def run(young: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(young, tmp_path / "run"))


def killed_on(data: Path, run: Path, changed: str) -> None:
    """Start on other data, and kill that before a checkpoint."""
    words = (*SMALL, *FAST, f"--data={data}", f"--changed_data={changed}")
    launch_and_kill(1, TAKEN + 3, run, *words, f"--output={run}")
    assert [step for step, _ in complete_checkpoints(run)] == [TAKEN]


def keys_of(data: Path, run: Path, *more: str) -> PretrainConfig:
    # As the launched run has them.
    return config(data, run, *SMALL, *FAST, *more)


def marked(run: Path) -> DataState:
    ((_, path),) = complete_checkpoints(run)
    return DataState.from_plain(json.loads((path / "complete.json").read_text()))


def test_after_a_trial_of_a_repaired_dataset_both_go_on(
    mixed: Path, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "repaired"
    whole = growing_copy(mixed, copy)
    first, *others = repaired(whole).shards
    show(copy, repaired(whole), len(whole.shards))
    killed_on(copy, run, "continue")
    back = check(keys_of(mixed, run)).state
    assert back.frozen == marked(run).frozen
    on = check(keys_of(copy, run)).state
    assert on.frozen != back.frozen
    assert on.decided > on.step == TAKEN
    # Neither of them: what was taken last says which data it wants.
    third = (dataclasses.replace(first, sha256=whole.shards[1].sha256), *others)
    show(copy, dataclasses.replace(whole, shards=third), len(third))
    with pytest.raises(ValueError, match="not those of before") as refused:
        check(keys_of(copy, run))
    assert f"before {on.manifest_hash})" in str(refused.value)
    assert FROZEN not in str(refused.value)
    launch(1, *SMALL, *FAST, f"--data={mixed}", f"--output={run}", "--max_steps=5")
    assert replayed(run, 5)["matches"]


def test_steps_after_a_killed_start_on_other_data_are_replayed_with_it(
    mixed: Path, extra: Path, run: Path
) -> None:
    killed_on(extra, run, "new_epoch")
    assert column(run, "epoch")[TAKEN - 1 : TAKEN + 2] == [0, 1, 1]
    for step in (TAKEN + 1, TAKEN + 3):
        assert replayed(run, step)["matches"]
    assert replayed(run, TAKEN, f"--data={mixed}")["matches"]
    with pytest.raises(ValueError, match="has 4 shards of 11"):
        replayed(run, TAKEN)
    with pytest.raises(ValueError, match="not those of before"):
        replayed(run, TAKEN + 1, f"--data={mixed}")


def test_shards_lost_after_the_checkpoint_are_refused_with_both_cures(
    mixed: Path, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    # As if the run had frozen one more shard than there is now.
    state = marked(run)
    (entry,) = state.frozen[0]
    more = dataclasses.replace(entry, first=30, shards=entry.shards + 1)
    later = dataclasses.replace(state, step=60, frozen=((entry, more),))
    counted_by = {"lanes": 4, "global_batch": 8}
    (run / FROZEN).write_text(json.dumps(counted_by | later.to_plain()))
    show(copy, whole, len(whole.shards))
    assert replayed(run, TAKEN, f"--data={copy}")["matches"]
    with pytest.raises(ValueError, match="has 11 shards of 12") as refused:
        check(keys_of(copy, run))
    told = f"or delete {FROZEN} in {run}: steps after the newest checkpoint, of step 3"
    assert "Give the old dataset" in str(refused.value)
    assert told in str(refused.value)
    (run / FROZEN).unlink()
    assert check(keys_of(copy, run)).state == state


def test_epochs_that_are_frozen_anew_are_told_of(
    mixed: Path, run: Path, tmp_path: Path
) -> None:
    """Where no checkpoint says which data the run was on, no start is refused."""
    shutil.rmtree(run / "checkpoints")
    copy = tmp_path / "copy"
    whole = growing_copy(mixed, copy)
    words = (*SMALL, *FAST, f"--output={run}", "--grow=true", "--max_steps=1")
    show(copy, whole, 5)
    torn, notes = run / "tmp-00000000-frozen.json", run / "tmp-notes.md"
    for path in (torn, notes):
        path.write_text("{")
    told = launch(1, *words, f"--data={copy}")
    assert f"{FROZEN} in {run} is of other data than this (source '*' has 5" in told
    assert notes.exists()
    assert not torn.exists()
