"""The flat, unpadded token stream of a micro-batch.

Owns where every token of every pair stands, on the host, and the capacities that make
compiled shapes repeat. Does not own what the tokens are (`trainer.loader`) or which of
them are masked (`trainer.masking`).

A pair is [CLS] words [SEP] followed by its P image tokens. The text part is rounded up
to a capacity; the rows left over form segments of their own, no longer than the longest
pair, that no loss reads.

Shapes: B pairs, P image tokens of a pair, K text capacity, T = K + B x P stream rows,
N segments, pairs first, S longest segment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_CAPACITIES_PER_OCTAVE = 16
_SMALLEST_GRAIN = 8


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Rows of a micro-batch. Integer tensors on one device, numbers on the host."""

    pairs: int
    n_image: int
    longest: int
    """S: tokens of the longest segment."""
    text_used: int
    """Text rows that hold a token; the rest of K is padding."""
    text_pair: Tensor
    """(K,) pair of each text row; 0 for padding."""
    text_position: Tensor
    """(K,) position in its text, [CLS] at 0; 0 for padding."""
    maskable: Tensor
    """(K,) bool: a word, neither a special token nor padding."""
    n_words: Tensor
    """(B,) maskable tokens of each pair."""
    source: Tensor
    """(T,) row of cat([text rows (K), image tokens (B*P)]) at each stream row."""
    text_row: Tensor
    """(K,) stream row of each text row."""
    image_row: Tensor
    """(B, P) stream row of each image token."""
    cu_seqlens: Tensor
    """(N + 1,) int32 boundaries of segments."""
    dense: Tensor
    """(N, S) stream row at each place of a segment, its last one past its end."""
    dense_valid: Tensor
    """(N, S) bool: the place is inside the segment."""
    flat: Tensor
    """(T,) place in the flattened N x S table of each stream row."""

    def to(self, device: torch.device) -> Self:
        """The same stream on `device`, copied without blocking the host."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of it, by name."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }


def capacity(count: int) -> int:
    """Smallest allowed capacity holding `count`: at most 16 an octave, so padding is at
    most about 6 % and shapes repeat.
    """
    octave = 1 << max(count - 1, 1).bit_length() - 1
    grain = max(octave // _CAPACITIES_PER_OCTAVE, _SMALLEST_GRAIN)
    return -(-max(count, 1) // grain) * grain


def lay_out(text_lengths: np.ndarray, n_image: int) -> Stream:
    """Stream of pairs with `text_lengths` (B,) tokens, specials included, and `n_image`
    image tokens each.
    """
    pairs, used = len(text_lengths), int(text_lengths.sum())
    text_capacity = capacity(used)
    padding = text_capacity - used
    pair = np.repeat(np.arange(pairs), text_lengths)
    text_starts = np.cumsum(text_lengths) - text_lengths
    position = np.arange(used) - text_starts[pair]
    maskable = (position > 0) & (position < text_lengths[pair] - 1)

    longest = int(text_lengths.max()) + n_image
    whole, rest = divmod(padding, longest)
    left_over = [longest] * whole + [rest] * (rest > 0)
    lengths = np.append(text_lengths + n_image, left_over).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    text_row = np.append(starts[pair] + position, total - padding + np.arange(padding))
    image_starts = starts[:pairs] + text_lengths
    image_row = image_starts[:, None] + np.arange(n_image)
    # Text and image of each pair in turn, then padding: runs of rows in order.
    first_of_run = np.empty(2 * pairs + 1, dtype=np.int64)
    first_of_run[:-1:2] = text_starts - starts[:pairs]
    first_of_run[1::2] = text_capacity + np.arange(pairs) * n_image - image_starts
    first_of_run[-1] = used + padding - total
    runs = np.full(2 * pairs + 1, n_image)
    runs[:-1:2], runs[-1] = text_lengths, padding
    rows = np.arange(total)
    source = np.repeat(first_of_run, runs)
    source += rows

    place = np.arange(longest)
    inside = place < lengths[:, None]
    dense = np.minimum(place, lengths[:, None] - 1)
    dense += starts[:, None]
    flat = np.repeat(np.arange(len(lengths)) * longest - starts, lengths)
    flat += rows
    pad = (0, padding)
    return Stream(
        pairs=pairs,
        n_image=n_image,
        longest=longest,
        text_used=used,
        text_pair=_tensor(np.pad(pair, pad)),
        text_position=_tensor(np.pad(position, pad)),
        maskable=_tensor(np.pad(maskable, pad)),
        n_words=_tensor(text_lengths - 2),
        source=_tensor(source),
        text_row=_tensor(text_row),
        image_row=_tensor(image_row),
        cu_seqlens=_tensor(np.append(starts, total).astype(np.int32)),
        dense=_tensor(dense),
        dense_valid=_tensor(inside),
        flat=_tensor(flat),
    )


def pack(lengths: np.ndarray, ids: np.ndarray, n_image: int) -> tuple[Stream, Tensor]:
    """Stream of pairs with texts of these lengths (B,), their `ids` end to end, and the
    ids in the stream (K,), 0 where padding.
    """
    stream = lay_out(lengths, n_image)
    token_ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
    token_ids[: stream.text_used] = torch.from_numpy(ids)
    return stream, token_ids


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
