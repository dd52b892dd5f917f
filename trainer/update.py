"""One update of the weights: judged, then taken or dropped, or taken back.

Owns the order of these. Does not own the judgement (`trainer.safety`), the optimizer
step (`trainer.engine`) or the weights to go back to (`trainer.roll_back`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.engine import World, apply_step, learning_rate
from trainer.loader import Counts
from trainer.options import PretrainConfig
from trainer.remote_checkpoints import RemoteCheckpoints
from trainer.roll_back import RollBack
from trainer.safety import Guard, losses_over_ranks
from trainer.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What has become of a step's gradients."""

    row: dict[str, Any]
    """Metrics: `lr`, `grad_norm` (of a dropped step too; infinite where it is not
    finite), `skipped` (0 or 1) and, where it was, `rolled_back_to` (a step)."""
    note: str | None
    """What to tell, if anything."""


class Updates:
    """Updates of one run on one rank; all ranks do the same.

    Args:
        stored: what `Guard.to_plain` gave, of the checkpoint that is resumed.
        remote: where roll-back points go, of a run behind a URL.
    """

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        stored: Mapping[str, Any] | None,
        *,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        self._config, self._world = config, world
        self.guard = Guard(config.safety, config.output, stored)
        self._points = RollBack(config.run, config.safety, world, remote)

    def update(
        self,
        engine: Any,
        sums: Sequence[float],
        totals: Counts,
        *,
        step: int,
        watch: Watchdog,
    ) -> Updated:
        """The update of the step numbered `step` from 0, whose last backward is done.

        Args:
            sums: this rank's, the model's terms first.

        Raises:
            ValueError: the run is to stop, or cannot go back. The weights are those
                of before the step.
        """
        config = self._config
        watch.at("all-reduce of losses")
        ruling = self.guard.before_update(
            losses_over_ranks(sums, config.model.terms, totals, self._world)
        )
        watch.at("optimizer step")
        lr = learning_rate(step, config.optimizer, config.schedule)
        norm = apply_step(engine, lr=lr, clip=config.optimizer.clip, take=ruling.apply)
        row: dict[str, Any] = {"lr": lr, "grad_norm": norm}
        try:
            outcome = self.guard.after_update(
                ruling, norm, step=step + 1, digest=totals.digest_text
            )
        except ValueError as error:
            self._world.stop(error)
        row["skipped"] = int(not outcome.applied)
        if outcome.roll_back:
            watch.at("roll back")
            row["rolled_back_to"] = self._points.restore(engine, step)
        return Updated(row=row, note=outcome.note)

    def point_due(self, step: int) -> bool:
        """Is there to be a roll-back point after `step` steps? Then the checkpoints
        before it must be complete.
        """
        return self._points.due(step)

    def save_point(self, engine: Any, step: int) -> None:
        """Take a roll-back point, if one is due; a checkpoint must follow."""
        if self._points.due(step):
            self._points.keep(engine, step)
