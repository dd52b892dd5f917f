"""Self-attention of many short unpadded segments, forward and backward.

Owns the operators, their tiles and their reference. Does not own what a program does
(`trainer.kernels.attention_kernels`), what it is held against its reference on
(`trainer.kernels.attention_cases`), the projections around them or which rows a layer
computes (`trainer.models.layers`), or where segments begin (`trainer.models.segments`,
`trainer.stream`).

A program has some rows of one segment and one head: queries in a forward pass. In a
backward pass it has all of a segment's queries, with their gradients in registers, and
goes over the keys; or, where those are too many, either some keys, for which it goes
over the queries, or some queries, for which it goes over the keys, both in one launch.
Scores are formed again rather than kept; sums are fp32 and in a fixed order, without
atomics: the same inputs give the same bits. Rows past the last segment are zeros, and
so are their gradients.

A bias that queries, keys and values have from one product has its gradient from here:
the fp32 sum of theirs over the rows, as they are written, of which each program with
queries writes its part. Weights of a query add up to 1, so that of the values is the
sum of the output's gradients; and if all keys move alike, no weight changes, so that of
the keys is 0. Both are exact, and the programs that go over keys need not add.

Dao, "FlashAttention-2", 2023. Shapes: N queries, T keys, H heads, E channels of a head,
B segments, S longest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, library

from trainer.kernels.attention_cases import Forms, attention_cases
from trainer.kernels.attention_kernels import (
    attention_backward_kernel,
    attention_backward_whole_kernel,
    attention_delta_kernel,
    attention_forward_kernel,
)
from trainer.kernels.parts import direct, observed, sum_parts

_WIDTHS = (16, 32, 64, 128)


class Tiles(NamedTuple):
    """How a pass is cut up."""

    own: int
    """Rows that a program has."""
    step: int
    """Rows that it goes over at a time."""
    warps: int
    stages: int
    registers: int | None = None
    """Most of a thread, where the compiler would take more and fewer programs would
    then run side by side."""


# By channels of a head, in 16 bits; in 32, which only tests use, `_EXACT`. Those of 64
# channels were the fastest of four or five on an H200, or as fast, for segments of 73
# and of 168 rows on average (`benchmarks/README.md`); of up to 64, none were tried.
_FORWARD = {
    16: Tiles(64, 32, 4, 2),
    32: Tiles(64, 32, 4, 2),
    64: Tiles(64, 32, 4, 3),
    128: Tiles(64, 32, 4, 2),
}
_BACKWARD = {
    16: Tiles(64, 32, 4, 2),
    32: Tiles(64, 32, 4, 2),
    64: Tiles(64, 32, 4, 2, registers=128),
    128: Tiles(64, 32, 4, 2),
}
_DELTA_ROWS = 64
"""Queries of a program that makes delta, of which `attention_backward_kernel` reads."""
_EXACT = Tiles(32, 32, 4, 1)
# Of backward passes in which a program has a whole segment: the first whose `own` rows,
# times so many, are enough for the longest one. If none are, two programs share it.
_WHOLE: dict[int, tuple[tuple[int, Tiles], ...]] = {
    64: (
        (1, Tiles(64, 32, 4, 2, registers=128)),
        (1, Tiles(128, 32, 8, 1, registers=128)),
    ),
}
_EXACT_WHOLE = ((3, Tiles(32, 32, 4, 1)),)


def supported(width: int) -> bool:
    """Whether the kernels take heads of so many channels."""
    return width in _WIDTHS


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> Tensor:
    """Attention of the queries of each segment to its keys, (N, H, E). On CUDA by one
    kernel.

    Args:
        q: (N, H, E), channels side by side; rows and heads may lie anywhere.
        k: (T, H, E), likewise.
        v: (T, H, E), likewise.
        cu_q: (B + 1,) integers, boundaries of segments among the queries. Segments may
            be empty; queries past the last are no segment's, and have zeros.
        cu_k: (B + 1,) the same among the keys. Without keys a query has zeros.
        longest_q: no segment has more queries.
        longest_k: nor more keys.
    """
    chosen = attention_fused if q.is_cuda else attention_ref
    return chosen(q, k, v, cu_q, cu_k, longest_q, longest_k)


def attention_packed(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None = None
) -> Tensor:
    """The same (T, H, E) of queries, keys and values in one table (T, 3, H, E), whose
    gradient is one table too: nothing is put together afterwards.

    Args:
        bias: 3 * H * E numbers that the table's rows have in them already; they are not
            added here. Given only for their gradient, the sum of the table's over its
            rows, so the table must have been made with the bias detached.
    """
    chosen = attention_packed_fused if qkv.is_cuda else attention_packed_ref
    return chosen(qkv, cu, longest, bias)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> Tensor:
    """`attention` in plain torch, a segment after the other."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    found = []
    for segment in range(len(bounds_q) - 1):
        own = slice(bounds_q[segment], bounds_q[segment + 1])
        other = slice(bounds_k[segment], bounds_k[segment + 1])
        scores = torch.einsum("nhe,she->hns", q[own], k[other]) * q.shape[-1] ** -0.5
        found.append(torch.einsum("hns,she->nhe", scores.softmax(-1), v[other]))
    return torch.cat([*found, torch.zeros_like(q[bounds_q[-1] :])])


