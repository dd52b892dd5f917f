"""The full count of kills (`make soak`); `test_pretrain.py` holds a few."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import deepspeed_command, launch_environment
from tests.trainer.tiny import TINY, column
from trainer.contract import complete_checkpoints, read_metrics

KILLS = 8
STEPS = 400
FEWEST_STEPS, MOST_STEPS = 5, 45
LATEST_S = 0.3
LIMIT_S = 240

pytestmark = pytest.mark.soak


def command(shards: Path, run: Path) -> list[str]:
    longer = (f"--schedule.steps={STEPS}", "--checkpoint.every_steps=8")
    return deepspeed_command(2, *TINY, *longer, f"--data={shards}", f"--output={run}")


def newest_step(run: Path) -> int:
    found = complete_checkpoints(run)
    return found[-1][0] if found else 0


def steps_taken(run: Path) -> int:
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0


def test_a_run_killed_at_random_moments_has_the_losses_of_an_undisturbed_one(
    shards: Path, tmp_path: Path
) -> None:
    options = {"env": launch_environment(), "stdout": subprocess.DEVNULL}
    whole, run = tmp_path / "whole", tmp_path / "run"
    subprocess.run(
        command(shards, whole), check=True, stderr=subprocess.DEVNULL, **options
    )
    moments, resumed_from = random.Random(0), []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(shards, run),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        goal = newest_step(run) + moments.randint(FEWEST_STEPS, MOST_STEPS)
        deadline = time.monotonic() + LIMIT_S
        while steps_taken(run) < goal:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moments.uniform(0, LATEST_S))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resumed_from.append(newest_step(run))
        print(
            f"killed after step {steps_taken(run)}; "
            f"newest complete checkpoint: step {resumed_from[-1]}"
        )
    assert resumed_from == sorted(resumed_from)
    assert len(set(resumed_from)) > KILLS // 2, "too few distinct checkpoints"
    subprocess.run(
        command(shards, run), check=True, stderr=subprocess.DEVNULL, **options
    )
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)
