"""Transformer layers on flat token streams, in BERT's shape, and across two of them.

Owns the layers, and which attention runs where. Does not own the streams
(`trainer.stream`, `trainer.models.segments`) or which rows of them a loss reads
(`trainer.models.scored_rows`).

A layer that is given `Rows` gives these rows of its result alone, from the keys and
values of all: what it does besides is of each row by itself.

A layer that is given `Dropout`, of all rows at the first of its `sites`, drops what
each branch adds to the residual, as BERT and ViLT do; attention's probabilities it
leaves alone, which unpadded attention never has as a table.

Where a branch and the residual around it read the same rows and meet in a norm, the
branch's first layer passes them on to the residual (`trainer.models.residual`), and the
norm adds the bias of its last one (`trainer.kernels.layer_norm`). The bias of queries,
keys and values is added by their product, and has its gradient from our attention
kernel where that is what runs (`trainer.kernels.attention`). A pre-norm residual
goes on to the next branch: its gradient is not the norm's alone.

Shapes: T stream rows, N rows of the result, O rows of the other modality, U of them
that are attended to, D width, H heads, E width of a head, B segments, S longest one.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.dropout import Dropout, beyond
from trainer.kernels import attention
from trainer.kernels.dropout import dropped
from trainer.kernels.layer_norm import add_layer_norm, dropout_add_layer_norm
from trainer.kernels.take_rows import take_rows
from trainer.models.dense import (
    GeluLinear,
    Linear,
    Unbiased,
    biased_beside,
    fuses,
)
from trainer.models.scored_rows import Rows
from trainer.models.segments import Segmented, Segments

SHORT = 256
"""Rows of segments that our attention kernel is made for; FlashAttention takes longer
ones, of which it wastes less."""
_SHORT_TYPES = (torch.bfloat16, torch.float16)
"""Of tables that are attended to unpadded on CUDA."""
FLASH_CHANNELS = 8
"""FlashAttention takes heads of so many channels, or of a multiple."""


class Projected(NamedTuple):
    """Queries, keys and values."""

    tables: tuple[Tensor, ...]
    """(T, 3, H, E) alone; of some rows' queries (N, H, E), (T, H, E), (T, H, E)."""
    bias: Tensor | None = None
    """(3 * D,) that is in the one table already, detached, and has its gradient from
    `attention.attention_packed`; None: the product sees to it."""


class Projection(nn.Linear):
    """Queries, keys and values, of all rows or with queries of some."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(  # type: ignore[override]
        self, x_td: Tensor, stream: Segmented, rows: Rows | None
    ) -> Projected:
        """Of (T, D), for attention inside each segment of the stream."""
        if rows is None:
            bias, apart = self._biases(x_td, stream)
            qkv = F.linear(x_td, self.weight, bias)
            return Projected((self._by_head(qkv),), apart)
        return self.beside(x_td, stream, rows)[0]

    def beside(
        self, x_td: Tensor, stream: Segmented, rows: Rows | None
    ) -> tuple[Projected, Tensor]:
        """The same, and the rows of the queries (N, D) for the residual beside it."""
        if rows is None:
            bias, apart = self._biases(x_td, stream)
            qkv, x_td = biased_beside(x_td, self.weight, bias)
            return Projected((self._by_head(qkv),), apart), x_td
        sizes = [self.in_features, 2 * self.in_features]
        w_q, w_kv = self.weight.split(sizes)
        b_q, b_kv = self.bias.split(sizes)
        q, x_nd = biased_beside(take_rows(x_td, rows.row), w_q, b_q)
        k, v = F.linear(x_td, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return Projected((q.unflatten(-1, (self.heads, -1)), k, v)), x_nd

    def _biases(self, x_td: Tensor, stream: Segmented) -> tuple[Tensor, Tensor | None]:
        """The bias for the product, and for attention if its gradient is from there."""
        if sums_bias(x_td, stream, self.in_features // self.heads):
            return self.bias.detach(), self.bias
        return self.bias, None

    def _by_head(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (3, self.heads, -1))


class Attention(nn.Module):
    """Self-attention inside each segment of the stream."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = Projection(width=width, heads=heads)
        self.out = Linear(width, width)

    def forward(
        self, x_td: Tensor, stream: Segmented, rows: Rows | None = None
    ) -> Unbiased:
        """(T, D) -> (N, D)."""
        return self._of(self.qkv(x_td, stream, rows), stream, rows)

    def beside(
        self, x_td: Tensor, stream: Segmented, rows: Rows | None
    ) -> tuple[Unbiased, Tensor]:
        """The same, and its rows of `x` (N, D) for the residual beside it."""
        given, x_nd = self.qkv.beside(x_td, stream, rows)
        return self._of(given, stream, rows), x_nd

    def _of(self, given: Projected, stream: Segmented, rows: Rows | None) -> Unbiased:
        """Of what `Projection` gives."""
        table, bias = given
        if bias is not None:
            mixed = attention.attention_packed(
                table[0], stream.cu_seqlens, stream.longest, bias
            )
            return self.out.unbiased(mixed.flatten(-2))
        if table[0].is_cuda and table[0].dtype in _SHORT_TYPES:
            mixed = _unpadded(table, stream, rows)
            return self.out.unbiased(mixed.flatten(-2))
        q, k, v = table[0].unbind(1) if rows is None else table
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            mixed = _by_segment(q, k, v, stream, rows)
        else:
            mixed = _padded(q, k, v, stream, rows)
        return self.out.unbiased(mixed.flatten(-2))