def attention_packed_ref(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None = None
) -> Tensor:
    """`attention_packed` in plain torch."""
    if bias is not None:
        # Zeros that have its gradient.
        qkv = qkv + (bias - bias.detach()).view(qkv.shape[1:]).to(qkv.dtype)
    q, k, v = qkv.unbind(1)
    return attention_ref(q, k, v, cu, cu, longest, longest)


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> Tensor:
    """The kernel, wherever the tensors are."""
    given = (q, k, v, cu_q, cu_k, longest_q, longest_k)
    out: Tensor = (_forward if observed() else _direct)(*given)[0]
    return out


def attention_packed_fused(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None = None
) -> Tensor:
    """The kernel, wherever the tensors are."""
    called = _forward_packed if observed() else _direct_packed
    out: Tensor = called(qkv, cu, longest, bias)[0]
    return out


@library.custom_op("palimpsest::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> tuple[Tensor, Tensor]:
    """Attention (N, H, E), and the logarithm to base 2 (H, N), fp32, of the sum of the
    powers of every query's scores.
    """
    return _launch_apart(q, k, v, cu_q, cu_k, longest_q, longest_k)


def _launch_apart(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int
) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, v, cu_q, cu_k, longest[0])


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> tuple[Tensor, Tensor]:
    return _results_like(q)


def _results_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """What a forward pass gives, by shape."""
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (_side_by_side(part) for part in (q, k, v))
    rows, heads, width = q.shape
    out, lse = _results_like(q)
    tiles = _tiles(_FORWARD, q)
    if out.numel():
        attention_forward_kernel[(_blocks(longest, tiles), heads, len(cu_q))](
            *(q, k, v, cu_q.contiguous(), cu_k.contiguous(), out, lse),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0)),
            rows,
            width**-0.5 * math.log2(math.e),
            WIDTH=width,
            OWN=tiles.own,
            STEP=tiles.step,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out, lse


