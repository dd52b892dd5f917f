"""Which rows of the stream a loss reads: the last layer computes no others.

Owns the choice, with shapes from capacities that the host knows and no value read from
the device. Does not own the layer that makes use of it (`trainer.models.layers`) or the
losses (`trainer.models.mlim`).

A last layer mixes rows only through its keys and values, which come from all of them.
Queries, output projection, feed-forward and norms are of each row alone, so leaving out
rows that nothing reads changes neither losses nor gradients, but for rounding.

Shapes: B pairs, T stream rows, N rows kept, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.models.segments import Segmented
from trainer.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a stream, in its order."""

    row: Tensor
    """(N,) stream row of each, ascending, none twice."""
    place: Tensor
    """(T,) which of the N each stream row is; any of them if it is not kept."""
    cu_seqlens: Tensor
    """(S + 1,) int32 boundaries of segments among the N."""

    def of(self, stream: Stream) -> Stream:
        """The stream whose rows are these alone, for what reads hidden states: rows of
        text and images, and where segments begin.
        """
        return replace(
            stream,
            text_row=self.place[stream.text_row],
            image_row=self.place[stream.image_row],
            cu_seqlens=self.cu_seqlens,
        )


def keep(needed_t: Tensor, count: int, stream: Segmented) -> Rows | None:
    """The rows that are needed (T,), and as many more of the first others as it takes
    to have `count`; None: all rows are kept.

    Every row that is kept is a different one of the stream, so no segment has more of
    them than tokens, and kernels read nothing that is not there.

    Args:
        needed_t: bool; at most `count` are true, and the last ones are lost if not.
    """
    count = max(count, 1)
    if count >= len(needed_t):
        return None
    number = (~needed_t).cumsum(0)
    spare = number <= count - needed_t.sum()
    before = (needed_t | spare).cumsum(0).clamp(max=count)
    wanted = torch.arange(1, count + 1, device=before.device)
    bounds = torch.cat([before.new_zeros(1), before])[stream.cu_seqlens.long()]
    return Rows(
        row=torch.searchsorted(before, wanted),
        place=(before - 1).clamp(min=0),
        cu_seqlens=bounds.to(torch.int32),
    )


def first_rows(stream: Stream) -> Rows | None:
    """The [CLS] row of every pair, and no other."""
    rows = torch.arange(len(stream.source), device=stream.source.device)
    # A pair's segment begins with [CLS].
    starts = stream.cu_seqlens[: stream.pairs].long()
    needed = torch.zeros_like(rows, dtype=torch.bool).index_fill(0, starts, True)
    return keep(needed, stream.pairs, stream)


def scored_rows(
    stream: Stream,
    *,
    words_k: Tensor,
    n_words: int,
    images_b: Tensor,
    n_images: int,
) -> Rows | None:
    """Rows of masked words, and all image rows of the images that RECON scores: the
    decoder mixes neighbours.

    Args:
        words_k: (K,) bool, the text rows that are masked words, at most `n_words`.
        images_b: (B,) bool, the images that are scored, at most `n_images`.
    """
    images = images_b[:, None].expand_as(stream.image_row).flatten()
    both = torch.cat([words_k, images])
    count = n_words + min(n_images, stream.pairs) * stream.n_image
    return keep(both[stream.source], count, stream)
