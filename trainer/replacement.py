"""BERT's 80/10/10: masked words that keep their word, or show a random one.

A pure function of (seed, epoch, uid, position), computed where the masks are. Owns the
draw and which word it means. Does not own which words are masked (`trainer.masking`)
or what hides the others (`trainer.models`). Off by default: MLIM does not mention it
(Devlin et al., 2019, section 3.1).

Shapes: B pairs, L text positions (capacity).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.mask_config import MaskConfig
from trainer.philox import Use, below, draw, edge


class Replacement(NamedTuple):
    """What masked words of B pairs show instead of the mask."""

    kept: Tensor
    """(B, L) bool: a masked word that shows itself."""
    swapped: Tensor
    """(B, L) bool: a masked word that shows another one."""
    word: Tensor
    """(B, L) int64, 0..2^32-1: which one (`random_words`)."""


def drawn_replacement(
    config: MaskConfig, masked: Tensor, *, seed: int, epoch: int | Tensor, uids: Tensor
) -> Replacement | None:
    """A coin for every word that is `masked` (B, L); None where no word is replaced."""
    if not config.keep_share + config.random_share:
        return None
    if isinstance(epoch, Tensor):
        epoch = epoch[:, None]
    coin, word, _, _ = draw(
        seed=seed,
        use=Use.REPLACEMENT,
        epoch=epoch,
        uid=uids[:, None],
        index=torch.arange(masked.shape[1], device=uids.device),
    )
    kept_edge, either_edge = share_edges(config)
    kept, either = coin < kept_edge, coin < either_edge
    return Replacement(masked & kept, masked & either & ~kept, word)


def share_edges(config: MaskConfig) -> tuple[int, int]:
    """Coins (32 bits) below the first keep their word; those from there to below the
    second swap it.
    """
    return edge(config.keep_share), edge(config.keep_share + config.random_share)


def random_words(word: Tensor, vocab_size: int, special_ids: Iterable[int]) -> Tensor:
    """The token id of each 32-bit draw: any of the vocabulary but a special one, all
    equally likely.
    """
    special = sorted(set(special_ids))
    ids = below(word, vocab_size - len(special))
    for number in special:
        # In ascending order, so that an id that is moved on meets the next one.
        ids = ids + (ids >= number)
    return ids
