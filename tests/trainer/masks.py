"""Masks of made-up pairs."""

from __future__ import annotations

import numpy as np
import torch

from trainer.mask_config import MaskConfig, Mode
from trainer.masking import Masks, mam

P = 16
UID = 0x9E3779B97F4A7C1


def draw(
    n_words: list[int],
    *,
    config: MaskConfig | None = None,
    seed: int = 3,
    epoch: int = 0,
    first_uid: int = 0,
    capacity: int | None = None,
    mode: Mode | None = None,
    n_image: int = P,
) -> Masks:
    """Masks of pairs with so many words."""
    count = torch.tensor(n_words)
    return mam(
        config or MaskConfig(),
        seed=seed,
        epoch=epoch,
        uids=torch.arange(first_uid, first_uid + len(n_words)) * UID,
        n_text=count,
        text_capacity=capacity or max(n_words),
        n_image=n_image,
        mode=mode,
    )


def half_up(rate: float, count: int) -> int:
    """Positions that a rate masks exactly."""
    wanted = int(np.floor(rate * count + 0.5))
    return max(wanted, 1) if rate > 0 and count > 0 else 0
