"""Self-attention of many short unpadded segments, forward and backward.

Owns the kernels, their tiles and their reference. Does not own the projections around
them or which rows a layer computes (`trainer.models.layers`), or where segments begin
(`trainer.models.segments`, `trainer.stream`).

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
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import observed

_WIDTHS = (16, 32, 64, 128)


class Tiles(NamedTuple):
    """How a pass is cut up."""

    own: int
    """Rows that a program has."""
    step: int
    """Rows that it goes over at a time."""
    warps: int
    stages: int


# By channels of a head, in 16 bits; in 32, which only tests use, `_EXACT`. Those of 64
# channels were the fastest of five to seven on an H200, for segments of 73 and of 168
# rows on average (`benchmarks/README.md`).
_FORWARD = {
    16: Tiles(64, 32, 4, 2),
    32: Tiles(64, 32, 4, 2),
    64: Tiles(64, 32, 4, 3),
    128: Tiles(64, 32, 4, 2),
}
_BACKWARD = {
    16: Tiles(64, 32, 4, 2),
    32: Tiles(64, 32, 4, 2),
    64: Tiles(64, 32, 4, 3),
    128: Tiles(64, 32, 4, 2),
}
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
    out: Tensor = _forward(*given)[0] if observed() else _Attention.apply(*given)
    return out


def attention_packed_fused(qkv: Tensor, cu: Tensor, longest: int) -> Tensor:
    """The kernel, wherever the tensors are."""
    if observed():
        packed: Tensor = _forward_packed(qkv, cu, longest)[0]
    else:
        packed = _PackedAttention.apply(qkv, cu, longest)
    return packed


@triton.jit(do_not_specialize=["rows"])
def _attention_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cu_q_ptr,
    cu_k_ptr,
    out_ptr,
    lse_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    rows,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program for each OWN queries of each head of each segment, and after the last
    segment some for the rows that are left. `scale` is of scores in bits; so is lse.
    """
    first = tl.program_id(0) * OWN
    head = tl.program_id(1)
    segment = tl.program_id(2)
    start = tl.load(cu_q_ptr + segment).to(tl.int64)
    out_ptr += start * out_row + head * WIDTH
    lse_ptr += head.to(tl.int64) * rows + start
    if segment == tl.num_programs(2) - 1:
        left, blocks = (rows - start).to(tl.int32), tl.num_programs(0)
        _clear(out_ptr, tl.program_id(0), blocks, left, out_row, OWN, WIDTH)
        # A column of one.
        _clear(lse_ptr, tl.program_id(0), blocks, left, 1, OWN, 1)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start).to(tl.int32)
        if first < queries:
            start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
            keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
            q_ptr += start * q_row + head * q_head
            k_ptr += start_k * k_row + head * k_head
            v_ptr += start_k * v_row + head * v_head
            q = _read(q_ptr, first, queries, q_row, OWN, WIDTH)
            top = tl.full((OWN,), float("-inf"), tl.float32)
            whole = tl.zeros((OWN,), tl.float32)
            mixed = tl.zeros((OWN, WIDTH), tl.float32)
            for at in range(0, _bound(keys), STEP):
                k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
                v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
                scores = _dot(q, tl.trans(k), None) * scale
                inside = at + tl.arange(0, STEP) < keys
                scores = tl.where(inside[None, :], scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                weights = tl.exp2(scores - higher[:, None])
                shrunk = tl.exp2(top - higher)
                whole = whole * shrunk + tl.sum(weights, 1)
                mixed = mixed * shrunk[:, None]
                mixed = _dot(weights.to(v.dtype), v, mixed)
                top = higher
            # Over no keys it is 0.
            mixed = mixed / tl.where(whole > 0, whole, 1.0)[:, None]
            _write(out_ptr, mixed, first, queries, out_row, OWN, WIDTH)
            row = first + tl.arange(0, OWN)
            tl.store(lse_ptr + row, top + tl.log2(whole), mask=row < queries)


@triton.jit(do_not_specialize=["rows_q", "rows_k", "blocks_k"])
def _attention_backward_kernel(  # type: ignore[no-untyped-def]
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_out_row,
    d_out_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    d_q_row,
    d_k_row,
    d_v_row,
    rows_q,
    rows_k,
    blocks_k,
    bits,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of each head of each segment a program for each OWN keys, the first `blocks_k`,
    and one for each OWN queries; after the last segment for the rows that are left.
    `bits` is the scale of scores in bits.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2)
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    d_q_ptr += start_q * d_q_row + head * WIDTH
    d_k_ptr += start_k * d_k_row + head * WIDTH
    d_v_ptr += start_k * d_v_row + head * WIDTH
    if segment == tl.num_programs(2) - 1:
        if block < blocks_k:
            left = (rows_k - start_k).to(tl.int32)
            _clear(d_k_ptr, block, blocks_k, left, d_k_row, OWN, WIDTH)
            _clear(d_v_ptr, block, blocks_k, left, d_v_row, OWN, WIDTH)
        else:
            left = (rows_q - start_q).to(tl.int32)
            blocks = tl.num_programs(0) - blocks_k
            _clear(d_q_ptr, block - blocks_k, blocks, left, d_q_row, OWN, WIDTH)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
        d_out_ptr += start_q * d_out_row + head * d_out_head
        q_ptr += start_q * q_row + head * q_head
        k_ptr += start_k * k_row + head * k_head
        v_ptr += start_k * v_row + head * v_head
        out_ptr += start_q * out_row + head * WIDTH
        lse_ptr += head.to(tl.int64) * rows_q + start_q
        if block < blocks_k:
            first = block * OWN
            if first < keys:
                k = _read(k_ptr, first, keys, k_row, OWN, WIDTH)
                v = _read(v_ptr, first, keys, v_row, OWN, WIDTH)
                d_k, d_v = _over_queries(
                    *(k, v, q_ptr, d_out_ptr, out_ptr, lse_ptr),
                    *(q_row, d_out_row, out_row, queries, bits, WIDTH, OWN, STEP),
                )
                _write(d_k_ptr, d_k * scale, first, keys, d_k_row, OWN, WIDTH)
                _write(d_v_ptr, d_v, first, keys, d_v_row, OWN, WIDTH)
        else:
            first = (block - blocks_k) * OWN
            if first < queries:
                q, d_out, lse, delta = _read_queries(
                    *(q_ptr, d_out_ptr, out_ptr, lse_ptr),
                    *(first, queries, q_row, d_out_row, out_row, OWN, WIDTH),
                )
                d_q = _over_keys(
                    *(q, d_out, lse, delta, k_ptr, v_ptr),
                    *(k_row, v_row, keys, bits, WIDTH, OWN, STEP),
                )
                _write(d_q_ptr, d_q * scale, first, queries, d_q_row, OWN, WIDTH)


@triton.jit
def _over_queries(  # type: ignore[no-untyped-def]
    k,
    v,
    q_ptr,
    d_out_ptr,
    out_ptr,
    lse_ptr,
    q_row,
    d_out_row,
    out_row,
    queries,
    bits,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of some keys, but for the scale of scores, and of their values."""
    d_k = tl.zeros((OWN, WIDTH), tl.float32)
    d_v = tl.zeros((OWN, WIDTH), tl.float32)
    for at in range(0, _bound(queries), STEP):
        q, d_out, lse, delta = _read_queries(
            *(q_ptr, d_out_ptr, out_ptr, lse_ptr),
            *(at, queries, q_row, d_out_row, out_row, STEP, WIDTH),
        )
        # Keys by queries: so the sums below have it on their left.
        weights = tl.exp2(_dot(k, tl.trans(q), None) * bits - lse[None, :])
        d_v = _dot(weights.to(q.dtype), d_out, d_v)
        d_scores = weights * (_dot(v, tl.trans(d_out), None) - delta[None, :])
        d_k = _dot(d_scores.to(q.dtype), q, d_k)
    return d_k, d_v


@triton.jit
def _over_keys(  # type: ignore[no-untyped-def]
    q,
    d_out,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    keys,
    bits,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradient of some queries, but for the scale of scores."""
    d_q = tl.zeros((OWN, WIDTH), tl.float32)
    for at in range(0, _bound(keys), STEP):
        k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
        v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
        weights = tl.exp2(_dot(q, tl.trans(k), None) * bits - lse[:, None])
        d_scores = weights * (_dot(d_out, tl.trans(v), None) - delta[:, None])
        # Else of no key it is a number times 0, and may be infinite.
        inside = at + tl.arange(0, STEP) < keys
        d_scores = tl.where(inside[None, :], d_scores, 0.0)
        d_q = _dot(d_scores.to(k.dtype), k, d_q)
    return d_q


@triton.jit(do_not_specialize=["rows_q", "rows_k"])
def _attention_backward_whole_kernel(  # type: ignore[no-untyped-def]
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_out_row,
    d_out_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    d_q_row,
    d_k_row,
    d_v_row,
    rows_q,
    rows_k,
    bits,
    scale,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program for each head of each segment of at most PARTS times OWN queries, and
    after the last segment for the rows that are left.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    d_q_ptr += start_q * d_q_row + head * WIDTH
    d_k_ptr += start_k * d_k_row + head * WIDTH
    d_v_ptr += start_k * d_v_row + head * WIDTH
    if segment == tl.num_programs(1) - 1:
        # One, number 0.
        block, blocks = tl.program_id(2), tl.num_programs(2)
        left = (rows_q - start_q).to(tl.int32)
        _clear(d_q_ptr, block, blocks, left, d_q_row, OWN, WIDTH)
        left = (rows_k - start_k).to(tl.int32)
        _clear(d_k_ptr, block, blocks, left, d_k_row, OWN, WIDTH)
        _clear(d_v_ptr, block, blocks, left, d_v_row, OWN, WIDTH)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
        d_out_ptr += start_q * d_out_row + head * d_out_head
        q_ptr += start_q * q_row + head * q_head
        k_ptr += start_k * k_row + head * k_head
        v_ptr += start_k * v_row + head * v_head
        out_ptr += start_q * out_row + head * WIDTH
        lse_ptr += head.to(tl.int64) * rows_q + start_q
        q, d_out, lse, delta, d_q = (), (), (), (), ()
        for part in tl.static_range(PARTS):
            one = _read_queries(
                *(q_ptr, d_out_ptr, out_ptr, lse_ptr),
                *(part * OWN, queries, q_row, d_out_row, out_row, OWN, WIDTH),
            )
            q += (one[0],)  # type: ignore[assignment]
            d_out += (one[1],)  # type: ignore[assignment]
            lse += (one[2],)  # type: ignore[assignment]
            delta += (one[3],)  # type: ignore[assignment]
            d_q += (tl.zeros((OWN, WIDTH), tl.float32),)  # type: ignore[assignment]
        for at in range(0, _bound(keys), STEP):
            k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
            v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
            inside = (at + tl.arange(0, STEP) < keys)[None, :]
            # Channels by keys: of enough rows for the largest products.
            d_k = tl.zeros((WIDTH, STEP), tl.float32)
            d_v = tl.zeros((WIDTH, STEP), tl.float32)
            grown = ()
            for part in tl.static_range(PARTS):
                scores = _dot(q[part], tl.trans(k), None) * bits
                weights = tl.exp2(scores - lse[part][:, None])
                d_v = _dot(tl.trans(d_out[part]), weights.to(k.dtype), d_v)
                d_weights = _dot(d_out[part], tl.trans(v), None)
                d_scores = weights * (d_weights - delta[part][:, None])
                d_scores = tl.where(inside, d_scores, 0.0).to(k.dtype)
                d_k = _dot(tl.trans(q[part]), d_scores, d_k)
                grown += (_dot(d_scores, k, d_q[part]),)  # type: ignore[assignment]
            d_q = grown
            _write(d_k_ptr, tl.trans(d_k) * scale, at, keys, d_k_row, STEP, WIDTH)
            _write(d_v_ptr, tl.trans(d_v), at, keys, d_v_row, STEP, WIDTH)
        for part in tl.static_range(PARTS):
            whole = d_q[part] * scale
            _write(d_q_ptr, whole, part * OWN, queries, d_q_row, OWN, WIDTH)


@triton.jit
def _read_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    d_out_ptr,
    out_ptr,
    lse_ptr,
    first,
    end,
    q_row,
    d_out_row,
    out_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some queries, gradients of what they mixed, the logarithms that make weights of
    their scores, infinite from `end` on, and the means of their weights' gradients.
    """
    q = _read(q_ptr, first, end, q_row, ROWS, WIDTH)
    d_out = _read(d_out_ptr, first, end, d_out_row, ROWS, WIDTH)
    out = _read(out_ptr, first, end, out_row, ROWS, WIDTH)
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < end, other=float("inf"))
    return q, d_out, lse, tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    ptr, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows from `first` on of a head of a segment; from `end` on they are zeros."""
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + at, mask=(row < end)[:, None], other=0.0)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    ptr, value, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The other way; from `end` on nothing is written."""
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit
def _clear(  # type: ignore[no-untyped-def]
    ptr, block, blocks, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Zeros to the rows up to `end`, which may be far, that are in a block of ROWS with
    this number among every so many.
    """
    first, along = block * ROWS, blocks * ROWS
    for start in range(_bound(first), _bound(end), _bound(along)):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
        zeros = tl.zeros((ROWS, WIDTH), ptr.dtype.element_ty)
        tl.store(ptr + at, zeros, mask=(row < end)[:, None])


@triton.jit
def _dot(left, right, onto):  # type: ignore[no-untyped-def]
    """Their product, added to `onto` if that is something; nothing is rounded first."""
    return tl.dot(left, right, onto, input_precision="ieee")


@triton.jit
def _bound(number):  # type: ignore[no-untyped-def]
    """`number`, as a bound of a loop."""
    return number


if triton.knobs.runtime.interpret:
    # The interpreter of Triton 3.6 multiplies bf16 as if its bits were integers, and
    # makes no bound of a tensor under numpy 2.4.
    def _dot(left: Any, right: Any, onto: Any) -> Any:
        left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, onto, input_precision="ieee")

    def _bound(number: Any) -> int:
        return int(number.handle.data.item())


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
    return _launch_forward(q, k, v, cu_q, cu_k, longest_q)


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
        _attention_forward_kernel[(_blocks(longest, tiles), heads, len(cu_q))](
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
    kept = (q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k)
    return _launch_apart_backward(d_out, *kept)


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
    given = (
        *(d_out, q, k, v, out, lse, cu_q.contiguous(), cu_k.contiguous()),
        *(d_q, d_k, d_v),
        *(*d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(out.stride(0), d_q.stride(0), d_k.stride(0), d_v.stride(0)),
        *(rows, len(k)),
    )
    scales = (width**-0.5 * math.log2(math.e), width**-0.5)
    if not (d_q.numel() or d_k.numel()):
        return
    whole = _whole(longest_q, q)
    if whole is not None:
        parts, tiles = whole
        _attention_backward_whole_kernel[(heads, len(cu_q), 1)](
            *given,
            *scales,
            PARTS=parts,
            WIDTH=width,
            OWN=tiles.own,
            STEP=tiles.step,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return
    tiles = _tiles(_BACKWARD, q)
    blocks_q, blocks_k = _blocks(longest_q, tiles), _blocks(longest_k, tiles)
    _attention_backward_kernel[(blocks_k + blocks_q, heads, len(cu_q))](
        *given,
        blocks_k,
        *scales,
        WIDTH=width,
        OWN=tiles.own,
        STEP=tiles.step,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    q, k, v, cu_q, cu_k, *ctx.longest = inputs
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(
    ctx: Any, d_out: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 7
    return *_backward(d_out, *ctx.saved_tensors, *ctx.longest), *[None] * 4


_forward.register_autograd(_differentiate, setup_context=_keep)


@library.custom_op("palimpsest::attention_packed", mutates_args=())
def _forward_packed(qkv: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
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
    ctx: Any, d_out: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if d_out is None:
        return None, None, None
    return _backward_packed(d_out, *ctx.saved_tensors, ctx.longest), None, None


_forward_packed.register_autograd(_differentiate_packed, setup_context=_keep_packed)


class _Attention(torch.autograd.Function):
    """The operator without its way through `torch.library`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        q, k, v, cu_q, cu_k, *ctx.longest = given
        out, lse = _launch_forward(q, k, v, cu_q, cu_k, ctx.longest[0])
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = _launch_apart_backward(*grads, *ctx.saved_tensors, *ctx.longest)
        return *found, *[None] * 4


class _PackedAttention(torch.autograd.Function):
    """The same of the packed one."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu: Tensor, longest: int) -> Tensor:
        q, k, v = qkv.unbind(1)
        out, lse = _launch_forward(q, k, v, cu, cu, longest)
        ctx.longest = longest
        ctx.save_for_backward(qkv, out, lse, cu)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (d_out,) = grads
        qkv, out, lse, cu = ctx.saved_tensors
        found = _launch_packed_backward(d_out, qkv, out, lse, cu, ctx.longest)
        return found, None, None


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
