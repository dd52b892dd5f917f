"""Residual and LayerNorm in one pass over the rows, with or without dropout.

Owns the kernels, forward and backward, and their references. Does not own where a layer
has its norms (`trainer.models.layers`) or what is dropped (`trainer.kernels.dropout`):
it is drawn in the kernel, and again in the backward pass.

Sum, mean and variance are fp32 whatever the inputs are, and so are the gradients of
weight and bias until they are whole: each program adds up its own rows, in their order,
and what the programs found is added in their order too. No atomics: the same inputs
give the same bits.

Ba, Kiros, Hinton, "Layer Normalization", 2016. Shapes: T rows, D width, G programs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.dropout import Dropout
from trainer.kernels import dropout
from trainer.kernels.case import Case, Inputs
from trainer.kernels.dropout import keeps
from trainer.kernels.parts import direct, observed, sum_parts

# Most programs of a backward pass, each with rows of its own: eight for each of the 132
# multiprocessors of an H100 or H200, which hide each other's waits. Not asked of the
# device: sums would depend on it.
_PROGRAMS = 1056


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`x + residual` and its LayerNorm, both (T, D). On CUDA by one kernel.

    Args:
        x: (T, D).
        residual: (T, D), of the same dtype.
        weight: (D,).
        bias: (D,).
    """
    chosen = add_layer_norm_fused if x.is_cuda else add_layer_norm_ref
    return chosen(x, residual, weight, bias, eps)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def dropout_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
) -> tuple[Tensor, Tensor]:
    """The same of `x` and of `branch` after dropout."""
    chosen = dropout_add_layer_norm_fused if x.is_cuda else dropout_add_layer_norm_ref
    return chosen(x, branch, weight, bias, eps, drop)


