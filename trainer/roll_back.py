"""Weights to go back to after a spike.

Owns the roll-back points of a run, RUN/roll_back, and going back to one. Does not own
when that is done (`trainer.safety`) or how weights are stored (`trainer.checkpoint`).

Going back changes weights and optimizer only: steps are counted on, so the data of the
steps since the point, the spike's included, is not seen again, and step number, sample
order and learning rate stay functions of each other. Points are taken at multiples of
`safety.roll_back_steps` and kept apart from the checkpoints: when those are taken, and
how many are kept, may depend on a clock or change between calls, and the weights that a
run ends with must not (law 1).

Killed at any moment, the run goes on from a checkpoint that is not older than the
second-newest point, because a checkpoint is taken with each point; so two are enough.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.contract import CHECKPOINTS, complete_checkpoints
from trainer.engine import World
from trainer.options import CheckpointConfig, SafetyConfig
from trainer.remote_checkpoints import RemoteCheckpoints
from trainer.saving import Checkpoints

FOLDER = "roll_back"
_KEEP = 2


class RollBack:
    """Points of one run, which has none unless `safety.spike_action` is roll_back.

    Args:
        run: run directory, or this node's working copy of it.
        remote: where the points go of a run behind a URL.
    """

    def __init__(
        self,
        run: Path,
        config: SafetyConfig,
        world: World,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        self._folder, self._world, self._remote = run / FOLDER, world, remote
        self._every = (
            config.roll_back_steps if config.spike_action == "roll_back" else 0
        )
        if self._every and remote:
            world.together(lambda: remote.tidy(clear=world.first))
        elif self._every and world.first:
            checkpoint.discard_unfinished(self._folder)
        keep = CheckpointConfig(keep=_KEEP, keep_best=False)
        self._checkpoints = Checkpoints(self._folder, keep, world, remote)

    def due(self, step: int) -> bool:
        """Whether there is to be a point after `step` steps."""
        return self._every > 0 and step % self._every == 0

    def keep(self, engine: Any, step: int) -> None:
        """Take a point after `step` steps. A checkpoint must follow."""
        if self._world.first:
            # Of a part of the run that was given up: they would outlive this one.
            for at, path in complete_checkpoints(self._folder):
                if at > step:
                    self._checkpoints.delete(path)
        self._checkpoints.save(engine, {"step": step})
        self._checkpoints.wait()

    def restore(self, engine: Any, step: int) -> int:
        """Weights and optimizer of the newest point at or before `step`; its step.

        Raises:
            ValueError: there is none.
        """
        found = [one for one in complete_checkpoints(self._folder) if one[0] <= step]
        at, path = self._world.broadcast(found[-1] if found else (0, None))
        if path is None:
            self._world.stop(
                ValueError(
                    f"{self._folder} holds no point at or before step {step} to go "
                    "back to: put back what was deleted there, or start anew in "
                    "another --output"
                )
            )
        # A working copy of another node may lie elsewhere.
        path = self._folder / CHECKPOINTS / path.name
        if self._remote:
            self._world.together(functools.partial(self._remote.bring, path))
        self._world.together(lambda: checkpoint.Stored(path))
        checkpoint.load(engine, path)
        return int(at)
