"""Residual and LayerNorm in one pass over the rows.

Owns the kernels, forward and backward, and their reference. Does not own where a layer
has its norms (`trainer.models.layers`).

Sum, mean and variance are fp32 whatever the inputs are, and so are the gradients of
weight and bias until they are whole: each program adds up its own rows, in their order,
and what the programs found is added in their order too. No atomics: the same inputs
give the same bits.

Ba, Kiros, Hinton, "Layer Normalization", 2016. Shapes: T rows, D width, G programs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case

# Most programs of a backward pass, each with rows of its own: four for each of the 132
# multiprocessors of an H100 or H200. Not asked of the device: sums would depend on it.
_PROGRAMS = 528


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


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
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


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_normed_ptr,
    d_total_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    d_x_ptr,
    d_weight_ptr,
    d_bias_ptr,
    rows,
    width,
    PER_PROGRAM: tl.constexpr,
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
    own = program.to(tl.int64) * width + column
    tl.store(d_weight_ptr + own, d_weight, mask=inside)
    tl.store(d_bias_ptr + own, d_bias, mask=inside)


@library.custom_op("palimpsest::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and norm (T, D), and mean and reciprocal deviation (T,) of each row, fp32."""
    x, residual = x.contiguous(), residual.contiguous()
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        _forward_kernel[(rows,)](
            *(x, residual, weight.contiguous(), bias.contiguous()),
            *(total, normed, mean, rstd),
            *(width, eps),
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )
    return total, normed, mean, rstd


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    rows, width = total.shape
    d_normed = d_normed.contiguous()
    d_x = torch.empty_like(total)
    # A power of two, so that it is compiled for few numbers of rows.
    per_program = triton.next_power_of_2(max(triton.cdiv(rows, _PROGRAMS), 1))
    programs = triton.cdiv(rows, per_program)
    parts = total.new_empty(2, programs, width, dtype=torch.float32)
    if rows:
        _backward_kernel[(programs,)](
            d_normed,
            d_normed if d_total is None else d_total.contiguous(),
            *(total, mean, rstd, weight.contiguous()),
            *(d_x, parts[0], parts[1]),
            *(rows, width),
            PER_PROGRAM=per_program,
            HAS_D_TOTAL=d_total is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )
    d_weight, d_bias = (part.sum(0).to(weight.dtype) for part in parts)
    return d_x, d_weight, d_bias


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


def _keep(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    # A sum that nothing uses (post-norm) has no gradient, rather than one of zeros.
    ctx.set_materialize_grads(False)
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, mean, rstd, inputs[2])


def _differentiate(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    if d_normed is None:
        return d_total, d_total, None, None, None
    d_x, d_weight, d_bias = _backward(d_normed, d_total, *ctx.saved_tensors)
    return d_x, d_x, d_weight, d_bias, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _warps(width: int) -> int:
    """So that a thread has about eight columns: 16 bytes of bf16."""
    return min(max(triton.next_power_of_2(width) // 256, 1), 16)


def add_layer_norm_fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The kernel, wherever the tensors are."""
    return _forward(x, residual, weight, bias, eps)[:2]


def _case(rows: int, width: int, *, small: bool = False) -> Case:
    def inputs(
        device: torch.device, dtype: torch.dtype, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        # On the host, so that all devices see the same numbers.
        draw = torch.Generator().manual_seed(seed)
        x, residual = torch.randn(2, rows, width, generator=draw).unbind(0)
        weight = 1 + 0.1 * torch.randn(width, generator=draw)
        # A mean that is not 0 is what the two passes over a row are for.
        given = (x + 3, residual, weight, torch.randn(width, generator=draw))
        moved = (part.to(device, dtype).requires_grad_() for part in given)
        return *moved, 1e-12  # type: ignore[return-value]

    def moved_bytes(dtype: torch.dtype, *, tables: int) -> int:
        statistics = 2 * rows * 4
        return (tables * rows + 2) * width * dtype.itemsize + statistics

    return Case(
        kernel="residual + LayerNorm",
        shape=f"T={rows} D={width}",
        inputs=inputs,
        fused=add_layer_norm_fused,
        reference=add_layer_norm_ref,
        tolerances={torch.float32: 2e-6, torch.bfloat16: 1e-2},
        reason=(
            "fp32: rounding of sums over a row and, in the gradients of weight and "
            "bias, over the rows. bf16: outputs and the sum that the backward pass "
            "starts from are rounded to 8 bits, 2^-9 each on average of a relative "
            "error, statistics are not"
        ),
        # Reads x and residual, writes sum and norm.
        forward_bytes=lambda dtype: moved_bytes(dtype, tables=4),
        # Reads the gradients of both and the sum, writes that of the inputs.
        backward_bytes=lambda dtype: moved_bytes(dtype, tables=4),
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
)