def dropout_add_layer_norm_ref(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    kept = dropout.dropout_ref(branch, drop)
    return add_layer_norm_ref(x, kept, weight, bias, eps)


@triton.jit(do_not_specialize=dropout.CHOSEN)
def _layer_norm_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    use_ptr,
    uid_ptr,
    place_ptr,
    seed: tl.int64,
    least: tl.int64,
    grow,
    width,
    eps,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        stays = keeps(row, True, use_ptr, uid_ptr, place_ptr, seed, least, width, BLOCK)
        residual = tl.where(stays, residual * grow, 0.0)
    total = x + residual
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = centred * rstd * weight + bias
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=dropout.CHOSEN)
def _layer_norm_backward_kernel(  # type: ignore[no-untyped-def]
    d_normed_ptr,
    d_total_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    d_x_ptr,
    d_branch_ptr,
    d_weight_ptr,
    d_bias_ptr,
    use_ptr,
    uid_ptr,
    place_ptr,
    seed: tl.int64,
    least: tl.int64,
    grow,
    rows,
    width,
    PER_PROGRAM: tl.constexpr,
    DROPS: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * PER_PROGRAM
    start = first.to(tl.int64) * width + column
    for number in range(0, PER_PROGRAM):
        row, at = first + number, start + number * width
        there = row < rows
        live = inside & there
        d_normed = tl.load(d_normed_ptr + at, mask=live, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=live, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)
        unit = tl.where(live, (total - mean) * rstd, 0.0)
        d_weight += d_normed * unit
        d_bias += d_normed
        d_unit = d_normed * weight
        along = tl.sum(d_unit * unit, 0) / width
        d_x = (d_unit - tl.sum(d_unit, 0) / width - unit * along) * rstd
        if HAS_D_TOTAL:
            d_x += tl.load(d_total_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=live)
        if DROPS:
            stays = keeps(
                row, there, use_ptr, uid_ptr, place_ptr, seed, least, width, BLOCK
            )
            d_branch = tl.where(stays, d_x * grow, 0.0)
            d_branch = d_branch.to(d_branch_ptr.dtype.element_ty)
            tl.store(d_branch_ptr + at, d_branch, mask=live)
    own = program.to(tl.int64) * width + column
    tl.store(d_weight_ptr + own, d_weight, mask=inside)
    tl.store(d_bias_ptr + own, d_bias, mask=inside)


@library.custom_op("palimpsest::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and norm (T, D), and mean and reciprocal deviation (T,) of each row, fp32."""
    return _launch_forward(x, residual, weight, bias, eps, None)


def _launch_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        _layer_norm_forward_kernel[(rows,)](
            *(x, residual, weight.contiguous(), bias.contiguous()),
            *(total, normed, mean, rstd),
            *_drawn_by(drop, x),
            *(width, eps),
            DROPS=drop is not None,
            BLOCK=_block(width, drop),
            num_warps=_warps(width),
        )
    return total, normed, mean, rstd


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results_like(x)


def _results_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward pass gives, by shape: sum, norm, mean and 1 / deviation."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty(len(x), dtype=torch.float32)
    return total, torch.empty_like(total), statistics, torch.empty_like(statistics)


@library.custom_op("palimpsest::add_layer_norm_backward", mutates_args=())
def _backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, which is that of the residual too, of weight and of bias."""
    d_x, _, d_weight, d_bias = _launch_backward(
        d_normed, d_total, total, mean, rstd, weight, None
    )
    # Results of an operator may not share memory.
    return d_x, d_weight, d_bias.clone()


def _launch_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both tables, the same one without dropout, weight and bias."""
    rows, width = total.shape
    d_normed = d_normed.contiguous()
    d_x = torch.empty_like(total)
    d_branch = d_x if drop is None else torch.empty_like(total)
    # A power of two, so that it is compiled for few numbers of rows.
    per_program = triton.next_power_of_2(max(triton.cdiv(rows, _PROGRAMS), 1))
    programs = triton.cdiv(rows, per_program)
    parts = total.new_empty(2, programs, width, dtype=torch.float32)
    if rows:
        _layer_norm_backward_kernel[(programs,)](
            d_normed,
            d_normed if d_total is None else d_total.contiguous(),
            *(total, mean, rstd, weight.contiguous()),
            *(d_x, d_branch, parts[0], parts[1]),
            *_drawn_by(drop, total),
            *(rows, width),
            PER_PROGRAM=per_program,
            DROPS=drop is not None,
            HAS_D_TOTAL=d_total is not None,
            BLOCK=_block(width, drop),
            num_warps=_warps(width),
        )
    d_weight, d_bias = sum_parts(parts, weight.dtype)
    return d_x, d_branch, d_weight, d_bias


@_backward.register_fake
def _(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(total), d_weight, torch.empty_like(d_weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # A sum that nothing uses (post-norm) has no gradient, rather than one of zeros.
    ctx.set_materialize_grads(False)
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # With dropout, what it is drawn by besides.
    ctx.save_for_backward(total, mean, rstd, inputs[2], *inputs[5:8])
    ctx.chosen = inputs[8:]


def _differentiate(
    backward: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if d_normed is None:
        return d_total, d_total, None, None, None
    # What is launched gives a gradient of the branch besides, the same without dropout.
    found = backward(d_normed, d_total, *ctx.saved_tensors)
    return found[0], found[0], found[-2], found[-1], None


_forward.register_autograd(partial(_differentiate, _backward), setup_context=_keep)
_direct = direct(
    partial(_launch_forward, drop=None),
    _keep,
    partial(_differentiate, partial(_launch_backward, drop=None)),
)


@library.custom_op("palimpsest::dropout_add_layer_norm", mutates_args=())
def _forward_dropping(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, with what the branch's dropout is drawn by."""
    drop = Dropout(share, seed, use, uid, place)
    return _launch_forward(x, branch, weight, bias, eps, drop)


@_forward_dropping.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results_like(x)


@library.custom_op("palimpsest::dropout_add_layer_norm_backward", mutates_args=())
def _backward_dropping(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, of the branch, of weight and of bias."""
    drop = Dropout(share, seed, use, uid, place)
    d_x, d_branch, d_weight, d_bias = _launch_backward(
        d_normed, d_total, total, mean, rstd, weight, drop
    )
    return d_x, d_branch, d_weight, d_bias.clone()


@_backward_dropping.register_fake
def _(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    d_x = torch.empty_like(total)
    return d_x, torch.empty_like(d_x), d_weight, torch.empty_like(d_weight)


def _differentiate_dropping(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *_, use, uid, place = ctx.saved_tensors
    if d_normed is not None:
        found = _backward_dropping(d_normed, d_total, *ctx.saved_tensors, *ctx.chosen)
        return *found, *[None] * 6
    if d_total is None:
        return (None,) * 10
    share, seed = ctx.chosen
    d_branch = dropout.dropout_by(d_total, use, uid, place, share, seed)
    return d_total, d_branch, *[None] * 8


_forward_dropping.register_autograd(_differentiate_dropping, setup_context=_keep)


def _drawn_by(drop: Dropout | None, unused: Tensor) -> tuple[Any, ...]:
    """What the kernels are given of it."""
    if drop is None:
        return unused, unused, unused, 0, 0, 1.0
    rows = (each.contiguous() for each in drop[2:])
    return *rows, drop.seed, dropout.first_kept(drop.share), dropout.scale(drop.share)


def _block(width: int, drop: Dropout | None) -> int:
    """Channels that a program has: all."""
    return triton.next_power_of_2(width) if drop is None else dropout.block(width)


def _warps(width: int) -> int:
    """So that a thread has about eight columns: 16 bytes of bf16."""
    return min(max(triton.next_power_of_2(width) // 256, 1), 16)


def add_layer_norm_fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The kernel, wherever the tensors are."""
    called = _forward if observed() else _direct
    total, normed, *_ = called(x, residual, weight, bias, eps)
    return total, normed


def dropout_add_layer_norm_fused(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
) -> tuple[Tensor, Tensor]:
    """The same with dropout."""
    given = (*drop[2:], drop.share, drop.seed)
    return _forward_dropping(x, branch, weight, bias, eps, *given)[:2]


def _case(rows: int, width: int, *, small: bool = False, drops: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        # On the host, so that all devices see the same numbers.
        draw = torch.Generator().manual_seed(seed)
        x, residual = torch.randn(2, rows, width, generator=draw).unbind(0)
        weight = 1 + 0.1 * torch.randn(width, generator=draw)
        # A mean that is not 0 is what the two passes over a row are for.
        given = (x + 3, residual, weight, torch.randn(width, generator=draw))
        moved = (part.to(device, dtype).requires_grad_() for part in given)
        if drops:
            return *moved, 1e-12, dropout.rows_drawn(rows, device, seed)
        return *moved, 1e-12

    def moved_bytes(dtype: torch.dtype, *, tables: int) -> int:
        statistics = 2 * rows * 4 + drops * 3 * rows * 8
        return (tables * rows + 2) * width * dtype.itemsize + statistics

    return Case(
        kernel="residual + dropout + LayerNorm" if drops else "residual + LayerNorm",
        shape=f"T={rows} D={width}",
        inputs=inputs,
        fused=dropout_add_layer_norm_fused if drops else add_layer_norm_fused,
        reference=dropout_add_layer_norm_ref if drops else add_layer_norm_ref,
        tolerances={torch.float32: 2e-6, torch.bfloat16: 1e-2},
        reason=(
            "fp32: rounding of sums over a row and, in the gradients of weight and "
            "bias, over the rows. bf16: outputs and the sum that the backward pass "
            "starts from are rounded to 8 bits, 2^-9 each on average of a relative "
            "error, statistics are not"
        ),
        # Reads x and residual, writes sum and norm.
        forward_bytes=lambda dtype: moved_bytes(dtype, tables=4),
        # Reads the gradients of both and the sum, writes that of the inputs, which are
        # two with dropout.
        backward_bytes=lambda dtype: moved_bytes(dtype, tables=4 + drops),
        small=small,
    )


# Rows and width of micro-batches of 96 pairs with about 24 words of mlim-base (49 image
# tokens) and mlim-large-384 (144).
CASES = (
    _case(1, 64, small=True),
    _case(5, 33, small=True),
    _case(300, 24, small=True),
    _case(3, 768, small=True),
    _case(2, 1_024, small=True),
    _case(7_008, 768),
    _case(16_128, 1_024),
    _case(1, 64, small=True, drops=True),
    _case(5, 33, small=True, drops=True),
    _case(7_008, 768, drops=True),
    _case(16_128, 1_024, drops=True),
)
