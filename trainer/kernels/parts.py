"""Sums over what a kernel's programs found, and whether operators are to be seen.

Owns the last step of a sum without atomics: K sums at once of G parts each, added up in
fp32 and rounded once. Does not own what the parts are (the kernels beside this one).

Shapes: K sums, G parts, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 256, 16


def observed() -> bool:
    """Whether somebody must see operators, and not what they launch: a compiler, a
    dispatch mode, tensors without values. A call by way of `torch.library` costs the
    host some 90 microseconds, and as many in a backward pass: longer than most kernels
    here take.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


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
    # Not range(): the interpreter takes no given number there.
    first = number * 0
    while first < count:
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * FEATURES + column[None, :]
        inside = (row < count)[:, None] & wide[None, :]
        found += tl.load(start + at, mask=inside, other=0.0)
        first += ROWS
    total = tl.sum(found, 0)
    out = out_ptr + number * FEATURES + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=wide)
