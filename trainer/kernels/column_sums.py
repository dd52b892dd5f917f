"""Sums over the rows of a table: what a linear layer's bias is due.

Owns the kernel and its reference, and the layer that uses it. Does not own where linear
layers stand (`trainer.models.layers`).

Each program adds up its own rows in fp32, in their order, and what the programs found
is added in their order too: the same inputs give the same bits.

Shapes: N rows, F features, C channels that a layer is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import cut, observed, sum_parts

_TILE = 4096
"""Numbers that a program adds at a time."""


def column_sums(x: Tensor) -> Tensor:
    """(N, F) -> (F,) of the same dtype, added up in fp32: by the kernel on a CUDA
    device, elsewhere by the reference.
    """
    return column_sums_fused(x) if x.is_cuda else column_sums_ref(x)


def column_sums_ref(x: Tensor) -> Tensor:
    """The same in plain torch."""
    return x.sum(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear` of (N, C), whose bias has its gradient from
    `column_sums`.
    """
    found: Tensor = _Linear.apply(x, weight, bias)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            dy @ weight if of_x else None,
            dy.t() @ x if of_weight else None,
            column_sums(dy) if of_bias else None,
        )


@triton.jit(do_not_specialize=["rows", "tiles"])
def _column_sums_kernel(
    x_ptr: tl.tensor,
    part_ptr: tl.tensor,
    rows: tl.int64,
    tiles: tl.int64,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column < FEATURES
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Not range(): the interpreter takes no given number there.
    tile = program * tiles
    while tile < (program + 1) * tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * FEATURES + column[None, :]
        inside = (row < rows)[:, None] & wide[None, :]
        found += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tile += 1
    tl.store(part_ptr + program * FEATURES + column, tl.sum(found, 0), mask=wide)


def column_sums_fused(x: Tensor) -> Tensor:
    """The kernel, wherever the table is."""
    found: Tensor = _sums(x) if observed() else _launch(x)
    return found


@library.custom_op("palimpsest::column_sums", mutates_args=())
def _sums(x: Tensor) -> Tensor:
    return _launch(x)


def _launch(x: Tensor) -> Tensor:
    x = x.contiguous()
    rows, features = x.shape
    cuts = cut(rows, features, _TILE)
    parts = x.new_empty(1, cuts.grid[0], features, dtype=torch.float32)
    if rows:
        _column_sums_kernel[cuts.grid](
            *(x, parts, rows, cuts.tiles),
            FEATURES=features,
            ROWS=cuts.rows,
            COLUMNS=cuts.columns,
            num_warps=8,
        )
    return sum_parts(parts, x.dtype)[0]


@_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


def _case(rows: int, features: int, *, small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, features, generator=generator, device=device)
        return ((x + 0.1).to(dtype),)

    return Case(
        kernel="column sums",
        shape=f"N={rows} F={features}",
        inputs=inputs,
        fused=column_sums_fused,
        reference=column_sums_ref,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 5e-3},
        reason="fp32 sums in another order; bf16 results are rounded once (2^-9 of "
        "them), and cut off under Triton's interpreter",
        forward_bytes=lambda dtype: (rows + 1) * features * dtype.itemsize,
        small=small,
    )


# Gradients of 96 pairs' queries, keys and values, and of what attention adds.
CASES = (
    _case(1, 8, small=True),
    _case(37, 24, small=True),
    _case(300, 130, small=True),
    _case(7_008, 768),
    _case(7_008, 2_304),
    _case(16_128, 1_024),
    _case(16_128, 3_072),
)
