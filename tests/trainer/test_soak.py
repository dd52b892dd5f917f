"""The full count of kills (`make soak`); `test_pretrain.py` and `test_saving.py` hold a
few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import deepspeed_command, launch_environment
from tests.trainer.tiny import TINY, column, half_written
from trainer.contract import complete_checkpoints, read_metrics

KILLS = 20
# Of these, so many wait for a checkpoint's first byte.
AIMED = 9
FEWEST_INSIDE, FEWEST_DISTINCT = 5, 10
STEPS = 500
FEWEST_STEPS, MOST_STEPS = 5, 20
LATEST_S = 0.3
LIMIT_S = 240

pytestmark = pytest.mark.soak


def command(shards: Path, run: Path) -> list[str]:
    longer = (f"--schedule.steps={STEPS}", "--checkpoint.every_steps=4")
    return deepspeed_command(2, *TINY, *longer, f"--data={shards}", f"--output={run}")


def to_its_end(shards: Path, run: Path) -> None:
    subprocess.run(
        command(shards, run),
        check=True,
        env=launch_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def newest_step(run: Path) -> int:
    found = complete_checkpoints(run)
    return found[-1][0] if found else 0


def steps_taken(run: Path) -> int:
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0


def kill_once(shards: Path, run: Path, *, when: Callable[[], bool], late: float) -> int:
    """Start the run, SIGKILL all of it `late` seconds after `when()`; the step that it
    was found to have taken.
    """
    process = subprocess.Popen(
        command(shards, run),
        env=launch_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + LIMIT_S
    while not when():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(late)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return steps_taken(run)


def test_a_run_killed_at_random_moments_has_the_losses_of_an_undisturbed_one(
    shards: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    to_its_end(shards, whole)
    moments = random.Random(0)
    aims = [number < AIMED for number in range(KILLS)]
    moments.shuffle(aims)
    resumed_from, inside = [], 0
    for number, aimed in enumerate(aims, 1):
        before = set(half_written(run))
        goal = newest_step(run) + moments.randint(FEWEST_STEPS, MOST_STEPS)

        def far(goal: int = goal) -> bool:
            return steps_taken(run) >= goal

        def writing(goal: int = goal, before: set[Path] = before) -> bool:
            return bool(half_written(run).keys() - before) and far(goal)

        late = 0.0 if aimed else moments.uniform(0, LATEST_S)
        taken = kill_once(shards, run, when=writing if aimed else far, late=late)
        torn = {p.name: size for p, size in half_written(run).items()}
        inside += bool(torn.keys() - {path.name for path in before})
        resumed_from.append(newest_step(run))
        print(
            f"kill {number}: after step {taken}; newest complete checkpoint: step "
            f"{resumed_from[-1]}; without a marker (bytes): {torn or 'none'}"
        )
    assert resumed_from == sorted(resumed_from)
    assert len(set(resumed_from)) >= FEWEST_DISTINCT, "too few distinct checkpoints"
    assert inside >= FEWEST_INSIDE, "too few kills fell into a checkpoint's writing"
    to_its_end(shards, run)
    assert not half_written(run)
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)
