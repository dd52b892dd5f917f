"""Rows of one modality, end to end: which of them belong to which text or image.

Owns the layout that a stack of layers runs on, made on the device from lengths there,
with shapes that the host knows. Does not own the layout of whole pairs
(`trainer.stream`) or the layers (`trainer.models.layers`).

A layout begins with the segments of its pairs. Rows left over form segments after them,
no longer than the longest, that no loss reads.

Shapes: B pairs, T rows, N segments, S longest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.stream import Stream


class Segmented(Protocol):
    """What self-attention needs to know of rows; a `Stream` has it too."""

    @property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32 boundaries of segments."""

    @property
    def longest(self) -> int:
        """S."""

    @property
    def dense(self) -> Tensor:
        """(N, S) row at each place of a segment, some row past its end."""

    @property
    def dense_valid(self) -> Tensor:
        """(N, S) bool: the place is inside the segment."""

    @property
    def flat(self) -> Tensor:
        """(T,) place in the flattened N x S table of each row."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Rows of B texts or images; fields as `Segmented` has them, and two more."""

    cu_seqlens: Tensor
    longest: int
    dense: Tensor
    dense_valid: Tensor
    flat: Tensor
    pairs: int
    """B: the first segments, which another layout has partners of."""
    inside: Tensor | None
    """(T,) bool: the row is in one of these; None: all are."""

    @property
    def starts(self) -> Tensor:
        """(B,) int64 first row, [CLS], of each text or image."""
        return self.cu_seqlens[: self.pairs].long()


def of_images(pairs: int, rows: int, device: torch.device) -> Segments:
    """Layout of images of `rows` rows each."""
    every = torch.arange(pairs * rows, device=device)
    dense = every.view(pairs, rows)
    bounds = torch.arange(0, (pairs + 1) * rows, rows, device=device)
    return Segments(
        cu_seqlens=bounds.to(torch.int32),
        longest=rows,
        dense=dense,
        dense_valid=torch.ones_like(dense, dtype=torch.bool),
        flat=every,
        pairs=pairs,
        inside=None,
    )


def of_texts(stream: Stream) -> Segments:
    """Layout of the text rows of a stream."""
    rows = len(stream.text_pair)
    return laid_out(
        stream.n_words + 2,
        rows=rows,
        longest=stream.longest - stream.n_image,
        spare=rows - stream.text_used,
    )


def laid_out(lengths: Tensor, *, rows: int, longest: int, spare: int) -> Segments:
    """Layout of segments of these lengths (B,) in `rows` rows.

    Args:
        longest: S, no length is above it.
        spare: no more rows than these are left over.
    """
    pairs, device = len(lengths), lengths.device
    ends = lengths.long().cumsum(0)
    pieces = -(-spare // longest)
    after = ends[-1] + longest * torch.arange(1, pieces + 1, device=device)
    bounds = torch.cat([ends.new_zeros(1), ends, after.clamp(max=rows)])
    sizes, starts = bounds.diff(), bounds[:-1]
    place = torch.arange(longest, device=device)
    row = torch.arange(rows, device=device)
    segment = torch.searchsorted(bounds[1:], row, right=True)
    last = (sizes - 1).clamp(min=0)
    return Segments(
        cu_seqlens=bounds.to(torch.int32),
        longest=longest,
        dense=(starts[:, None] + torch.minimum(place, last[:, None])).clamp(
            max=rows - 1
        ),
        # A softmax over nothing is no number: an empty segment has a place too.
        dense_valid=place <= last[:, None],
        flat=segment * longest + row - starts[segment],
        pairs=pairs,
        inside=None if spare == 0 else segment < pairs,
    )


def taken(
    texts: Segments, order: Tensor, *, rows: int, spare: int
) -> tuple[Tensor, Segments]:
    """Layout of those of `texts` that `order` (B,) numbers, in `rows` rows, and the row
    (T,) of `texts` that each of its rows shows; any where it is left over.

    Args:
        spare: as `laid_out` has it.
    """
    starts, lengths = texts.cu_seqlens[:-1].long()[order], texts.cu_seqlens.diff()
    found = laid_out(lengths[order], rows=rows, longest=texts.longest, spare=spare)
    row = torch.arange(rows, device=order.device)
    segment = torch.searchsorted(found.cu_seqlens[1:].long(), row, right=True)
    own = segment.clamp(max=len(order) - 1)
    shown = starts[own] + row - found.cu_seqlens.long()[own]
    return torch.where(segment < len(order), shown, 0), found


def rows_of_images(order: Tensor, rows: int) -> Tensor:
    """The row that each row of images numbered `order` (B,) shows, of `rows` each."""
    return (order[:, None] * rows + torch.arange(rows, device=order.device)).flatten()
