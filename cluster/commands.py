"""The commands that stages start: their words, and what they make of their keys.

Owns how run.yaml becomes the command lines of `pipeline.preprocess`,
`trainer.pretrain`, `trainer.evaluate` and `trainer.report`. Does not own their keys:
each command checks its own, and is asked here before any node starts.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.options import EvaluateStage, PreprocessStage, PretrainStage, flags

PREPROCESS = "pipeline.preprocess"
PRETRAIN = "trainer.pretrain"
EVALUATE = "trainer.evaluate"
REPORT = "trainer.report"
_SECONDS = 300.0


def preprocess_words(stage: PreprocessStage, *, output: str) -> list[str]:
    """Arguments of `python -m pipeline.preprocess`."""
    config = [f"--config={stage.config}"] if stage.config else []
    return [*config, *flags(stage.arguments), f"--output={output}"]


def pretrain_words(
    stage: PretrainStage, *, data: str, output: str, grow: bool = False
) -> list[str]:
    """Arguments of `trainer.pretrain`."""
    words = [f"--config={stage.config}", *flags(stage.arguments)]
    words += [f"--data={data}", f"--output={output}"]
    return [*words, "--grow=true"] if grow else words


def evaluate_words(stage: EvaluateStage, *, run: str, data: str) -> list[str]:
    """Arguments of `python -m trainer.evaluate`."""
    return [run, *flags(stage.arguments), f"--data={data}"]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """What of a trainer's configuration decides at how many ranks it may run."""

    lanes: int
    global_batch: int
    group: int
    """Pairs that must stay on one rank."""
    steps: int
    """Length of its schedule, or the earlier step that it is to stop at."""
    stops_early: bool
    """It is to stop before its schedule ends, so no completion marker is written."""


def lanes_of(config: Mapping[str, Any]) -> Lanes:
    """Lanes of the trainer's resolved configuration."""
    model, schedule = config["model"], config["schedule"]["steps"]
    limit = config["max_steps"]
    return Lanes(
        lanes=config["lanes"],
        global_batch=config["global_batch"],
        group=model["itm_group"] if model["itm_weight"] else 1,
        steps=min(schedule, limit) if limit is not None else schedule,
        stops_early=limit is not None and limit < schedule,
    )


def resolved(module: str, words: Sequence[str]) -> dict[str, Any]:
    """The checked configuration that a command makes of its arguments.

    Raises:
        ValueError: what the command says of them.
    """
    found: dict[str, Any] = yaml.safe_load(printed(module, [*words, "--print_config"]))
    return found


def printed(module: str, words: Sequence[str]) -> str:
    """What a command prints, run here.

    Raises:
        ValueError: what the command says against its arguments, or it takes too long.
    """
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{module} has not answered for {_SECONDS:g} s: run it by hand, with the "
            "same keys, to see why"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = lines[-1].partition(": error: ")
        raise ValueError(f"{module}: {said[2] or said[0]}")
    return done.stdout


def trainer_config(stage: PretrainStage, *, data: str, output: str) -> dict[str, Any]:
    """The trainer's resolved configuration.

    Raises:
        ValueError: an unknown recipe or key, or a value that the trainer refuses.
    """
    return resolved(PRETRAIN, pretrain_words(stage, data=data, output=output))


@contextlib.contextmanager
def config_file(content: bytes) -> Iterator[Path]:
    """A file with a configuration, for as long as it is needed."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)
