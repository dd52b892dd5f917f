"""Configurations of runs on a test's cluster, and what is known of such runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.journal import Event, read_events
from cluster.store import Store
from tests.cluster.raylets import Raylets, wait_until
from tests.trainer.tiny import TINY

STEPS = 60
# fp32 sums in another order at another world size, which 60 steps of AdamW amplify.
TOLERANCE = 2e-2


def tiny_arguments(**more: Any) -> dict[str, Any]:
    """Keys of the tiny model, with a checkpoint every 5 of 60 steps; `__` in a name
    stands for a dot.
    """
    pairs = [word.removeprefix("--").split("=", 1) for word in TINY]
    found = {key: yaml.safe_load(value) for key, value in pairs if key != "config"}
    found |= {"schedule.steps": STEPS, "checkpoint.every_steps": 5}
    return found | {key.replace("__", "."): value for key, value in more.items()}


def write_config(
    path: Path, shards: Path, arguments: dict[str, Any], **stage: Any
) -> Path:
    """run.yaml of a run in a folder beside it that has its name; the trainer's run
    directory.
    """
    pretrain = {
        "config": "emoji",
        "arguments": arguments,
        "max_nodes": 2,
        "wait_seconds": 60,
        "settle_seconds": 5,
        "silent_seconds": 120,
        **stage,
    }
    output = path.with_suffix("")
    config = {"output": str(output), "data": str(shards), "pretrain": pretrain}
    path.write_text(yaml.safe_dump(config))
    return output / "pretrain"


def events(run: Path, kind: str) -> list[Event]:
    """Events of a kind of the run whose trainer's directory is given."""
    return [one for one in read_events(Store(str(run.parent))) if one.kind == kind]


def ends(run: Path) -> list[str]:
    """Why each attempt ended."""
    return [one.fields["cause"] for one in events(run, "attempt_ended")]


def world_sizes(run: Path) -> list[int]:
    """Ranks of each attempt."""
    return [one.fields["world_size"] for one in events(run, "attempt_started")]


def training(run: Path) -> list[psutil.Process]:
    """Guards, launchers and ranks of a run, on whatever node."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if f"--output={run}" in process.cmdline():
                found.append(process)
    return found


def wait_for_the_last(cluster: Raylets, run: Path) -> None:
    """Return when no process of a run is left. The driver kills its runners and does
    not wait until they have ended.
    """

    def left() -> list[psutil.Process]:
        return [*training(run), *cluster.runners()]

    wait_until(lambda: not left(), left)


def ranks(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The ranks among some processes of a run."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # The launcher's own have both words too, with others before them.
            if process.cmdline()[1:4] == ["-u", "-m", "trainer.pretrain"]:
                found.append(process)
    return found
