"""Self-attention of many short unpadded segments, forward and backward.

Owns the operators, their tiles and their reference. Does not own what a program does
(`trainer.kernels.attention_kernels`), the projections around them or which rows a layer
computes (`trainer.models.layers`), or where segments begin (`trainer.models.segments`,
`trainer.stream`).

A program has some rows of one segment and one head: queries in a forward pass. In a
backward pass it has all of a segment's queries, with their gradients in registers, and
goes over the keys; or, where those are too many, either some keys, for which it goes
over the queries, or some queries, for which it goes over the keys, both in one launch.
Scores are formed again rather than kept; sums are fp32 and in a fixed order, without
atomics: the same inputs give the same bits. Rows past the last segment are zeros, and
so are their gradients.

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

from trainer.kernels.attention_kernels import (
    attention_backward_kernel,
    attention_backward_whole_kernel,
    attention_delta_kernel,
    attention_forward_kernel,
)
from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import direct, observed

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
        (1, Tiles(64, 32, 4, 2)),
        (1, Tiles(128, 32, 8, 1)),
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


def attention_packed(qkv: Tensor, cu: Tensor, longest: int) -> Tensor:
    """The same (T, H, E) of queries, keys and values in one table (T, 3, H, E), whose
    gradient is one table too: nothing is put together afterwards.
    """
    chosen = attention_packed_fused if qkv.is_cuda else attention_packed_ref
    return chosen(qkv, cu, longest)


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


def attention_packed_ref(qkv: Tensor, cu: Tensor, longest: int) -> Tensor:
    """`attention_packed` in plain torch."""
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


def attention_packed_fused(qkv: Tensor, cu: Tensor, longest: int) -> Tensor:
    """The kernel, wherever the tensors are."""
    called = _forward_packed if observed() else _direct_packed
    out: Tensor = called(qkv, cu, longest)[0]
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
) -> None:
    """Writes all of the last three, whose heads lie side by side."""
    d_out, q, k, v = (_side_by_side(part) for part in (d_out, q, k, v))
    rows, heads, width = q.shape
    if not (d_q.numel() or d_k.numel()):
        return
    tables = (d_out, q, k, v)
    bounds = (cu_q.contiguous(), cu_k.contiguous())
    found = (d_q, d_k, d_v)
    rows_and_heads = [number for table in tables for number in table.stride()[:2]]
    rows_found = [table.stride(0) for table in found]
    scales = (width**-0.5 * math.log2(math.e), width**-0.5)
    whole = _whole(longest_q, q)
    if whole is not None:
        parts, tiles = whole
        attention_backward_whole_kernel[(heads, len(cu_q), 1)](
            *(*tables, out, lse, *bounds, *found),
            *(*rows_and_heads, out.stride(0), *rows_found),
            *(rows, len(k), *scales),
            PARTS=parts,
            WIDTH=width,
            OWN=tiles.own,
            STEP=tiles.step,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(rows, _DELTA_ROWS), heads)](
        *(d_out, out, delta, *d_out.stride()[:2], out.stride(0), rows),
        WIDTH=width,
        ROWS=_DELTA_ROWS,
        num_warps=4,
    )
    tiles = _tiles(_BACKWARD, q)
    blocks_q, blocks_k = _blocks(longest_q, tiles), _blocks(longest_k, tiles)
    attention_backward_kernel[(blocks_k + blocks_q, heads, len(cu_q))](
        *(*tables, lse, delta, *bounds, *found),
        *(*rows_and_heads, *rows_found),
        *(rows, len(k), blocks_k, *scales),
        WIDTH=width,
        OWN=tiles.own,
        STEP=tiles.step,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )


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
def _forward_packed(qkv: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
    return _launch_packed(qkv, cu, longest)


def _launch_packed(qkv: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return _launch_forward(q, k, v, cu, cu, longest)


@_forward_packed.register_fake
def _(qkv: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return _results_like(qkv.select(1, 0))


@library.custom_op("palimpsest::attention_packed_backward", mutates_args=())
def _backward_packed(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu: Tensor, longest: int
) -> Tensor:
    """Gradient (T, 3, H, E) of all three."""
    return _launch_packed_backward(d_out, qkv, out, lse, cu, longest)


def _launch_packed_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu: Tensor, longest: int
) -> Tensor:
    found = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(1)
    d_q, d_k, d_v = found.unbind(1)
    kept = (q, k, v, out, lse, cu, cu, longest, longest)
    _launch_backward(d_out, *kept, d_q, d_k, d_v)
    return found


@_backward_packed.register_fake
def _(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu: Tensor, longest: int
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_packed(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    qkv, cu, ctx.longest = inputs
    ctx.save_for_backward(qkv, out, lse, cu)


def _differentiate_packed(
    backward: Callable[..., Tensor], ctx: Any, d_out: Tensor | None, *_: Any
) -> tuple[Tensor | None, None, None]:
    if d_out is None:
        return None, None, None
    return backward(d_out, *ctx.saved_tensors, ctx.longest), None, None


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


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    left: int,
    heads: int,
    width: int,
    packed: bool,
) -> Inputs:
    # On the host, so that all devices see the same numbers.
    draw = torch.Generator().manual_seed(seed)
    rows, other = sum(queries) + left, sum(keys) + left
    drawn = torch.randn(other, 3, heads, width, generator=draw)
    qkv = drawn.to(device, dtype)
    cu_q, cu_k = (
        torch.tensor([0, *each]).cumsum(0).to(device, torch.int32)
        for each in (queries, keys)
    )
    longest_q, longest_k = max(queries), max(keys)
    if packed:
        return qkv.requires_grad_(), cu_k, longest_k
    q, k, v = qkv.unbind(1)
    parts = (part.requires_grad_() for part in (q[:rows], k, v))
    return *parts, cu_q, cu_k, longest_q, longest_k


def _case(
    keys: tuple[int, ...],
    *,
    heads: int,
    width: int,
    queries: tuple[int, ...] | None = None,
    left: int = 0,
    small: bool = False,
) -> Case:
    """Of the packed entry if every row is a query."""
    packed = queries is None
    queries = keys if queries is None else queries
    own, other = sum(queries) + left, sum(keys) + left
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    product = 2.0 * pairs * heads * width

    def moved_bytes(dtype: torch.dtype, *, own_tables: int, tables: int) -> int:
        rows = own_tables * own + tables * other
        return heads * (rows * width * dtype.itemsize + 4 * own)

    spread = f"T={other} B={len(keys)} S={max(keys)} H={heads} E={width}"
    return Case(
        kernel="attention, packed" if packed else "attention",
        shape=spread if packed else f"N={own} {spread}",
        inputs=partial(
            _inputs,
            queries=queries,
            keys=keys,
            left=left,
            heads=heads,
            width=width,
            packed=packed,
        ),
        fused=attention_packed_fused if packed else attention_fused,
        reference=attention_packed_ref if packed else attention_ref,
        tolerances={torch.float32: 5e-6, torch.bfloat16: 1.5e-2},
        reason=(
            "fp32: rounding of sums over channels and rows. bf16: weights and their "
            "gradients are rounded to 8 bits before products that sum in fp32, and "
            "outputs, from which the backward pass starts, after them: 2^-9 each on "
            "average of a relative error, cut off to by twice that under Triton's "
            "interpreter"
        ),
        # Reads three tables, writes one and a number for each query and head.
        forward_bytes=partial(moved_bytes, own_tables=2, tables=2),
        # Reads those and the gradient of the output, writes three.
        backward_bytes=partial(moved_bytes, own_tables=4, tables=4),
        forward_flops=2 * product,
        backward_flops=5 * product,
        small=small,
    )


def _micro_batch(image: int) -> tuple[int, ...]:
    """Rows of 96 pairs of an image and 12 to 36 words."""
    return tuple(image + 12 + 7 * pair % 25 for pair in range(96))


_odd = partial(_case, (1, 7, 64, 0, 65, 130), small=True)

# Micro-batches of mlim-base (49 image tokens) and mlim-large-384 (144), whose last
# layer computes some of the rows.
CASES = (
    _odd(heads=2, width=16, left=5),
    _odd(heads=1, width=64),
    _odd(heads=1, width=16, queries=(1, 0, 64, 0, 3, 70), left=67),
    _odd(heads=1, width=128, queries=(0, 7, 1, 0, 65, 129), left=3),
    _case((33, 32), heads=3, width=32, left=200, small=True),
    _case((33, 1, 0, 70), heads=2, width=64, left=80, small=True),
    _case((80, 7, 33), heads=1, width=64, queries=(64, 0, 3), left=1, small=True),
    _case(_micro_batch(49), heads=12, width=64, left=7),
    _case(_micro_batch(144), heads=16, width=64, left=7),
    _case(
        _micro_batch(144),
        heads=16,
        width=64,
        queries=tuple(rows // 3 for rows in _micro_batch(144)),
        left=7,
    ),
)
