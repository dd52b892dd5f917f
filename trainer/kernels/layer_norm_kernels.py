"""The kernels of residual and LayerNorm.

Owns what a program does. Does not own how many there are or the operators around them
(`trainer.kernels.layer_norm`).

Shapes: a program has rows of `width` channels, each of them whole (BLOCK).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trainer.kernels.dropout import CHOSEN, keeps


@triton.jit(do_not_specialize=CHOSEN)
def layer_norm_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
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
    HAS_BRANCH_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH_BIAS:
        added = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
        branch += added.to(tl.float32)
    if DROPS:
        stays = keeps(row, True, use_ptr, uid_ptr, place_ptr, seed, least, width, BLOCK)
        branch = tl.where(stays, branch * grow, 0.0)
    total = x + branch
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


@triton.jit(do_not_specialize=CHOSEN)
def layer_norm_backward_kernel(  # type: ignore[no-untyped-def]
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
    d_branch_bias_ptr,
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
    HAS_BRANCH_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    d_branch_bias = tl.zeros((BLOCK,), dtype=tl.float32)
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
        d_branch = d_x
        if DROPS:
            stays = keeps(
                row, there, use_ptr, uid_ptr, place_ptr, seed, least, width, BLOCK
            )
            d_branch = tl.where(stays, d_x * grow, 0.0)
            rounded = d_branch.to(d_branch_ptr.dtype.element_ty)
            tl.store(d_branch_ptr + at, rounded, mask=live)
        if HAS_BRANCH_BIAS:
            d_branch_bias += d_branch
    own = program.to(tl.int64) * width + column
    tl.store(d_weight_ptr + own, d_weight, mask=inside)
    tl.store(d_bias_ptr + own, d_bias, mask=inside)
    if HAS_BRANCH_BIAS:
        tl.store(d_branch_bias_ptr + own, d_branch_bias, mask=inside)
