"""Dropout at a site: which channels of a row become 0.

Owns the draws and what is done with them. Does not own sites and what rows are counted
by (`trainer.dropout`) or the generator (`trainer.philox`).

One call of Philox serves four channels. Channel c of a row of D at `place` takes word
c % 4 of the call with

    counter = (place * ceil(D / 4) + c // 4, use, uid_lo, uid_hi),  key = seed

and is kept if that word is floor(share * 2^32) or more. It follows from the counter
alone, so a backward pass may draw it again.

Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
2014. Shapes: N rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.dropout import Dropout
from trainer.philox import check_seed, philox

_WORD = (1 << 32) - 1
WORDS = 4
"""Of a draw, each for a channel."""


def dropped(x: Tensor, drop: Dropout | None) -> Tensor:
    """`x` (N, D) after dropout; itself where there is none."""
    return x if drop is None else dropout_ref(x, drop)


def dropout_ref(x: Tensor, drop: Dropout) -> Tensor:
    """Dropout of (N, D) in plain torch."""
    return torch.where(kept(drop, x.shape[1]), x * scale(drop.share), 0)


def kept(drop: Dropout, width: int) -> Tensor:
    """Which channels (N, D) stay, bool.

    Raises:
        ValueError: a seed that the key does not hold.
    """
    check_seed(drop.seed)
    calls = -(-width // WORDS)
    number = torch.arange(calls, device=drop.place.device)
    uid = drop.uid[:, None]
    words = philox(
        drop.place[:, None] * calls + number,
        drop.use[:, None],
        uid & _WORD,
        (uid >> 32) & _WORD,
        *(drop.seed & _WORD, drop.seed >> 32),
    )
    return torch.stack(words, 2).flatten(1)[:, :width] >= edge(drop.share)


def edge(share: float) -> int:
    """Words below it are dropped."""
    return int(share * (1 << 32))


def scale(share: float) -> float:
    """By what the channels that stay grow."""
    return 1 / (1 - share)
