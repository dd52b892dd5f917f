"""Transformer layers on a flat token stream, in BERT's shape.

Shapes: T stream rows, D width, H heads, E width of a head, B segments, S longest one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.stream import Stream


class Attention(nn.Module):
    """Self-attention inside each segment of the stream."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_td: Tensor, stream: Stream) -> Tensor:
        """(T, D) -> (T, D)."""
        qkv = self.qkv(x_td).unflatten(-1, (3, self.heads, -1))
        if x_td.is_cuda and x_td.dtype in (torch.bfloat16, torch.float16):
            mixed = _varlen(qkv, stream)
        else:
            mixed = _padded(qkv, stream)
        return self.out(mixed.flatten(-2))


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
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x_td: Tensor, stream: Stream) -> Tensor:
        """(T, D) -> (T, D)."""
        if self.pre:
            x_td = x_td + self.attention(self.attention_norm(x_td), stream)
            return x_td + self._ffn(self.ffn_norm(x_td))
        x_td = self.attention_norm(x_td + self.attention(x_td, stream))
        return self.ffn_norm(x_td + self._ffn(x_td))

    def _ffn(self, x_td: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_td)))


def _varlen(qkv: Tensor, stream: Stream) -> Tensor:
    """Attention over unpadded segments: (T, 3, H, E) -> (T, H, E). CUDA, 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cu, longest = stream.cu_seqlens, stream.longest
    # By position: the keywords changed between the releases we support.
    mixed = varlen_attn(q, k, v, cu, cu, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed


def _padded(qkv: Tensor, stream: Stream) -> Tensor:
    """The same on a (B, S) table with a key mask, for CPUs and fp32."""
    table = qkv.flatten(1).index_select(0, stream.dense.flatten())
    shape = (*stream.dense.shape, *qkv.shape[1:])
    q, k, v = table.view(shape).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=stream.dense_valid[:, None, None, :]
    )
    rows = mixed.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows.index_select(0, stream.flat).unflatten(-1, mixed.shape[1::2])
