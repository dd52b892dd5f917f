"""One update of the weights: judged, then taken or dropped, or taken back.

Owns the order of these, and how the host learns what a step came to: where the update
does not depend on more than the device knows itself, from a copy that is made behind
the step's work and may be waited for when the device has work of the next one. Does not
own when that is (`trainer.loop`), the judgement (`trainer.safety`), the optimizer step
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


class Result:
    """What a step came to, on its way to the host.

    Args:
        sums: this rank's, on its device.
        norm: of the gradients, one number there.
    """

    def __init__(self, sums: Tensor, norm: Tensor) -> None:
        values = torch.cat([sums, norm.reshape(1).to(sums)])
        self._values, self._arrived = values, None
        if values.is_cuda:
            # Only into pinned memory does a copy not make the host wait.
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> tuple[list[float], float]:
        """The sums and the norm. The one time in a step that the host waits for the
        device, and for no work that was queued after the step's.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        *sums, norm = self._values.tolist()
        return sums, norm


@dataclass(frozen=True, kw_only=True)
class Taken:
    """An update that the device takes or drops by itself, or that the host has taken or
    dropped.
    """

    step: int
    """Steps with it."""
    lr: float
    totals: Counts
    result: Result | tuple[list[float], float]
    """On its way, or read."""
    ruling: Ruling | None = None
    """Made before the update, where the host decides."""

    @property
    def can_wait(self) -> bool:
        """The next step may begin before this one is concluded: the device alone
        decides whether the update is taken.
        """
        return self.ruling is None


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

    def take(
        self,
        engine: Any,
        sums: Tensor,
        totals: Counts,
        *,
        step: int,
        watch: Watchdog,
    ) -> Taken:
        """The update of the step numbered `step` from 0, whose last backward is queued;
        every one before is concluded.

        Args:
            sums: this rank's, on its device, the model's terms first.
        """
        config = self._config
        lr = learning_rate(step, config.optimizer, config.schedule)
        known: Any = {"step": step + 1, "lr": lr, "totals": totals}
        # Only the host knows a spike, and it must before the update is taken.
        if config.safety.spike_action == "log" and decides_on_device(engine):
            watch.at("optimizer step", step + 1)
            terms = len(config.model.terms)
            return Taken(
                **known, result=step_on_device(engine, sums, terms, self._world, lr=lr)
            )
        found = sums.tolist()
        ruling = self._ruling(found, totals, step + 1, watch)
        watch.at("optimizer step")
        clip = config.optimizer.clip
        norm = apply_step(engine, lr=lr, clip=clip, take=ruling.apply)
        return Taken(**known, result=(found, norm), ruling=ruling)

    def conclude(self, engine: Any, taken: Taken, watch: Watchdog) -> Updated:
        """What has become of an update, of each in turn. Waits for the device.

        Raises:
            ValueError: the run is to stop, or cannot go back. The weights are those
                of before the step.
        """
        step, ruling = taken.step, taken.ruling
        if isinstance(taken.result, Result):
            watch.at("end of the optimizer step", step)
            found, norm = taken.result.read()
        else:
            found, norm = taken.result
        if ruling is None:
            ruling = self._ruling(found, taken.totals, step, watch)
        row: dict[str, Any] = {"lr": taken.lr, "grad_norm": norm}
        try:
            outcome = self.guard.after_update(
                ruling, norm, step=step, digest=taken.totals.digest_text
            )
        except ValueError as error:
            self._world.stop(error)
        row["skipped"] = int(not outcome.applied)
        if outcome.roll_back:
            watch.at("roll back")
            row["rolled_back_to"] = self._points.restore(engine, step - 1)
        return Updated(row=row, note=outcome.note, sums=found)

    def _ruling(
        self, sums: list[float], totals: Counts, step: int, watch: Watchdog
    ) -> Ruling:
        watch.at("all-reduce of losses", step)
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


def step_on_device(
    engine: Any, sums: Tensor, terms: int, world: World, *, lr: float
) -> Result:
    """Queue the optimizer step, which is taken unless a loss of any rank or the
    gradient norm is not finite: the device decides (`trainer.engine`'s
    `decides_on_device`). What it comes to: a rank's sums, and the norm before clipping,
    infinite where it is not finite.

    Args:
        sums: this rank's, on its device, `terms` losses first.
    """
    bad = world.sum((~sums[:terms].isfinite()).sum().float())
    return Result(sums, apply_step_on_device(engine, lr=lr, unwanted=bad))
