"""A real run: `python -m trainer.pretrain` on shards, and what its metrics say.

Owns the command and the summary. Does not own training, or the shards: they are made
where there is Ray, at 128 px so that they can be carried
(`benchmarks/gpu/README.md`).
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.batches import TINY_WORDS
from benchmarks.gpu.record import ROOT, Record, Setting
from benchmarks.gpu.training import has_deepspeed
from trainer.contract import read_metrics, read_validation

_WORDS = (
    "--config=mlim-base",
    "--image.size=128",
    "--global_batch=384",
    "--micro_batch=384",
    "--lanes=48",
    "--threads=12",
    "--schedule.steps=600",
    "--schedule.warmup=60",
    "--eval.every_steps=250",
    "--eval.max_pairs=1024",
)
_TINY_WORDS = (
    *TINY_WORDS,
    "--global_batch=12",
    "--micro_batch=12",
    "--lanes=12",
    "--schedule.steps=2",
    "--schedule.warmup=1",
    "--eval.every_steps=0",
)
# A process group of this process is none of the run's.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST = 20
"""Steps of a first call; a second one resumes."""
_SETTLED = 50
"""Steps after which speeds are taken: before, shapes are new."""


def real_run(setting: Setting, record: Record) -> None:
    """The run, if there are shards."""
    if setting.data is None:
        print("real_run | left out: give --data SHARDS")
        return
    record.measure("run", functools.partial(trained, setting, setting.data))


def trained(setting: Setting, data: str) -> dict[str, Any]:
    """Train, in two calls, and sum up `metrics.jsonl` and `validation.jsonl`.

    Raises:
        ValueError: there is no DeepSpeed, or training failed.
    """
    if not has_deepspeed():
        raise ValueError(
            "trainer.pretrain needs deepspeed: copy build/gpu-wheels (make gpu-wheels)"
        )
    words = (*(_TINY_WORDS if setting.tiny else _WORDS), "--log.tensorboard=false")
    run = Path(tempfile.mkdtemp(prefix="real-run-"))
    try:
        command = [*_pretrain(data), f"--output={run}", *words]
        _succeeds([*command, f"--max_steps={1 if setting.tiny else _FIRST}"])
        _succeeds(command)
        rows, seen = read_metrics(run), read_validation(run)
    finally:
        shutil.rmtree(run)
    shown = ["python", *_pretrain("SHARDS"), "--output=RUN", *words]
    return {"command": shlex.join(shown), **summary(rows, seen)}


def _succeeds(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in _OF_A_RANK},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"training failed: {done.stdout[-1500:]}")


def summary(rows: list[dict[str, Any]], seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds of the settled steps, and losses at the beginning and at the end."""
    settled = rows[min(_SETTLED, len(rows) // 2) :]
    seconds = sum(row["step_s"] for row in settled)
    found: dict[str, Any] = {
        "steps": rows[-1]["step"],
        "pairs_per_s": sum(row["pairs_per_s"] * row["step_s"] for row in settled)
        / seconds,
        "tokens_per_s": sum(row["tokens_per_s"] * row["step_s"] for row in settled)
        / seconds,
        "data_wait": sum(row["data_wait_frac"] * row["step_s"] for row in settled)
        / seconds,
        "padding": statistics.mean(row["padding_frac"] for row in settled),
        "peak_memory_gib": rows[-1]["peak_memory_gib"],
        "loss": [row["loss"] for row in rows],
        "validation": seen,
    }
    if "mfu" in settled[-1]:
        found["mfu"] = sum(row["mfu"] * row["step_s"] for row in settled) / seconds
    return found


def _pretrain(data: str) -> list[str]:
    return ["-m", "trainer.pretrain", f"--data={data}"]
