"""Transformer layers on a flat token stream, in BERT's shape.

Owns the layers, and which attention runs where. Does not own the stream
(`trainer.stream`) or which rows of it a loss reads (`trainer.models.scored_rows`).

A layer that is given `Rows` gives these rows of its result alone, from the keys and
values of all: what it does besides is of each row by itself.

Shapes: T stream rows, N rows of the result, D width, H heads, E width of a head, B
segments, S longest one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.layer_norm import add_layer_norm
from trainer.models.scored_rows import Rows
from trainer.stream import Stream


class Projection(nn.Linear):
    """Queries, keys and values, of all rows or with queries of some."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(  # type: ignore[override]
        self, x_td: Tensor, rows: Rows | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> (N, H, E), (T, H, E), (T, H, E)."""
        if rows is None:
            return super().forward(x_td).unflatten(-1, (3, self.heads, -1)).unbind(1)
        sizes = [self.in_features, 2 * self.in_features]
        w_q, w_kv = self.weight.split(sizes)
        b_q, b_kv = self.bias.split(sizes)
        q = F.linear(x_td.index_select(0, rows.row), w_q, b_q)
        k, v = F.linear(x_td, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return q.unflatten(-1, (self.heads, -1)), k, v


class Attention(nn.Module):
    """Self-attention inside each segment of the stream."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = Projection(width=width, heads=heads)
        self.out = nn.Linear(width, width)

    def forward(self, x_td: Tensor, stream: Stream, rows: Rows | None = None) -> Tensor:
        """(T, D) -> (N, D)."""
        q, k, v = self.qkv(x_td, rows)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            mixed = _varlen(q, k, v, stream, rows)
        elif q.device.type == "cpu" and not torch.compiler.is_compiling():
            mixed = _by_segment(q, k, v, stream, rows)
        else:
            mixed = _padded(q, k, v, stream, rows)
        return self.out(mixed.flatten(-2))


class ResidualNorm(nn.LayerNorm):
    """A residual connection and LayerNorm after it."""

    def forward(  # type: ignore[override]
        self, x_nd: Tensor, residual_nd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of two (N, D), and its norm."""
        return add_layer_norm(x_nd, residual_nd, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention and feed-forward with residuals, post-norm (BERT) or pre-norm."""

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
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.ffn_norm = ResidualNorm(width, eps=eps)

    def forward(self, x_td: Tensor, stream: Stream, rows: Rows | None = None) -> Tensor:
        """(T, D) -> (N, D)."""
        kept_nd = x_td if rows is None else x_td.index_select(0, rows.row)
        if self.pre:
            mixed_nd = self.attention(self.attention_norm(x_td), stream, rows)
            x_nd, normed_nd = self.ffn_norm(kept_nd, mixed_nd)
            return x_nd + self._ffn(normed_nd)
        mixed_nd = self.attention(x_td, stream, rows)
        _, x_nd = self.attention_norm(kept_nd, mixed_nd)
        return self.ffn_norm(x_nd, self._ffn(x_nd))[1]

    def _ffn(self, x_nd: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_nd)))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, stream: Stream, rows: Rows | None
) -> Tensor:
    """Attention over unpadded segments: (N, H, E) -> (N, H, E). CUDA, 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = stream.cu_seqlens, stream.longest
    cu_q = cu if rows is None else rows.cu_seqlens
    # By position: the keywords changed between the releases we support.
    mixed = varlen_attn(q, k, v, cu_q, cu, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, stream: Stream, rows: Rows | None
) -> Tensor:
    """The same, a segment after the other, for CPUs."""
    sizes = stream.cu_seqlens.diff().tolist()
    wanted = sizes if rows is None else rows.cu_seqlens.diff().tolist()
    parts = zip(q.split(wanted), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_attend(*part) for part in parts if len(part[0])])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a segment: (n, H, E), (S, H, E), (S, H, E) -> (n, H, E)."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, stream: Stream, rows: Rows | None
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


def _table(x: Tensor, stream: Stream) -> Tensor:
    """(T, H, E) -> (B, S, H, E)."""
    table = x.flatten(1).index_select(0, stream.dense.flatten())
    return table.view(*stream.dense.shape, *x.shape[1:])
