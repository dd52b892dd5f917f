"""What a run does about losses and gradients that are not finite, and about spikes.

Owns the decision, before the optimizer step, whether it is taken, and what is said.
Does not own how a step is dropped (`trainer.refusal`), when a loss is a spike
(`trainer.spikes`) or the weights to go back to (`trainer.roll_back`).

All ranks decide alike, because they look only at what is summed over ranks, and a
resumed run decides like the undisturbed one, because `Guard.to_plain` lies in the
marker of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trainer.engine import World
from trainer.loader import Counts
from trainer.models.base import Term, means_of
from trainer.options import SafetyConfig
from trainer.spikes import Level


@dataclass(frozen=True)
class Losses:
    """Means of a step over all ranks."""

    means: Mapping[str, float]
    """By name of the model's term."""

    @property
    def finite(self) -> bool:
        """All are."""
        return all(map(math.isfinite, self.means.values()))


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """Whether the update of a step is wanted."""

    losses: Losses
    apply: bool
    spikes: tuple[str, ...] = ()
    """Each loss that spikes, in words."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What has become of a step."""

    applied: bool
    roll_back: bool
    note: str | None
    """What to tell, if anything."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What is remembered of the steps before."""

    levels: Mapping[str, Level] = field(default_factory=dict)
    """Of each loss, by name."""
    nonfinite: int = 0
    """Steps in a row that were not finite."""
    spikes: int = 0
    """Spikes that were acted on, until a window of steps passes without one."""
    quiet: int = 0
    """Steps since the last one."""


def losses_over_ranks(
    sums: Sequence[float], terms: Sequence[Term], totals: Counts, world: World
) -> Losses:
    """Mean losses of the step over all ranks, from this rank's sums, the model's terms
    first. An all-reduce of a few numbers: the other figures of a step can wait until
    its end, but these decide whether the optimizer step is taken.
    """
    values = torch.tensor(sums[: len(terms)], dtype=torch.float64)
    return Losses(means_of(terms, world.sum(values).tolist(), totals))


class Guard:
    """Judge of every step of a run.

    Args:
        config: the `safety` keys.
        run: run directory, which messages name.
        stored: what `to_plain` gave, of the checkpoint that is resumed.
    """

    def __init__(
        self, config: SafetyConfig, run: str | Path, stored: Mapping[str, Any] | None
    ) -> None:
        self._config, self._run = config, run
        self._state = _state(stored) if stored else State()

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint's marker holds of it: some 300 bytes."""
        return asdict(self._state)

    def before_update(self, losses: Losses) -> Ruling:
        """Whether the update is wanted, from what is known before it."""
        if not losses.finite:
            return Ruling(losses=losses, apply=False)
        config, state = self._config, self._state
        judge: Any = {
            "window": config.spike_window,
            "threshold": config.spike_threshold,
        }
        spikes = []
        levels = dict(state.levels)
        for name, loss in losses.means.items():
            level = levels.get(name, Level())
            if level.is_spike(loss, **judge):
                spikes.append(
                    f"{name}_loss {loss:.4g} is {level.rise(loss):.1f} deviations "
                    f"above its mean of {level.mean:.4g}"
                )
            levels[name] = level.after(loss, **judge)
        self._state = replace(state, levels=levels)
        wanted = not spikes or config.spike_action == "log"
        return Ruling(losses=losses, apply=wanted, spikes=tuple(spikes))

    def after_update(
        self, ruling: Ruling, grad_norm: float, *, step: int, digest: str
    ) -> Outcome:
        """What has become of the step numbered `step` from 1, which the optimizer
        refuses by itself where the gradient norm is not finite.

        Raises:
            ValueError: the run is to stop: too many in a row, or the user wants it.
        """
        finite = ruling.losses.finite and math.isfinite(grad_norm)
        acted = bool(ruling.spikes) and not ruling.apply
        self._remember(finite=finite, acted=acted)
        where = f"step {step} (samples {digest})"
        look = f"`python -m trainer.replay {self._run} --step {step}` shows them"
        if not finite:
            what = f"{where}: {_not_finite(ruling.losses, grad_norm)}"
            self._bear_nonfinite(what, look)
            return Outcome(
                applied=False,
                roll_back=False,
                note=f"{what}: its update is dropped, on every rank. {look}",
            )
        if not ruling.spikes:
            return Outcome(applied=True, roll_back=False, note=None)
        what = f"{where}: {', '.join(ruling.spikes)}"
        if acted:
            self._bear_spikes(what, look)
        done = {
            "log": "its update is taken",
            "skip": "its update is dropped",
            "roll_back": "back to the weights of before",
        }[self._config.spike_action]
        return Outcome(
            applied=ruling.apply,
            roll_back=acted and self._config.spike_action == "roll_back",
            note=f"{what}: {done}. {look}",
        )

    def _remember(self, *, finite: bool, acted: bool) -> None:
        state = self._state
        quiet = 0 if acted else min(state.quiet + 1, self._config.spike_window)
        kept = 0 if quiet >= self._config.spike_window else state.spikes
        self._state = replace(
            state,
            nonfinite=0 if finite else state.nonfinite + 1,
            spikes=kept + acted,
            quiet=quiet,
        )

    def _bear_nonfinite(self, what: str, look: str) -> None:
        config, count = self._config, self._state.nonfinite
        if config.nonfinite == "skip" and count <= config.max_nonfinite:
            return
        more = "--safety.nonfinite skip passes over such steps"
        if config.nonfinite == "skip":
            what += f", the {count}. in a row of at most {config.max_nonfinite}"
            more = "--safety.max_nonfinite bears more"
        raise ValueError(
            f"{what}. No weight was changed and nothing saved. {look}. If they are "
            f"sound, lower optimizer.lr and start anew, in another --output, or delete "
            f"the newest checkpoint to go on from the one before; {more}"
        )

    def _bear_spikes(self, what: str, look: str) -> None:
        config, count = self._config, self._state.spikes
        if count <= config.max_spikes:
            return
        raise ValueError(
            f"{what}. It is spike {count} of at most {config.max_spikes} with fewer "
            f"than {config.spike_window} steps between them. {look}. Lower "
            "optimizer.lr and start anew, in another --output; or "
            "--safety.max_spikes bears more"
        )


def _not_finite(losses: Losses, grad_norm: float) -> str:
    if losses.finite:
        return f"the gradient is not finite (norm {grad_norm})"
    each = ", ".join(f"{name} {value:.4g}" for name, value in losses.means.items())
    return f"the loss is not finite ({each})"


def _state(stored: Mapping[str, Any]) -> State:
    levels = {name: Level(**level) for name, level in stored["levels"].items()}
    return State(**{**stored, "levels": levels})
