"""Modality Aware Masking (MAM): which text and image positions of a pair are masked.

A pure function of (seed, epoch, uid, position), the same integers on every device, with
shapes fixed by (pairs, capacity) alone. The loader calls it on the host to count, the
model on the device to mask. Does not own modes and rates (`trainer.mask_config`), which
masked words show a word (`trainer.replacement`) or what replaces a masked embedding
(`trainer.models`).

Shapes: B pairs, L text positions (capacity), P image positions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.mask_config import MaskConfig, Mode
from trainer.philox import Use, draw, edge
from trainer.replacement import Replacement, drawn_replacement

# Rates and probabilities are counted in millionths, so that every comparison is one of
# integers and comes out the same on every device.
UNIT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks of B pairs. Text position 0 is the first token after [CLS]."""

    mode: Tensor
    """(B,) int64, a `Mode` each."""
    text: Tensor
    """(B, L) bool, False beyond a pair's own words."""
    image: Tensor
    """(B, P) bool."""
    replacement: Replacement | None = None
    """What masked words show; None: all of them the mask."""

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
    where counts are exact and all blocks of image positions are of one size.
    """
    modes = drawn_modes(config, seed=seed, epoch=epoch, uids=uids)
    sample = _Sample(seed, epoch, uids)
    blocks = Blocks.of(n_image, config.image_block)
    if config.count == "exact":
        text = _wanted(n_text, _per_mode(config.text_rates, modes))
    else:
        text = _text_mask(config, sample, modes, n_text, text_capacity).sum(1)
    if config.count == "exact" and blocks.even:
        n_blocks = torch.full_like(uids, blocks.count)
        image = _wanted(n_blocks, _per_mode(config.image_rates, modes))
        image = image * blocks.side**2
    else:
        image = _image_mask(config, sample, modes, blocks).sum(1)
    return MaskCounts(text=text, image=image)


def drawn_modes(
    config: MaskConfig, *, seed: int, epoch: int | Tensor, uids: Tensor
) -> Tensor:
    """Mode (B,) of each pair."""
    if config.policy != "mam":
        return torch.full_like(uids, int(Mode.LIGHT))
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
    if mode is None:
        modes = drawn_modes(config, seed=seed, epoch=epoch, uids=uids)
    else:
        modes = torch.full_like(uids, int(mode))
    sample = _Sample(seed, epoch, uids)
    blocks = Blocks.of(n_image, config.image_block)
    text = _text_mask(config, sample, modes, n_text, text_capacity)
    return Masks(
        mode=modes,
        text=text,
        image=_image_mask(config, sample, modes, blocks),
        replacement=drawn_replacement(config, text, seed=seed, epoch=epoch, uids=uids),
    )


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The squares of image positions that are masked together."""

    grid: int
    """Positions on a side of the image."""
    side: int
    """Positions on a side of a block."""

    @classmethod
    def of(cls, n_image: int, side: int) -> Blocks:
        """Blocks of an image of `n_image` positions.

        Raises:
            ValueError: the positions form no square.
        """
        grid = math.isqrt(n_image)
        if grid**2 != n_image:
            raise ValueError(f"{n_image} image positions form no square: take one")
        return cls(grid=grid, side=side)

    @property
    def across(self) -> int:
        """Blocks in a row; the last one may be smaller."""
        return -(-self.grid // self.side)

    @property
    def count(self) -> int:
        """All blocks."""
        return self.across**2

    @property
    def even(self) -> bool:
        """All blocks are of one size."""
        return self.grid % self.side == 0

    def spread(self, mask: Tensor) -> Tensor:
        """Mask (B, P) of the positions whose block is in `mask` (B, blocks)."""
        if self.side == 1:
            return mask
        line = torch.arange(self.grid, device=mask.device) // self.side
        block = line[:, None] * self.across + line
        return mask.index_select(1, block.flatten())


class _Sample(NamedTuple):
    """What all draws of B pairs depend on."""

    seed: int
    epoch: int | Tensor
    uids: Tensor


def _text_mask(
    config: MaskConfig, sample: _Sample, modes: Tensor, n_text: Tensor, capacity: int
) -> Tensor:
    """Mask (B, capacity) of words."""
    rates = _per_mode(config.text_rates, modes)
    drawn = _draws(sample, Use.TEXT_MASK, capacity)
    return _mask(drawn, n_text, rates, exact=config.count == "exact")


def _image_mask(
    config: MaskConfig, sample: _Sample, modes: Tensor, blocks: Blocks
) -> Tensor:
    """Mask (B, P) of image positions."""
    rates = _per_mode(config.image_rates, modes)
    drawn = _draws(sample, Use.IMAGE_MASK, blocks.count)
    n_valid = torch.full_like(modes, blocks.count)
    return blocks.spread(_mask(drawn, n_valid, rates, exact=config.count == "exact"))


def _draws(sample: _Sample, use: Use, capacity: int) -> Tensor:
    """A word (B, capacity) for each place."""
    seed, epoch, uids = sample
    index = torch.arange(capacity, device=uids.device)
    if isinstance(epoch, Tensor):
        epoch = epoch[:, None]
    return draw(seed=seed, use=use, epoch=epoch, uid=uids[:, None], index=index)[0]


def _mask(word: Tensor, n_valid: Tensor, rate: Tensor, *, exact: bool) -> Tensor:
    """Mask (B, capacity) of the first `n_valid` places at each pair's rate, by the word
    (B, capacity) of each.
    """
    index = torch.arange(word.shape[1], device=word.device)
    valid = index < n_valid[:, None]
    if not exact:
        return valid & (word * UNIT < rate[:, None] << 32)
    wanted = _wanted(n_valid, rate)[:, None]
    # The position breaks ties, so the smallest `wanted` keys are the same everywhere.
    key = torch.where(valid, (word << 16) | index, torch.iinfo(torch.int64).max)
    largest = key.sort(dim=1).values.gather(1, (wanted - 1).clamp(min=0))
    return valid & (wanted > 0) & (key <= largest)


def _wanted(n_valid: Tensor, rate: Tensor) -> Tensor:
    """Positions (B,) to mask of `n_valid`: rate x positions, rounded half up, at least
    1 where the rate is above 0.
    """
    wanted = (2 * n_valid * rate + UNIT) // (2 * UNIT)
    some = (rate > 0) & (n_valid > 0)
    return torch.where(some, wanted.clamp(min=1), wanted)


def _choose(word: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Index of the share that each 32-bit word falls into."""
    chosen = torch.zeros_like(word)
    for first in edges(probabilities):
        chosen += word >= first
    return chosen


def edges(probabilities: tuple[float, ...]) -> list[int]:
    """Where one share of 0..2^32-1 ends and the next begins; 2^32 where none does."""
    sums = itertools.accumulate(probabilities[:-1])
    return [edge(total) for total in sums]


def _per_mode(rates: tuple[float, ...], modes: Tensor) -> Tensor:
    """Rate of each pair's mode, in millionths, without a copy from the host."""
    rate = torch.zeros_like(modes)
    for number, value in enumerate(millionths(rates)):
        rate += (modes == number) * value
    return rate


def millionths(rates: tuple[float, ...]) -> list[int]:
    """Rates as integers."""
    return [round(rate * UNIT) for rate in rates]
