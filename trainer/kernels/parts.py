"""What several kernels share: sums without atomics, and operators called directly.

Owns how a table is cut up for sums over its rows, and their last step: K sums at once
of G parts each, added up in fp32 and rounded once; and how an operator is called where
nobody must see it. Does not own what the parts are (the kernels beside this one).

Shapes: K sums, G parts, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS, _COLUMNS = 256, 16
_MOST_COLUMNS = 128
"""Features of a tile: 256 bytes of bf16 of each of its rows."""
# Of a cut table, about: eight programs for each of the 132 multiprocessors of an H100
# or H200. Not asked of the device: sums would depend on it.
_PROGRAMS = 1056


def observed() -> bool:
    """Whether somebody must see operators, and not what they launch: a compiler, a
    dispatch mode, tensors without values. A call by way of torch's dispatcher costs the
    host some 90 microseconds, and as many in a backward pass: longer than most kernels
    here take.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def direct(
    launch: Callable[..., Any],
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """An operator without torch's dispatcher, for where nobody is `observed`.

    Args:
        launch: what it does.
        keep: its `setup_context`, in the form that torch's operators have it.
        differentiate: its backward pass, without the dispatcher too.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = launch(*inputs)
            keep(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return differentiate(ctx, *grads)

    applied: Callable[..., Any] = Direct.apply
    return applied


class Cut(NamedTuple):
    """How a table is cut up for programs that each add up rows of their own."""

    columns: int
    """Features of a tile."""
    rows: int
    """Rows of a tile."""
    tiles: int
    """Tiles of a program, one below the other."""
    grid: tuple[int, int]
    """Programs, down and across."""


def cut(rows: int, features: int, numbers: int) -> Cut:
    """Of a table (rows, features), in tiles of so many numbers."""
    columns = min(triton.next_power_of_2(features), _MOST_COLUMNS)
    tile = numbers // columns
    across = triton.cdiv(features, columns)
    tiles = max(triton.cdiv(triton.cdiv(rows, tile) * across, _PROGRAMS), 1)
    return Cut(columns, tile, tiles, (triton.cdiv(rows, tile * tiles), across))


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, G, F) fp32 -> (K, F) in `dtype`, by a kernel, wherever the parts are."""
    sums, count, features = parts.shape
    out = parts.new_empty(sums, features, dtype=dtype)
    if out.numel():
        _sum_parts_kernel[(triton.cdiv(features, _COLUMNS), sums)](
            *(parts, out, count),
            FEATURES=features,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return out


@triton.jit
def bound(number: tl.tensor) -> tl.tensor:
    """`number`, as a bound of a kernel's loop."""
    return number


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, onto: tl.tensor | None) -> tl.tensor:
    """Their product, added to `onto` if that is something; nothing is rounded first."""
    return tl.dot(left, right, onto, input_precision="ieee")


def _interpreted_bound(number: Any) -> int:
    return int(number.handle.data.item())


def _interpreted_dot(left: Any, right: Any, onto: Any) -> Any:
    left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, onto, input_precision="ieee")


if triton.knobs.runtime.interpret:
    # The interpreter of Triton 3.6 makes no bound of a tensor under numpy 2.4, and
    # multiplies bf16 as if its bits were integers.
    bound, dot = _interpreted_bound, _interpreted_dot


@triton.jit(do_not_specialize=["count"])
def _sum_parts_kernel(
    parts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.int32,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.program_id(1)
    wide = column < FEATURES
    start = parts_ptr + number.to(tl.int64) * count * FEATURES
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, bound(count), ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * FEATURES + column[None, :]
        inside = (row < count)[:, None] & wide[None, :]
        found += tl.load(start + at, mask=inside, other=0.0)
    total = tl.sum(found, 0)
    out = out_ptr + number * FEATURES + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=wide)