class ResidualNorm(nn.LayerNorm):
    """A residual connection and LayerNorm after it."""

    def forward(  # type: ignore[override]
        self, x_nd: Tensor, branch: Unbiased, drop: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of two (N, D), the second after dropout, and its norm."""
        given = (x_nd, branch.table_no, self.weight, self.bias, self.eps)
        if drop is None:
            return add_layer_norm(*given, branch.bias)
        return dropout_add_layer_norm(*given, drop, branch.bias)


class Block(nn.Module):
    """Attention and feed-forward with residuals, post-norm (BERT) or pre-norm."""

    sites: ClassVar[int] = 2

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        ffn_width: int,
        norm: Literal["post", "pre"],
        eps: float,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = Attention(width=width, heads=heads)
        before = nn.LayerNorm if self.pre else ResidualNorm
        self.attention_norm = before(width, eps=eps)
        self.up = GeluLinear(width, ffn_width)
        self.down = Linear(ffn_width, width)
        self.ffn_norm = ResidualNorm(width, eps=eps)

    def forward(
        self,
        x_td: Tensor,
        stream: Segmented,
        rows: Rows | None = None,
        drop: Dropout | None = None,
    ) -> Tensor:
        """(T, D) -> (N, D)."""
        first = drop and drop.of(rows)
        second = beyond(first, 1)
        if self.pre:
            x_nd = x_td if rows is None else take_rows(x_td, rows.row)
            mixed = self.attention(self.attention_norm(x_td), stream, rows)
            x_nd, normed_nd = self.ffn_norm(x_nd, mixed, first)
            return x_nd + dropped(self.down(self.up(normed_nd)), second)
        mixed, x_nd = self.attention.beside(x_td, stream, rows)
        _, x_nd = self.attention_norm(x_nd, mixed, first)
        hidden_nd, x_nd = self.up.beside(x_nd)
        return self.ffn_norm(x_nd, self.down.unbiased(hidden_nd), second)[1]


class Keys(NamedTuple):
    """Where queries of one modality find the rows of the other."""

    row: Tensor
    """(U,) row, among all O, of each that is attended to."""
    segments: Segments
    """Of these rows, as many of pairs as the queries have."""


class CrossAttention(nn.Module):
    """Attention from each segment of a stream to its partner's rows."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(
        self,
        x_nd: Tensor,
        other_od: Tensor,
        own: Segments,
        keys: Keys,
        rows: Rows | None = None,
    ) -> Unbiased:
        """(N, D), (O, D) -> (N, D). Keys and values are made once for each of the O
        rows, however many segments attend to it.
        """
        q = self.query(x_nd).unflatten(-1, (self.heads, -1))
        # Sums of gradients by sorted rows: an index_select would add them in any order.
        both = F.embedding(keys.row, self.key_value(other_od))
        k, v = both.unflatten(-1, (2, self.heads, -1)).unbind(1)
        if q.is_cuda and q.dtype in _SHORT_TYPES:
            mixed = _varlen_across(q, k, v, own, keys.segments, rows)
        else:
            mixed = _padded_across(q, k, v, own, keys.segments, rows)
        return self.out.unbiased(mixed.flatten(-2))


