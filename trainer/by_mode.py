"""Losses by masking mode, and what reconstructions are worth in decibels.

Owns the sums that a micro-batch gives for them, and the metrics made of the sums of a
step. Does not own losses (`trainer.models`) or their sum over ranks (`trainer.loop`).

Shapes: N things of a pair each, B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.mask_config import Mode

KINDS = 4
"""MLM loss, RECON loss, masked words, scored image positions."""
SIZE = KINDS * len(Mode)


def sums_of_modes(mode: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of values by mode, fp32 (len(parts), 3), without a gradient.

    Args:
        mode: (B,) a `Mode` each.
        parts: the pair (N,) of each value and the values (N,).
    """
    numbers = torch.arange(len(Mode), device=mode.device)
    # Not a scatter: that adds in any order on a GPU.
    return torch.stack(
        [
            (value.detach().float()[:, None] * (mode[pair][:, None] == numbers)).sum(0)
            for pair, value in parts
        ]
    )


def mode_metrics(
    sums: Sequence[float], *, patch_size: int, names: tuple[str, str]
) -> dict[str, float]:
    """Losses of each mode that masked something in a step.

    Args:
        sums: of the whole step, `SIZE` of them: those of `sums_of_modes`, row by row.
        patch_size: side in pixels of an image position.
        names: of the loss of words and of that of images.
    """
    modes, (of_words, of_images) = len(Mode), names
    mlm, recon, words, positions = (
        sums[first : first + modes] for first in range(0, SIZE, modes)
    )
    row = {
        f"{of_words}_loss_{mode.name.lower()}": mlm[mode] / words[mode]
        for mode in Mode
        if words[mode]
    }
    return row | {
        f"{of_images}_loss_{mode.name.lower()}": recon[mode]
        / (positions[mode] * patch_size**2)
        for mode in Mode
        if positions[mode]
    }


def psnr(recon_loss: float) -> float | None:
    """Peak signal-to-noise ratio in dB of pixels in 0..1 whose squared error, summed
    over three channels, is `recon_loss` on average; None where it is 0.
    """
    return -10 * math.log10(recon_loss / 3) if recon_loss > 0 else None
