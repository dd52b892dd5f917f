"""Trackers that a run is followed in besides its own files: TensorBoard and W&B.

Owns how each is opened, told and resumed. Does not own what they are told
(`trainer.metrics`).
"""

from __future__ import annotations

import importlib.util
import json
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.files import write_text

WANDB = "wandb.json"


class Tracker(Protocol):
    """Where metrics of steps and pictures go."""

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Take the numbers of a step, `row["step"]`."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Take a PNG file."""

    def close(self) -> None:
        """Write down everything taken."""


class TensorBoard:
    """Events in RUN/tensorboard. Those of later steps than `first_step` are hidden."""

    def __init__(self, run: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run / "tensorboard")
        self._events = SummaryWriter(folder, purge_step=first_step + 1)

    def scalars(self, row: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        for name, value in row.items():
            if isinstance(value, float):
                self._events.add_scalar(name, value, row["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """As `Tracker`."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """As `Tracker`."""
        self._events.close()


class Wandb:
    """A run of Weights & Biases. RUN/wandb.json holds its id, under which a later call
    goes on; steps that are taken again after a kill stand in it twice.

    Raises:
        ValueError: the service or the login failed.
    """

    def __init__(self, run: Path, *, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        name = wandb_id(run, project)
        try:
            self._run = wandb.init(
                project=project,
                id=name,
                name=run.resolve().name,
                dir=str(run),
                config=dict(config),
                resume="allow",
            )
        except (wandb.errors.Error, OSError) as error:
            raise ValueError(
                f"Weights & Biases could not be reached ({error}): run `wandb login`, "
                "set WANDB_MODE=offline, or leave out log.wandb"
            ) from error
        # Its own count of calls would have to grow; a resumed step may be an old one.
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def scalars(self, row: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        numbers = {
            name: value for name, value in row.items() if isinstance(value, int | float)
        }
        self._run.log(numbers)

    def picture(self, name: str, path: Path, step: int) -> None:
        """As `Tracker`."""
        self._run.log({"step": step, name: self._image(str(path))})

    def close(self) -> None:
        """As `Tracker`."""
        self._run.finish()


def trackers(
    run: Path,
    *,
    first_step: int,
    tensorboard: bool,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The trackers that a run asks for and that are installed.

    Args:
        first_step: steps already taken.
        wandb: project of Weights & Biases, if it is asked for.
        config: the run's keys, to be shown there.
    """
    found: list[Tracker] = []
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        warnings.warn(
            "tensorboard is not installed: no events are written "
            "(pip install tensorboard, or log.tensorboard: false)",
            stacklevel=2,
        )
    elif tensorboard:
        found.append(TensorBoard(run, first_step=first_step))
    if wandb:
        found.append(Wandb(run, project=wandb, config=config or {}))
    return found


def check_installed(project: str | None) -> None:
    """Raise ValueError if Weights & Biases is asked for and cannot be imported."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb asks for the project {project!r}, and wandb is not installed: "
            "pip install wandb, or leave out log.wandb"
        )


def wandb_id(run: Path, project: str) -> str:
    """The id of a run in a project, kept in RUN/wandb.json from its first call on."""
    path = run / WANDB
    if path.is_file():
        known: dict[str, str] = json.loads(path.read_text())
        if known["project"] == project:
            return known["id"]
    made = uuid.uuid4().hex[:12]
    write_text(path, json.dumps({"project": project, "id": made}) + "\n")
    return made
