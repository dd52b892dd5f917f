"""A model so small that a launch costs more than its steps, on the shared dataset."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.conftest import ROOT, deepspeed_command, free_port, launch_environment
from trainer.contract import CHECKPOINTS, COMPLETE
from trainer.models.mlim_config import MlimConfig
from trainer.options import PretrainConfig, parse_run
from trainer.order import Drawn, SampleOrder

# Small, where no run is needed.
SMALL_MLIM = MlimConfig(
    layers=2,
    width=32,
    heads=2,
    ffn_width=64,
    embedder_widths=(8, 8),
    embedder_hidden=8,
    decoder_widths=(8, 8, 8),
)
# Of one launch, on a machine with much else to do.
LAUNCH_LIMIT_S = 480
FAULTS = Path(__file__).with_name("faults.py")
_ALIKE = (
    "--image.size=16",
    "--image.geometry=random_resized_crop",
    "--model.width=32",
    "--model.heads=2",
    "--model.ffn_width=64",
    "--lanes=12",
    "--global_batch=24",
    "--micro_batch=6",
    "--shuffle_shards=2",
    "--schedule.steps=12",
    "--schedule.warmup=3",
    "--log.tensorboard=false",
    "--digest=full",
)
TINY = (
    "--config=emoji",
    "--model.layers=2",
    "--model.embedder_widths=[8,8]",
    "--model.embedder_hidden=8",
    "--model.decoder_widths=[8,8,8]",
    *_ALIKE,
)
TINY_MASKVLM = (
    "--config=maskvlm-emoji",
    "--model.image_layers=1",
    "--model.text_layers=1",
    "--model.patch_size=4",
    "--model.cross_layers=2",
    "--model.decoder_layers=1",
    "--model.projection_width=16",
    "--model.itm_group=3",
    "--eval.every_steps=0",
    *_ALIKE,
)


def config(
    shards: Path | str, output: Path, *more: str, tiny: Sequence[str] = TINY
) -> PretrainConfig:
    """The tiny configuration as `trainer.pretrain` would build it."""
    from trainer.pretrain import RECIPES

    words = [*tiny, f"--data={shards}", f"--output={output}", *more]
    return parse_run(PretrainConfig, words, prog="", description="", recipes=RECIPES)


def steps_per_epoch(order: SampleOrder) -> int:
    """Steps of the first epoch of a run with one source."""
    found = order.epoch_steps(0)
    assert found
    return found[1]


def paced(
    folder: Path, seconds: float, *, batches: int | None = None
) -> dict[str, str]:
    """Environment of a launch each of whose steps lasts at least so long: a run that is
    to be hit after some steps is not at its end when a busy test comes to it.

    Args:
        batches: a rank takes so many and waits for the next one, until there is another
            pace in the file PACE.
    """
    pace = folder / f"pace-{seconds}"
    pace.write_text(str(seconds) if batches is None else f"{seconds} {batches}")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'cluster' / 'paced'}"
    return launch_environment() | {"PACE": str(pace), "PYTHONPATH": path}


def again(order: SampleOrder) -> SampleOrder:
    """The same order, that has worked out nothing yet."""
    return SampleOrder(
        order.sources,
        seed=order.seed,
        lanes=order.lanes,
        global_batch=order.lanes * order.per_lane,
        shuffle_shards=order.shuffle_shards,
    )


def same_drawn(whole: Drawn, parts: Sequence[Drawn]) -> None:
    """Assert that some draws, one after the other, are those of `whole`."""
    for name in ("places", "sources", "epochs", "positions", "lanes"):
        together = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(together, getattr(whole, name))


def damaged_copy(shards: Path, copy: Path, split: str) -> str:
    """Copy a dataset and flip a bit in the first image of a split; its uid."""
    shutil.copytree(shards, copy)
    tar = copy / split / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    record = np.load(tar.with_suffix(".index.npy"))[0]
    content[int(record["jpg_offset"]) + 30] ^= 4
    tar.write_bytes(content)
    return f"{int(record['uid']):016x}"


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics; fails on a torn one."""
    return [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def steps_taken(run: Path) -> int:
    """Steps that a run, which may be going on, has written down."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_written(run: Path) -> dict[Path, int]:
    """Checkpoints with data and no marker, and their bytes of data."""
    found = {}
    for path in (run / CHECKPOINTS).glob("tmp-*"):
        # It may get its final name while we look.
        with contextlib.suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            if size and not (path / COMPLETE).exists() and path.exists():
                found[path] = size
    return found


def wait_until(
    reached: Callable[[], bool],
    process: subprocess.Popen[Any],
    said: Callable[[], str] = str,
) -> None:
    """Wait for something that a process does; fails with what it `said` if it ends
    before.
    """
    deadline = time.monotonic() + LAUNCH_LIMIT_S
    while not reached():
        # It may have come to it and to its end since the last look.
        assert process.poll() is None or reached(), said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def kill_group(launcher: subprocess.Popen[Any]) -> None:
    """SIGKILL to all processes of a launcher that leads its group, if any are left, and
    wait until none runs.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_for_group(launcher.pid)


def wait_for_group(group: int) -> None:
    """Wait until no process of a group runs: the launcher ends before its ranks."""

    def running(process: psutil.Process) -> bool:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and os.getpgid(process.pid) == group
        return False

    deadline = time.monotonic() + LAUNCH_LIMIT_S
    while any(running(process) for process in psutil.process_iter()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def column(run: Path, name: str) -> list[Any]:
    """One metric over all steps."""
    return [row[name] for row in metrics(run)]


def launch(ranks: int, *words: str | Path) -> str:
    """Run the launcher to its end; its output. It must succeed."""
    return succeeds(deepspeed_command(ranks, *TINY, *words))


def succeeds(command: Sequence[str]) -> str:
    """Run a launcher's command to its end; its output. It must succeed."""
    done = subprocess.run(
        command,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def with_faults(
    ranks: int, spec: dict[str, Any], *words: str | Path
) -> subprocess.CompletedProcess[str]:
    """The tiny run with faults; on one rank without the launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command: list[str | Path] = [sys.executable]
    if ranks > 1:
        command = [launcher, "--num_accelerators", str(ranks)]
        command += ["--master_port", str(free_port())]
    return subprocess.run(
        [*command, FAULTS, json.dumps(spec), *TINY, *words],
        cwd=ROOT,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
