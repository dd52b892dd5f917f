"""Modality Aware Masking (MAM): which text and image positions of a pair are masked.

A pure function of (seed, epoch, uid, position), the same integers on every device, with
shapes fixed by (pairs, capacity) alone. The loader calls it on the host to count, the
model on the device to mask. Does not own what replaces a masked embedding
(`trainer.models`).

MLIM (Arici et al., 2021): each pair gets one of three modes, a third each: image-heavy
(80 % of image positions, text clean), text-heavy (80 % of text, image clean) and light
(both lightly). The paper states neither the light rates nor whether counts are exact;
both are keys here.

Shapes: B pairs, L text positions (capacity), P image positions.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.philox import Use, draw

# Rates and probabilities are counted in millionths, so that every comparison is one of
# integers and comes out the same on every device.
_UNIT = 1_000_000


class Mode(enum.IntEnum):
    """Masking mode of a pair."""

    IMAGE_HEAVY = 0
    TEXT_HEAVY = 1
    LIGHT = 2


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Modality Aware Masking."""

    mode_probabilities: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Shares of image-heavy, text-heavy and light pairs; they add up to 1."""
    heavy_rate: float = 0.8
    """Share of positions masked in the modality that a heavy mode masks."""
    light_text_rate: float = 0.15
    """Share of text positions masked in light mode (the paper does not say)."""
    light_image_rate: float = 0.15
    """Share of image positions masked in light mode (the paper does not say)."""
    count: Literal["exact", "bernoulli"] = "exact"
    """Exact: round half up of rate x positions, at least 1; or a coin a position."""

    def __post_init__(self) -> None:
        for name in ("heavy_rate", "light_text_rate", "light_image_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mask.{name} must lie between 0 and 1")
        if min(self.mode_probabilities) < 0:
            raise ValueError("mask.mode_probabilities must lie between 0 and 1")
        if abs(sum(self.mode_probabilities) - 1) > 1e-6:
            raise ValueError(
                f"mask.mode_probabilities add up to {sum(self.mode_probabilities)}, "
                "not to 1"
            )

    @property
    def text_rates(self) -> tuple[float, float, float]:
        """Text rate of each `Mode`."""
        return (0.0, self.heavy_rate, self.light_text_rate)

    @property
    def image_rates(self) -> tuple[float, float, float]:
        """Image rate of each `Mode`."""
        return (self.heavy_rate, 0.0, self.light_image_rate)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks of B pairs. Text position 0 is the first token after [CLS]."""

    mode: Tensor
    """(B,) int64, a `Mode` each."""
    text: Tensor
    """(B, L) bool, False beyond a pair's own words."""
    image: Tensor
    """(B, P) bool."""

    @property
    def counts(self) -> MaskCounts:
        """How many positions of each pair are masked."""
        return MaskCounts(text=self.text.sum(1), image=self.image.sum(1))


@dataclass(frozen=True, kw_only=True)
class MaskCounts:
    """How many positions of B pairs are masked."""

    text: Tensor
    """(B,) int64."""
    image: Tensor
    """(B,) int64."""


def mam_counts(
    config: MaskConfig,
    *,
    seed: int,
    epoch: int | Tensor,
    uids: Tensor,
    n_text: Tensor,
    text_capacity: int,
    n_image: int,
) -> MaskCounts:
    """What the masks of `mam` with the same arguments count, without drawing a position
    where counts are exact.
    """
    if config.count == "exact":
        modes = drawn_modes(config, seed=seed, epoch=epoch, uids=uids)
        n_images = torch.zeros_like(uids) + n_image
        return MaskCounts(
            text=_wanted(n_text, _per_mode(config.text_rates, modes)),
            image=_wanted(n_images, _per_mode(config.image_rates, modes)),
        )
    masks = mam(
        config,
        seed=seed,
        epoch=epoch,
        uids=uids,
        n_text=n_text,
        text_capacity=text_capacity,
        n_image=n_image,
    )
    return masks.counts