@library.custom_op("palimpsest::attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    bounds = (cu_q, cu_k, longest_q, longest_k)
    return _launch_apart_backward(d_out, q, k, v, out, lse, *bounds)


def _launch_apart_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *kept: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (part.new_empty(part.shape) for part in (q, k, v))
    out, lse, cu_q, cu_k, longest_q, longest_k = kept
    bounds = (cu_q, cu_k, longest_q, longest_k)
    _launch_backward(d_out, q, k, v, out, lse, *bounds, d_q, d_k, d_v)
    return d_q, d_k, d_v


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    *,
    biased: bool = False,
) -> Tensor:
    """Writes all of `d_q`, `d_k` and `d_v`, whose heads lie side by side. Gives parts
    of the gradients of their biases (3, G, H * E), fp32: none unless `biased`, for
    which the segments of queries are those of keys.
    """
    d_out, q, k, v = (_side_by_side(part) for part in (d_out, q, k, v))
    rows, heads, width = q.shape
    tables = (d_out, q, k, v)
    bounds = (cu_q.contiguous(), cu_k.contiguous())
    found = (d_q, d_k, d_v)
    rows_and_heads = [number for table in tables for number in table.stride()[:2]]
    rows_found = [table.stride(0) for table in found]
    scales = (width**-0.5 * math.log2(math.e), width**-0.5)
    whole = _whole(longest_q, q)
    tiles = _tiles(_BACKWARD, q) if whole is None else whole[1]
    blocks_q, blocks_k = _blocks(longest_q, tiles), _blocks(longest_k, tiles)
    busy = d_q.numel() or d_k.numel()
    segments = len(cu_q) - 1 if biased and busy else 0
    count = segments * (blocks_q if whole is None else 1)
    parts = q.new_empty(3, count, heads * width, dtype=torch.float32)
    if not busy:
        return parts
    if whole is not None:
        attention_backward_whole_kernel[(heads, len(cu_q), 1)](
            *(*tables, out, lse, *bounds, *found, parts),
            *(*rows_and_heads, out.stride(0), *rows_found),
            *(rows, len(k), *scales),
            HAS_BIAS=biased,
            PARTS=whole[0],
            WIDTH=width,
            OWN=tiles.own,
            STEP=tiles.step,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )
        return parts
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(rows, _DELTA_ROWS), heads)](
        *(d_out, out, delta, *d_out.stride()[:2], out.stride(0), rows),
        WIDTH=width,
        ROWS=_DELTA_ROWS,
        num_warps=4,
    )
    attention_backward_kernel[(blocks_k + blocks_q, heads, len(cu_q))](
        *(*tables, lse, delta, *bounds, *found, parts),
        *(*rows_and_heads, *rows_found),
        *(rows, len(k), blocks_k, *scales),
        HAS_BIAS=biased,
        WIDTH=width,
        OWN=tiles.own,
        STEP=tiles.step,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )
    return parts


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    q, k, v, cu_q, cu_k, *ctx.longest = inputs
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(
    backward: Callable[..., tuple[Tensor, ...]], ctx: Any, d_out: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 7
    return *backward(d_out, *ctx.saved_tensors, *ctx.longest), *[None] * 4


_forward.register_autograd(partial(_differentiate, _backward), setup_context=_keep)
_direct = direct(_launch_apart, _keep, partial(_differentiate, _launch_apart_backward))


@library.custom_op("palimpsest::attention_packed", mutates_args=())
def _forward_packed(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
    return _launch_packed(qkv, cu, longest, bias)


def _launch_packed(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return _launch_forward(q, k, v, cu, cu, longest)


@_forward_packed.register_fake
def _(
    qkv: Tensor, cu: Tensor, longest: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _results_like(qkv.select(1, 0))


@library.custom_op("palimpsest::attention_packed_backward", mutates_args=())
def _backward_packed(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    of_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradient (T, 3, H, E) of all three, and of their bias (3, H * E), in the type
    that is named, if one is.
    """
    return _launch_packed_backward(d_out, qkv, out, lse, cu, longest, of_bias)


def _launch_packed_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    of_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    found = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(1)
    d_q, d_k, d_v = found.unbind(1)
    kept = (q, k, v, out, lse, cu, cu, longest, longest)
    biased = of_bias is not None
    parts = _launch_backward(d_out, *kept, d_q, d_k, d_v, biased=biased)
    return found, _no_sums(qkv) if of_bias is None else sum_parts(parts, of_bias)


def _no_sums(qkv: Tensor) -> Tensor:
    return qkv.new_empty(0)


@_backward_packed.register_fake
def _(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    of_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    found = qkv.new_empty(qkv.shape)
    if of_bias is None:
        return found, _no_sums(qkv)
    features = qkv.shape[2] * qkv.shape[3]
    return found, qkv.new_empty(3, features, dtype=of_bias)


def _keep_packed(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    qkv, cu, ctx.longest, bias = inputs
    ctx.bias = bias if bias is None else (bias.dtype, bias.shape)
    ctx.save_for_backward(qkv, out, lse, cu)


def _differentiate_packed(
    backward: Callable[..., tuple[Tensor, Tensor]],
    ctx: Any,
    d_out: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 4
    given = (d_out, *ctx.saved_tensors, ctx.longest)
    if not ctx.needs_input_grad[3]:
        return backward(*given, None)[0], None, None, None
    dtype, shape = ctx.bias
    d_qkv, d_bias = backward(*given, dtype)
    return d_qkv, None, None, d_bias.view(shape)


_forward_packed.register_autograd(
    partial(_differentiate_packed, _backward_packed), setup_context=_keep_packed
)
_direct_packed = direct(
    _launch_packed,
    _keep_packed,
    partial(_differentiate_packed, _launch_packed_backward),
)


def _side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only if a head's channels do not lie one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(chosen: dict[int, Tiles], q: Tensor) -> Tiles:
    return chosen[q.shape[-1]] if q.dtype.itemsize == 2 else _EXACT


def _whole(longest: int, q: Tensor) -> tuple[int, Tiles] | None:
    """Parts that a program has of the longest segment's queries, and of how many."""
    choices = _WHOLE.get(q.shape[-1], ())
    exact = choices and q.dtype.itemsize != 2
    for most, tiles in _EXACT_WHOLE if exact else choices:
        if longest <= most * tiles.own:
            return _blocks(longest, tiles), tiles
    return None


def _blocks(longest: int, tiles: Tiles) -> int:
    """Programs of a segment; at least one, for the rows that are in none."""
    return max(triton.cdiv(longest, tiles.own), 1)


CASES = attention_cases(
    Forms(attention_fused, attention_ref),
    Forms(attention_packed_fused, attention_packed_ref),
)
