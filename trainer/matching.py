"""Image-text matching (ITM): which texts are shown with another pair's image.

Owns the draw, in training and on held-out pairs. Does not own the loss
(`trainer.models`).

In training it is a pure function of (seed, epoch, uid) and of the pairs that stand
together, the same integers on every device, with no shape that depends on data. Pairs
stand together in groups of consecutive pairs of a step. A micro-batch holds whole
groups, so what a text is shown with does not depend on how the step is split.

Shapes: B pairs, N pairs in a group, L text positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.philox import Use, draw, edge, permutation
from trainer.stream import Stream


class Matching(NamedTuple):
    """What the texts of B pairs are shown with."""

    image_of: Tensor
    """(B,) int64, the pair of the micro-batch whose image each text is shown with."""
    matched: Tensor
    """(B,) bool: that is its own."""


def drawn_matching(
    *,
    mismatched: float,
    group: int,
    seed: int,
    epochs: Tensor,
    uids: Tensor,
    images: Tensor,
    captions: Tensor,
) -> Matching:
    """Give some texts the image of another pair of their group: never of the same
    sample, of one with the same image file, or of one with the same caption. A text
    whose group has no other pair keeps its own.

    Args:
        mismatched: share of texts that are to get another's image.
        group: N, which divides B.
        epochs: (B,) int64.
        uids: (B,) int64, the bits of the uint64 uids.
        images: (B,) int64, equal where image files are.
        captions: (B, L), equal where captions are.
    """
    zero = torch.zeros_like(uids)
    wanted, which, *_ = draw(seed=seed, use=Use.ITM, epoch=epochs, uid=uids, index=zero)
    alike = same_in_group(uids[:, None], group) | same_in_group(images[:, None], group)
    other = ~(alike | same_in_group(captions, group))
    n_others = other.sum(1)
    number = (which * n_others) >> 32
    # The one of the others that has so many before it.
    at = other & (other.cumsum(1) == number[:, None] + 1)
    pair = torch.arange(len(uids), device=uids.device)
    found = at.to(torch.int64).argmax(1) + pair // group * group
    matched = (wanted >= edge(mismatched)) | (n_others == 0)
    return Matching(torch.where(matched, pair, found), matched)


def fixed_matching(
    uids: np.ndarray, alike: Callable[[int, int], bool], *, mismatched: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whose image (N,) each of N held-out pairs is shown with, and which of them (N,)
    match: the next one on a drawn ring, past those that are alike.

    Args:
        uids: (N,) int64.
        alike: have two pairs, by number, the same image file or the same caption?
        mismatched: share of texts that are to get another's image.
    """
    ring = permutation(len(uids), seed=seed, use=Use.ITM, epoch=0, place=0).tolist()
    wanted = draw(seed=seed, use=Use.ITM, epoch=0, uid=uids, index=0)[0]
    image_of, matched = np.arange(len(uids)), np.ones(len(uids), dtype=bool)
    for place, pair in enumerate(ring):
        if wanted[pair] >= edge(mismatched):
            continue
        ahead = itertools.chain(ring[place + 1 :], ring[:place])
        other = next((one for one in ahead if not alike(pair, one)), None)
        if other is not None:
            image_of[pair], matched[pair] = other, False
    return image_of, matched


def caption_table(stream: Stream, token_ids: Tensor, longest: int) -> Tensor:
    """Token ids (K,) of a stream as a table (B, `longest`), -1 past the end of each
    text.
    """
    used = stream.text_used
    table = token_ids.new_full((stream.pairs, longest), -1)
    places = stream.text_pair[:used], stream.text_position[:used]
    return table.index_put(places, token_ids[:used])


def same_in_group(rows: Tensor, group: int) -> Tensor:
    """(B, N) bool: row (B, L) and each row of its group are equal."""
    grouped = rows.unflatten(0, (-1, group))
    return (grouped[:, :, None] == grouped[:, None]).all(-1).flatten(0, 1)
