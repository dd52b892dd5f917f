"""Keys of masking: policy, modes, rates, and how the rates change over a run.

Owns names, defaults and checks, and the rates of every mode at every step. Does not own
which positions those rates mask (`trainer.masking`). Needs no torch.

MLIM (Arici et al., 2021) states three modes, a third each: image-heavy (80 % of image
positions, text clean), text-heavy (80 % of text, image clean) and light (both lightly).
It does not state the light rates, whether counts are exact, whether image positions are
masked singly or in blocks, or whether words are replaced as in BERT: keys here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Any, Literal


class Mode(enum.IntEnum):
    """Masking mode of a pair."""

    IMAGE_HEAVY = 0
    TEXT_HEAVY = 1
    LIGHT = 2


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """Rates over the first steps of a run: linear from a share of their values to
    their values. The paper has none."""

    steps: int = 0
    """Steps after which the rates have their values; 0: from the beginning."""
    heavy_start: float = 1.0
    """Factor of the heavy rates at the first step; may exceed 1."""
    light_start: float = 1.0
    """Factor of the light rates and of `uniform_rate` at the first step."""

    def __post_init__(self) -> None:
        for name in ("steps", "heavy_start", "light_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"mask.schedule.{name} must not be negative")
        if not self.steps and not self.heavy_start == self.light_start == 1:
            raise ValueError(
                "mask.schedule.heavy_start and light_start do nothing while "
                "mask.schedule.steps is 0: say over how many steps"
            )

    def factors(self, step: int) -> tuple[float, float]:
        """Factors of heavy and light rates at a step, counted from 0."""
        done = min(step / self.steps, 1.0) if self.steps else 1.0
        heavy, light = (
            start + (1.0 - start) * done
            for start in (self.heavy_start, self.light_start)
        )
        return heavy, light


_SHARES = (
    "heavy_rate",
    "heavy_text_rate",
    "heavy_image_rate",
    "light_text_rate",
    "light_image_rate",
    "uniform_rate",
    "keep_share",
    "random_share",
)


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Modality Aware Masking."""

    policy: Literal["mam", "uniform", "text_only", "image_only"] = "mam"
    """mam: each pair draws a mode. Baselines, all pairs in light mode: uniform masks
    `uniform_rate` of both modalities, text_only and image_only that of one."""
    mode_probabilities: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Shares of image-heavy, text-heavy and light pairs; they add up to 1."""
    heavy_rate: float = 0.8
    """Share of positions masked in the modality that a heavy mode masks."""
    heavy_text_rate: float | None = None
    """The same for text-heavy mode alone; null: `heavy_rate`."""
    heavy_image_rate: float | None = None
    """The same for image-heavy mode alone; null: `heavy_rate`."""
    light_text_rate: float = 0.15
    """Share of text positions masked in light mode (the paper does not say)."""
    light_image_rate: float = 0.15
    """Share of image positions masked in light mode (the paper does not say)."""
    uniform_rate: float = 0.15
    """Share of positions masked by the policies other than mam."""
    count: Literal["exact", "bernoulli"] = "exact"
    """Exact: round half up of rate x positions, at least 1; or a coin a position."""
    image_block: int = 1
    """Side, in image tokens, of the squares of a fixed grid that are masked whole:
    counts are of squares then. Where the side does not divide that of the image, the
    last square of a row or column is smaller. (The paper does not say. MaskVLM's
    default is 2, whatever the policy.)"""
    keep_share: float = 0.0
    """Share of masked words that keep their word, and are scored (BERT's 0.1; MLIM
    mentions none)."""
    random_share: float = 0.0
    """Share of masked words that show a random word instead, and are scored (BERT's
    0.1; MLIM mentions none)."""
    schedule: MaskSchedule = field(default_factory=MaskSchedule)

    def __post_init__(self) -> None:
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"mask.{name} must lie between 0 and 1")
        if self.keep_share + self.random_share > 1:
            raise ValueError("mask.keep_share and random_share must not add up above 1")
        if self.image_block < 1:
            raise ValueError("mask.image_block must be 1 or more")
        if min(self.mode_probabilities) < 0:
            raise ValueError("mask.mode_probabilities must lie between 0 and 1")
        if abs(sum(self.mode_probabilities) - 1) > 1e-6:
            raise ValueError(
                f"mask.mode_probabilities add up to {sum(self.mode_probabilities)}, "
                "not to 1"
            )
        schedule = self.schedule
        first = self._scaled(heavy=schedule.heavy_start, light=schedule.light_start)
        for name, rate in first.items():
            if rate > 1:
                raise ValueError(
                    f"mask.schedule takes mask.{name} to {rate:g} at the first step: "
                    "lower heavy_start or light_start"
                )

    def at(self, step: int) -> MaskConfig:
        """The same with the rates of a step, counted from 0, and no schedule."""
        if not self.schedule.steps:
            return self
        heavy, light = self.schedule.factors(step)
        rates = self._scaled(heavy=heavy, light=light)
        # A factor may be off by its last digit.
        scaled: dict[str, Any] = {name: min(rate, 1.0) for name, rate in rates.items()}
        return replace(self, schedule=MaskSchedule(), **scaled)

    def _scaled(self, *, heavy: float, light: float) -> dict[str, float]:
        """The rates in force, times factors."""
        mam = self.policy == "mam"
        names = ("light_text_rate", "light_image_rate") if mam else ("uniform_rate",)
        return {
            "heavy_text_rate": self.text_rates[Mode.TEXT_HEAVY] * heavy,
            "heavy_image_rate": self.image_rates[Mode.IMAGE_HEAVY] * heavy,
            **{name: getattr(self, name) * light for name in names},
        }

    @property
    def text_rates(self) -> tuple[float, float, float]:
        """Text rate of each `Mode`. Heavy modes have theirs under every policy, for
        evaluation asks for them by name.
        """
        own = self.heavy_text_rate
        heavy = self.heavy_rate if own is None else own
        light = {"mam": self.light_text_rate, "image_only": 0.0}
        return (0.0, heavy, light.get(self.policy, self.uniform_rate))

    @property
    def image_rates(self) -> tuple[float, float, float]:
        """Image rate of each `Mode`, as `text_rates`."""
        own = self.heavy_image_rate
        heavy = self.heavy_rate if own is None else own
        light = {"mam": self.light_image_rate, "text_only": 0.0}
        return (heavy, 0.0, light.get(self.policy, self.uniform_rate))
