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
from trainer.contract import complete_checkpoints

KILLS = 8
STEPS = 1500
SHORTEST_LIFE_S, LONGEST_LIFE_S = 6.0, 12.0

pytestmark = pytest.mark.soak


def command(shards: Path, run: Path) -> list[str]:
    longer = (f"--schedule.steps={STEPS}", "--checkpoint.every_steps=25")
    return deepspeed_command(2, *TINY, *longer, f"--data={shards}", f"--output={run}")


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
        # From before the first step to well into the run.
        time.sleep(moments.uniform(SHORTEST_LIFE_S, LONGEST_LIFE_S))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = complete_checkpoints(run)
        resumed_from.append(found[-1][0] if found else 0)
        print(f"killed; newest complete checkpoint: step {resumed_from[-1]}")
        if (run / "complete.json").exists():
            break
    assert resumed_from == sorted(resumed_from)
    assert len(set(resumed_from)) > 2, "the kills came too early to show anything"
    subprocess.run(
        command(shards, run), check=True, stderr=subprocess.DEVNULL, **options
    )
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)