class CrossBlock(nn.Module):
    """Self-attention, if it has one, cross-attention and feed-forward, pre-norm."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        ffn_width: int,
        eps: float,
        self_attention: bool,
    ) -> None:
        super().__init__()
        self.sites = 2 + self_attention
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention, self.cross_norm = None, None
        if self_attention:
            self.attention = Attention(width=width, heads=heads)
            self.cross_norm = ResidualNorm(width, eps=eps)
        self.cross = CrossAttention(width=width, heads=heads)
        self.ffn_norm = ResidualNorm(width, eps=eps)
        self.up = GeluLinear(width, ffn_width)
        self.down = Linear(ffn_width, width)

    def forward(
        self,
        x_td: Tensor,
        other_od: Tensor,
        own: Segments,
        keys: Keys,
        rows: Rows | None = None,
        drop: Dropout | None = None,
    ) -> Tensor:
        """(T, D), (O, D) -> (N, D)."""
        x_nd = x_td if rows is None else take_rows(x_td, rows.row)
        drop = drop and drop.of(rows)
        if self.attention is not None and self.cross_norm is not None:
            mixed = self.attention(self.attention_norm(x_td), own, rows)
            x_nd, normed_nd = self.cross_norm(x_nd, mixed, drop)
            drop = beyond(drop, 1)
        else:
            normed_nd = self.attention_norm(x_nd)
        mixed = self.cross(normed_nd, other_od, own, keys, rows)
        x_nd, normed_nd = self.ffn_norm(x_nd, mixed, drop)
        hidden_nd = self.down(self.up(normed_nd))
        return x_nd + dropped(hidden_nd, beyond(drop, 1))


def sums_bias(x: Tensor, stream: Segmented, width: int) -> bool:
    """Whether a projection of all rows has its bias's gradient from attention: where
    our kernel takes its heads of so many channels, and no compiler sees the bias.
    """
    return fuses(x) and x.dtype in _SHORT_TYPES and _ours(stream, width)


def _ours(stream: Segmented, width: int) -> bool:
    return stream.longest <= SHORT and attention.supported(width)


def _unpadded(
    table: tuple[Tensor, ...], stream: Segmented, rows: Rows | None
) -> Tensor:
    """Attention over unpadded segments, of what `Projection` gives: (N, H, E). CUDA, 16
    bits.
    """
    cu, longest = stream.cu_seqlens, stream.longest
    own = _ours(stream, table[0].shape[-1])
    if rows is None:
        if own:
            return attention.attention_packed(table[0], cu, longest)
        q, k, v = table[0].unbind(1)
        return _varlen(q, k, v, cu, cu, longest, longest)
    q, k, v = table
    if own:
        bounds = rows.cu_seqlens
        return attention.attention(q, k, v, bounds, cu, longest, longest)
    return _varlen(q, k, v, rows.cu_seqlens, cu, longest, longest)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int
) -> Tensor:
    """FlashAttention: (N, H, E) -> (N, H, E). `longest` of queries and of keys."""
    from torch.nn.attention.varlen import varlen_attn

    width = q.shape[-1]
    whole = width + -width % FLASH_CHANNELS
    if whole > width:
        # Scores are divided by the root of the channels that there are.
        parts = (q * (whole / width) ** 0.5, k, v)
        q, k, v = (F.pad(part, (0, whole - width)) for part in parts)
    # By position: the keywords changed between the releases we support.
    mixed = varlen_attn(q, k, v, cu_q, cu_k, *longest)
    assert isinstance(mixed, Tensor)
    return mixed[..., :width]


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, stream: Segmented, rows: Rows | None
) -> Tensor:
    """The same, a segment after the other, for CPUs."""
    sizes = stream.cu_seqlens.diff().tolist()
    if rows is None and len(set(sizes)) == 1:
        q, k, v = (
            part.unflatten(0, (-1, sizes[0])).transpose(1, 2) for part in (q, k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(0, 1)
    wanted = sizes if rows is None else rows.cu_seqlens.diff().tolist()
    parts = zip(q.split(wanted), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_attend(*part) for part in parts if len(part[0])])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a segment: (n, H, E), (S, H, E), (S, H, E) -> (n, H, E)."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, stream: Segmented, rows: Rows | None
) -> Tensor:
    """The same on a (B, S) table with a key mask: fp32 on a GPU, and compiled."""
    if rows is not None:
        # How many rows a segment keeps is not known here: the table has them all.
        q = q.index_select(0, rows.place)
    q, k, v = (_table(part, stream).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=stream.dense_valid[:, None, None, :]
    )
    flat = stream.flat if rows is None else stream.flat[rows.row]
    mixed = mixed.transpose(1, 2).flatten(0, 1)
    return mixed.flatten(1).index_select(0, flat).unflatten(-1, mixed.shape[1:])


def _table(x: Tensor, stream: Segmented) -> Tensor:
    """(T, H, E) -> (B, S, H, E)."""
    table = x.flatten(1).index_select(0, stream.dense.flatten())
    return table.view(*stream.dense.shape, *x.shape[1:])


def _varlen_across(
    q: Tensor, k: Tensor, v: Tensor, own: Segments, other: Segments, rows: Rows | None
) -> Tensor:
    """Attention of each segment to its partner's rows, unpadded: (N, H, E), (U, H, E)
    -> (N, H, E). CUDA, 16 bits.
    """
    inside = own.inside
    bounds = own.cu_seqlens
    if rows is not None:
        bounds = rows.cu_seqlens
        inside = None if inside is None else inside[rows.row]
    # The kernel writes nothing, not even gradients, in rows past the last pair's.
    q, k, v = (
        _only(part, at)
        for part, at in ((q, inside), (k, other.inside), (v, other.inside))
    )
    ends = (bounds[: own.pairs + 1], other.cu_seqlens[: own.pairs + 1])
    mixed = _varlen(q, k, v, *ends, own.longest, other.longest)
    return _only(mixed, inside)


def _only(x: Tensor, inside: Tensor | None) -> Tensor:
    """`x` (T, H, E) with rows that are not `inside` (T,) 0, and so their gradients."""
    return x if inside is None else torch.where(inside[:, None, None], x, 0)


def _padded_across(
    q: Tensor, k: Tensor, v: Tensor, own: Segments, other: Segments, rows: Rows | None
) -> Tensor:
    """The same on tables with a key mask; rows of no pair get some other's result."""
    if rows is not None:
        q = q.index_select(0, rows.place)
    pairs = own.pairs
    q = _rows_at(q, own.dense[:pairs])
    k, v = (_rows_at(part, other.dense[:pairs]) for part in (k, v))
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=other.dense_valid[:pairs, None, None, :]
    )
    flat = own.flat if rows is None else own.flat[rows.row]
    mixed = mixed.transpose(1, 2).flatten(0, 1)
    found = mixed.flatten(1).index_select(0, flat.clamp(max=len(mixed) - 1))
    return found.unflatten(-1, mixed.shape[1:])


def _rows_at(x: Tensor, dense: Tensor) -> Tensor:
    """(T, H, E) at the rows of a table (B, S) -> (B, H, S, E)."""
    table = x.flatten(1).index_select(0, dense.flatten())
    return table.view(*dense.shape, *x.shape[1:]).transpose(1, 2)
