"""One update of the weights: judged, then taken or dropped, or taken back.

Owns the order of these, and when the host reads what a step came to: once, after all
of its work is queued, wherever the update does not depend on more than the device knows
itself. Does not own the judgement (`trainer.safety`), the optimizer step
(`trainer.engine`) or the weights to go back to (`trainer.roll_back`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.engine import (
    World,
    apply_step,
    apply_step_on_device,
    decides_on_device,
    learning_rate,
)
from trainer.loader import Counts
from trainer.options import PretrainConfig
from trainer.remote_checkpoints import RemoteCheckpoints
from trainer.roll_back import RollBack
from trainer.safety import Guard, Ruling, losses_over_ranks
from trainer.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What has become of a step's gradients."""

    row: dict[str, Any]
    """Metrics: `lr`, `grad_norm` (of a dropped step too; infinite where it is not
    finite), `skipped` (0 or 1) and, where it was, `rolled_back_to` (a step)."""
    note: str | None
    """What to tell, if anything."""
    sums: list[float]
    """This rank's sums, on the host."""


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
        sums: Tensor,
        totals: Counts,
        *,
        step: int,
        watch: Watchdog,
    ) -> Updated:
        """The update of the step numbered `step` from 0, whose last backward is done.

        Args:
            sums: this rank's, on its device, the model's terms first.

        Raises:
            ValueError: the run is to stop, or cannot go back. The weights are those
                of before the step.
        """
        config = self._config
        lr = learning_rate(step, config.optimizer, config.schedule)
        # Only the host knows a spike, and it must before the update is taken.
        if config.safety.spike_action == "log" and decides_on_device(engine):
            watch.at("optimizer step")
            terms = len(config.model.terms)
            found, norm = step_and_read(engine, sums, terms, self._world, lr=lr)
            ruling = self._ruling(found, totals, watch)
        else:
            found = sums.tolist()
            ruling = self._ruling(found, totals, watch)
            watch.at("optimizer step")
            clip = config.optimizer.clip
            norm = apply_step(engine, lr=lr, clip=clip, take=ruling.apply)
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
        return Updated(row=row, note=outcome.note, sums=found)

    def _ruling(self, sums: list[float], totals: Counts, watch: Watchdog) -> Ruling:
        watch.at("all-reduce of losses")
        terms = self._config.model.terms
        return self.guard.before_update(
            losses_over_ranks(sums, terms, totals, self._world)
        )

    def point_due(self, step: int) -> bool:
        """Is there to be a roll-back point after `step` steps? Then the checkpoints
        before it must be complete.
        """
        return self._points.due(step)

    def save_point(self, engine: Any, step: int) -> None:
        """Take a roll-back point, if one is due; a checkpoint must follow."""
        if self._points.due(step):
            self._points.keep(engine, step)


def step_and_read(
    engine: Any, sums: Tensor, terms: int, world: World, *, lr: float
) -> tuple[list[float], float]:
    """Take the optimizer step, unless a loss of any rank or the gradient norm is not
    finite: the device decides (`trainer.engine.decides_on_device`). Then a rank's sums
    and the norm before clipping, infinite where it is not finite: the one time in a
    step that the host waits for the device, which has all of the step's work by then.

    Args:
        sums: this rank's, on its device, `terms` losses first.
    """
    bad = world.sum((~sums[:terms].isfinite()).sum().float())
    norm = apply_step_on_device(engine, lr=lr, unwanted=bad)
    *found, grad_norm = torch.cat([sums, norm.reshape(1).to(sums)]).tolist()
    return found, grad_norm
