"""Checkpoints are written while training goes on, and survive a kill at any moment."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import deepspeed_command, launch_environment, python
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import LAUNCH_LIMIT_S, TINY, column, config, half_written
from trainer import checkpoint
from trainer.contract import COMPLETE, checkpoint_name, complete_checkpoints


def test_kills_while_a_checkpoint_is_written_leave_the_one_before(
    shards: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = (f"--data={shards}", "--checkpoint.every_steps=1")
    launch_all(2, [[*words, f"--output={whole}"]], tmp_path / "calls.json")
    found: dict[Path, int] = {}
    deadline = time.monotonic() + LAUNCH_LIMIT_S
    while not found:
        process = subprocess.Popen(
            deepspeed_command(2, *TINY, *words, f"--output={run}"),
            env=launch_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (half_written(run) and complete_checkpoints(run)):
            assert process.poll() is None, "no checkpoint was seen being written"
            assert time.monotonic() < deadline
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The marker may have come just before the kill.
        found = half_written(run)
    step = complete_checkpoints(run)[-1][0]
    printed = launch_all(2, [[*words, f"--output={run}"]], tmp_path / "calls.json")
    assert f"resuming after step {step}" in printed
    assert not any(path.exists() for path in found)
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(run, name) == column(whole, name)


def test_a_checkpoint_is_taken_whenever_the_minutes_are_over(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [f"--data={shards}", f"--output={run}", "--checkpoint.every_minutes=0"]
    more = ["--checkpoint.every_steps=999", "--checkpoint.keep=99", "--max_steps=5"]
    launch_all(2, [words + more], tmp_path / "calls.json")
    assert [step for step, _ in complete_checkpoints(run)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_its_reason(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    words = (*TINY, f"--data={shards}", f"--output={run}", "--checkpoint.every_steps=1")
    done = python("-m", "trainer.pretrain", *words, env=launch_environment())
    assert done.returncode == 1
    assert str(run / "checkpoints") in done.stdout
    assert "Traceback" not in done.stdout


def test_a_truncated_file_is_named_with_the_cure(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    part = tmp_path / checkpoint.part_name(0)
    key = checkpoint.piece_key("weight", "w", 0)
    save_file({key: torch.ones(4)}, part, metadata={"shapes": '{"w": [2, 2]}'})
    checkpoint.write_json(tmp_path / COMPLETE, {"world_size": 1})
    assert checkpoint.load_weights(tmp_path)["w"].tolist() == [[1, 1], [1, 1]]
    os.truncate(part, part.stat().st_size - 4)
    with pytest.raises(ValueError, match="delete it to continue"):
        checkpoint.load_weights(tmp_path)
    save_file({key: torch.ones(3)}, part, metadata={"shapes": '{"w": [2, 2]}'})
    with pytest.raises(ValueError, match="1 elements of w are missing"):
        checkpoint.load_weights(tmp_path)


def in_a_process(function: object, *arguments: object) -> None:
    """Call `function` in a process of its own, which may join a process group."""
    process = multiprocessing.get_context("spawn").Process(
        target=function,  # type: ignore[arg-type]
        args=arguments,
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def step_and_save(run: Path, stage: int) -> None:
    """Four steps of a small network, a checkpoint after each, and back to the best."""
    from trainer.engine import apply_step, build_engine, start_world
    from trainer.saving import Checkpoints

    world = start_world()
    words = (f"--deepspeed.zero_stage={stage}", "--micro_batch=24")
    keys = config(Path("data"), run, *words, "--checkpoint.keep=1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.LayerNorm(300))
    engine = build_engine(model, keys, world=world, micro_batch=24)

    def step() -> float:
        loss = engine(torch.ones(1, 400)).square().sum()
        engine.backward(loss)
        apply_step(engine, lr=0.01, clip=1.0)
        return float(loss)

    losses = []
    with Checkpoints(run, keys.checkpoint, world) as checkpoints:
        for number, val_loss in enumerate((math.nan, 1.0, 2.0, 4.0), 1):
            losses.append(step())
            assert checkpoints.is_best(val_loss) == (number == 2)
            checkpoints.save(engine, {"step": number}, val_loss=val_loss)
    assert [number for number, _ in complete_checkpoints(run)] == [2, 4]
    found = checkpoint.best(run)
    assert found
    assert found[0].name == checkpoint_name(2)
    # In the same engine, in mid-run.
    checkpoint.load(engine, found[0])
    assert [step(), step()] == losses[2:]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_best_is_kept_beside_the_newest_and_can_be_gone_back_to(
    tmp_path: Path, stage: int
) -> None:
    in_a_process(step_and_save, tmp_path, stage)