def drawn_modes(
    config: MaskConfig, *, seed: int, epoch: int | Tensor, uids: Tensor
) -> Tensor:
    """Mode (B,) that each pair draws."""
    if uids.device.type == "cpu":
        # Generators are a hundred small operations, which cost numpy a third.
        of_each = epoch.numpy() if isinstance(epoch, Tensor) else epoch
        words = draw(seed=seed, use=Use.MODE, epoch=of_each, uid=uids.numpy(), index=0)
        word = torch.from_numpy(words[0])
    else:
        zero = torch.zeros_like(uids)
        word = draw(seed=seed, use=Use.MODE, epoch=epoch, uid=uids, index=zero)[0]
    return _choose(word, config.mode_probabilities)


def mam(
    config: MaskConfig,
    *,
    seed: int,
    epoch: int | Tensor,
    uids: Tensor,
    n_text: Tensor,
    text_capacity: int,
    n_image: int,
    mode: Mode | None = None,
) -> Masks:
    """Masks of a batch of pairs.

    Args:
        epoch: of all pairs, or (B,) int64 of each.
        uids: (B,) int64, the bits of the uint64 uids.
        n_text: (B,) int64, maskable tokens of each pair (special tokens not counted).
        text_capacity: L, at least the largest `n_text`.
        n_image: P, image positions of every pair.
        mode: the same mode for all pairs instead of a drawn one (evaluation).
    """
    zero = torch.zeros_like(uids)
    if mode is None:
        modes = drawn_modes(config, seed=seed, epoch=epoch, uids=uids)
    else:
        modes = zero + int(mode)
    n_images = zero + n_image
    text, image = (
        _mask(
            config,
            seed=seed,
            use=use,
            epoch=epoch,
            uids=uids,
            n_valid=n_valid,
            capacity=capacity,
            millionths=_per_mode(rates, modes),
        )
        for use, n_valid, capacity, rates in (
            (Use.TEXT_MASK, n_text, text_capacity, config.text_rates),
            (Use.IMAGE_MASK, n_images, n_image, config.image_rates),
        )
    )
    return Masks(mode=modes, text=text, image=image)


def _mask(
    config: MaskConfig,
    *,
    seed: int,
    use: Use,
    epoch: int | Tensor,
    uids: Tensor,
    n_valid: Tensor,
    capacity: int,
    millionths: Tensor,
) -> Tensor:
    """Mask (B, capacity) of the first `n_valid` positions at each pair's rate."""
    index = torch.arange(capacity, device=uids.device)
    if isinstance(epoch, Tensor):
        epoch = epoch[:, None]
    word = draw(seed=seed, use=use, epoch=epoch, uid=uids[:, None], index=index)[0]
    valid = index < n_valid[:, None]
    if config.count == "bernoulli":
        return valid & (word * _UNIT < millionths[:, None] << 32)
    wanted = _wanted(n_valid, millionths)[:, None]
    # The position breaks ties, so the smallest `wanted` keys are the same everywhere.
    key = torch.where(valid, (word << 16) | index, torch.iinfo(torch.int64).max)
    largest = key.sort(dim=1).values.gather(1, (wanted - 1).clamp(min=0))
    return valid & (wanted > 0) & (key <= largest)


def _wanted(n_valid: Tensor, millionths: Tensor) -> Tensor:
    """Positions (B,) to mask of `n_valid`: rate x positions, rounded half up, at least
    1 where the rate is above 0.
    """
    wanted = (2 * n_valid * millionths + _UNIT) // (2 * _UNIT)
    some = (millionths > 0) & (n_valid > 0)
    return torch.where(some, wanted.clamp(min=1), wanted)


def _choose(word: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Index of the share that each 32-bit word falls into."""
    chosen = torch.zeros_like(word)
    edge = 0.0
    for probability in probabilities[:-1]:
        edge += probability
        chosen += word >= round(edge * (1 << 32))
    return chosen


def _per_mode(rates: tuple[float, ...], modes: Tensor) -> Tensor:
    """Rate of each pair's mode, in millionths, without a copy from the host."""
    rate = torch.zeros_like(modes)
    for number, value in enumerate(rates):
        rate += (modes == number) * round(value * _UNIT)
    return rate
