"""What follows a step once the host knows what it came to.

Owns the order of a row, its notes, validation, roll-back points and checkpoints, and
which steps are known beforehand to have more behind them than a row. Does not own the
steps (`trainer.loop`), what they came to (`trainer.update`) or anything that is done
here (`trainer.step_metrics`, `trainer.validation`, `trainer.saving`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

from trainer.data_state import DataState
from trainer.engine import World
from trainer.feed import STEPS_BEYOND, Delivery
from trainer.limits import Steps
from trainer.loader import Loader, StepBatch
from trainer.metrics import Metrics
from trainer.options import PretrainConfig
from trainer.parameters import parameter_norm
from trainer.profiling import Profiler, peak_memory_gib
from trainer.quarantine import to_plain
from trainer.run_copy import RunCopy
from trainer.saving import Checkpoints
from trainer.step_metrics import Summed, metrics_row, spent_on, summed_over_ranks
from trainer.stop import StopFlag
from trainer.update import Taken, Updates
from trainer.validation import HeldOut
from trainer.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of on one rank."""

    config: PretrainConfig
    world: World
    loader: Loader
    engine: Any
    updates: Updates
    metrics: Metrics | None
    """Only where something is printed and written: on rank 0."""
    held_out: HeldOut | None = None
    """Pairs to measure on, if the run has any."""
    profiler: Profiler | None = None
    """On rank 0."""
    copy: RunCopy | None = None
    """Of a run behind a URL."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A step whose work is queued."""

    taken: Taken
    batch: StepBatch
    delivery: Delivery
    started: float
    peak_memory_gib: float


class Ends:
    """What follows a step once the host knows what it came to: its row and notes,
    validation and checkpoints, the end of the run. One step's after the other's, on all
    ranks alike.
    """

    def __init__(
        self, parts: Parts, checkpoints: Checkpoints, watch: Watchdog, stop: StopFlag
    ) -> None:
        self._parts, self._checkpoints, self._watch = parts, checkpoints, watch
        self._stop, self._steps = stop, Steps()
        self._begun: _Begun | None = None
        # When the step before was known; what was saved and validated since is taken
        # off, by moving it on.
        self._last = -math.inf
        self.stopped = False
        """Somebody has asked to stop."""

    def begin(
        self, taken: Taken, batch: StepBatch, delivery: Delivery, *, started: float
    ) -> None:
        """A step's work is queued; the one before is concluded.

        Args:
            started: when its batch was asked for.
        """
        self._begun = _Begun(
            taken=taken,
            # Memory of its tensors is the next step's.
            batch=dataclasses.replace(batch, micro_batches=[]),
            delivery=delivery,
            started=started,
            peak_memory_gib=peak_memory_gib(self._parts.world.device),
        )

    def conclude(self) -> bool:
        """All that follows the step that has begun, if one has; `stopped`.

        Raises:
            ValueError: the run is to stop over what the step came to.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            self._conclude(begun)
        return self.stopped

    def _conclude(self, begun: _Begun) -> None:
        parts, checkpoints, watch = self._parts, self._checkpoints, self._watch
        world, loader, metrics = parts.world, parts.loader, parts.metrics
        batch, totals, step = begun.batch, begun.taken.totals, begun.taken.step
        updated = parts.updates.conclude(parts.engine, begun.taken, watch)
        now = time.perf_counter()
        elapsed = now - max(begun.started, self._last)
        self._last = now
        took = spent_on(batch, begun.delivery, elapsed)
        watch.at("all-reduce of metrics")
        asked = (self._stop.asked, checkpoints.due, checkpoints.failed)
        summed = summed_over_ranks(updated.sums, took, asked, loader, totals, world)
        row = metrics_row(batch, totals, summed, loader, world, elapsed)
        row |= {"step": step, **updated.row, "peak_memory_gib": begun.peak_memory_gib}
        row |= _norm_of_model(parts, step)
        self._steps.add(summed.spent)
        if metrics:
            metrics.write(row)
            if updated.note:
                metrics.note(updated.note)
        due = summed.save_due or "rolled_back_to" in row
        if due:
            # Waiting for the next step's passes, if they are queued, is no pause.
            watch.at("passes of the next step", step + 1)
            world.settle()
        paused = time.perf_counter()
        if _look_and_save(parts, checkpoints, watch, step, summed, due=due):
            said = self._steps.verdict(threads=parts.config.threads)
            if metrics and said:
                metrics.note(said)
        self._last += time.perf_counter() - paused
        self.stopped = summed.stop


def due_after(parts: Parts, step: int) -> bool:
    """Does more than a row follow the first `step` steps, as far as that is known
    before? Then the next step begins after it. All ranks know it alike.
    """
    config, held_out = parts.config, parts.held_out
    profiled, length = config.profile.first_step, config.profile.steps
    every = config.log.norms_every
    return (
        step == config.last_step
        or step % config.checkpoint.every_steps == 0
        or parts.updates.point_due(step)
        or (held_out is not None and held_out.due(step))
        or (every > 0 and step % every == 0)
        # A profile begins and ends between two steps.
        or (length > 0 and step in (profiled, profiled + length))
        # An epoch is frozen between two steps.
        or parts.loader.order.undecided <= step + STEPS_BEYOND
    )


def _norm_of_model(parts: Parts, step: int) -> dict[str, float]:
    """The norm of the weights after `step` steps, if it is due."""
    every = parts.config.log.norms_every
    if not every or step % every:
        return {}
    return {"param_norm": parameter_norm(parts.engine.module, parts.world)}


def _look_and_save(
    parts: Parts,
    checkpoints: Checkpoints,
    watch: Watchdog,
    step: int,
    summed: Summed,
    *,
    due: bool,
) -> bool:
    """After `step` steps, measure held-out pairs and save what is due; whether a
    checkpoint was, which is also so when it is `due` for reasons of the caller's.
    """
    config, updates = parts.config, parts.updates
    val_loss = None
    # Whoever asked to stop does not want to wait; resuming makes up for it.
    if parts.held_out and (not summed.stop or step == config.last_step):
        watch.at("validation")
        val_loss = parts.held_out.look(
            parts.engine, step, parts.metrics, lambda: watch.at("validation")
        )
    watch.at("checkpoint")
    best = val_loss is not None and checkpoints.is_best(val_loss)
    point = updates.point_due(step)
    if summed.write_failed or point:
        checkpoints.wait()
    if point:
        updates.save_point(parts.engine, step)
    due = due or best or point or step % config.checkpoint.every_steps == 0
    due = due or summed.stop or step == config.last_step
    if due:
        state = data_state(parts.loader, updates, step)
        checkpoints.save(parts.engine, state, val_loss=val_loss)
    return due


def data_state(loader: Loader, updates: Updates, step: int) -> dict[str, Any]:
    """What a checkpoint after `step` steps says of data (law 1) and of losses."""
    state = DataState.of(loader.dataset, loader.order, step=step).to_plain()
    state["safety"] = updates.guard.to_plain()
    return state | {"quarantine": to_plain(loader.quarantine.until(step))}
