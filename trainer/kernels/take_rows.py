"""Some rows of a table, none twice: a gradient that is put back, not added up.

Owns the kernel of the backward pass and its reference. Does not own which rows there
are (`trainer.models.scored_rows`) or what is done with them (`trainer.models`).

Autograd's `index_select` adds gradients up, since a row may be taken twice. Where none
is, a store is enough, by as many bytes at a time as there are.

Shapes: T rows, N of them taken, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import direct, observed

_ROWS, _COLUMNS = 16, 256
"""Numbers of a program, down and across."""


def take_rows(x_tc: Tensor, row: Tensor, valid: Tensor | None = None) -> Tensor:
    """Rows of a table, (N, C). On CUDA their gradients are put back by a kernel.

    Args:
        x_tc: (T, C).
        row: (N,) int64, which rows; none of those that are valid twice.
        valid: (N,) bool, whose gradients count; None: all of them.
    """
    chosen = take_rows_fused if x_tc.is_cuda else take_rows_ref
    return chosen(x_tc, row, valid)


def take_rows_ref(x_tc: Tensor, row: Tensor, valid: Tensor | None = None) -> Tensor:
    """The same in plain torch."""
    found = x_tc.index_select(0, row)
    return found if valid is None else found.where(valid[:, None], found.detach())


def take_rows_fused(x_tc: Tensor, row: Tensor, valid: Tensor | None = None) -> Tensor:
    """The kernel, wherever the tensors are."""
    found: Tensor = (_forward if observed() else _direct)(x_tc, row, valid)
    return found


@triton.jit(do_not_specialize=["count"])
def _put_rows_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    row_ptr,
    valid_ptr,
    dx_ptr,
    count,
    CHANNELS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    kept = number < count
    if HAS_VALID:
        kept &= tl.load(valid_ptr + number, mask=kept, other=0) != 0
    row = tl.load(row_ptr + number, mask=kept, other=0)
    inside = kept[:, None] & (column < CHANNELS)
    given = number.to(tl.int64)[:, None] * CHANNELS + column
    dy = tl.load(dy_ptr + given, mask=inside, other=0.0)
    tl.store(dx_ptr + (row[:, None] * CHANNELS + column), dy, mask=inside)


@library.custom_op("palimpsest::take_rows", mutates_args=())
def _forward(x_tc: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
    return _launch_forward(x_tc, row, valid)


def _launch_forward(x_tc: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
    return x_tc.index_select(0, row)


@_forward.register_fake
def _(x_tc: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
    return x_tc.new_empty(len(row), x_tc.shape[1])


@library.custom_op("palimpsest::put_rows", mutates_args=())
def put_rows(dy_nc: Tensor, row: Tensor, valid: Tensor | None, rows: int) -> Tensor:
    """The gradient (T, C) of a table of `rows` rows: zeros, but those that were taken
    and are valid.
    """
    return _launch_backward(dy_nc, row, valid, rows)


def _launch_backward(
    dy_nc: Tensor, row: Tensor, valid: Tensor | None, rows: int
) -> Tensor:
    count, channels = dy_nc.shape
    dx_tc = dy_nc.new_zeros(rows, channels)
    if dy_nc.numel():
        grid = (triton.cdiv(count, _ROWS), triton.cdiv(channels, _COLUMNS))
        row = row.contiguous()
        _put_rows_kernel[grid](
            dy_nc.contiguous(),
            row,
            row if valid is None else valid.contiguous(),
            dx_tc,
            count,
            CHANNELS=channels,
            HAS_VALID=valid is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return dx_tc


@put_rows.register_fake
def _(dy_nc: Tensor, row: Tensor, valid: Tensor | None, rows: int) -> Tensor:
    return dy_nc.new_empty(rows, dy_nc.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_tc, row, valid = inputs
    ctx.rows = len(x_tc)
    ctx.save_for_backward(row, valid)


def _differentiate(
    backward: Callable[..., Tensor], ctx: Any, dy: Tensor
) -> tuple[Tensor | None, ...]:
    return backward(dy, *ctx.saved_tensors, ctx.rows), None, None


_forward.register_autograd(partial(_differentiate, put_rows), setup_context=_keep)
_direct = direct(_launch_forward, _keep, partial(_differentiate, _launch_backward))


def _case(
    rows: int, taken: int, channels: int, *, valid: bool, small: bool = False
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, channels, generator=generator, device=device)
        row = torch.randperm(rows, generator=generator, device=device)[:taken]
        row, counts = row.sort().values, None
        if valid:
            counts = torch.arange(taken, device=device) % 3 > 0
            # What does not count may be a row that another takes.
            row = row.where(counts, row[-1])
        return x.to(dtype).requires_grad_(), row, counts

    return Case(
        kernel="rows taken",
        shape=f"T={rows} N={taken} C={channels}" + (", some count" if valid else ""),
        inputs=inputs,
        fused=take_rows_fused,
        reference=take_rows_ref,
        tolerances={torch.float32: 0.0, torch.bfloat16: 5e-3},
        reason="numbers are copied; a test rounds the gradient that it gives in bf16",
        forward_bytes=lambda dtype: 2 * taken * channels * dtype.itemsize + 8 * taken,
        backward_bytes=lambda dtype: (
            (rows + 2 * taken) * channels * dtype.itemsize + 8 * taken
        ),
        small=small,
    )


# Those that losses read of 96 pairs, of mlim-base and of mlim-large-384.
CASES = (
    _case(1, 1, 1, valid=False, small=True),
    _case(50, 0, 8, valid=False, small=True),
    _case(50, 33, 24, valid=False, small=True),
    _case(70, 41, 300, valid=True, small=True),
    _case(7_008, 3_808, 768, valid=False),
    _case(16_128, 10_464, 1_024, valid=False),
)
