"""A layer's bias and GELU after it in one pass, and both of their gradients in another.

Owns the kernels and their reference. Does not own the product or convolution before
(`trainer.models.dense`, `trainer.models.convolutions`), which is made without its bias.

The backward pass adds up the bias's gradient in fp32 while it has that of GELU at hand:
each program over its own rows, in their order, and what the programs found in their
order too. No atomics: the same inputs give the same bits.

Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, with the exact normal
distribution, as BERT has it. Shapes: N rows, F features, G programs.
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

from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import bound, cut, direct, observed, sum_parts

_BLOCK = 2048
"""Numbers of a program of the forward pass."""
_TILE = 4096
"""Numbers that a program of the backward pass takes at a time."""
_VECTOR = 8
"""Features that a thread loads at once, where a row has a multiple of so many."""


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x + bias`, (N, F). On CUDA by one kernel.

    Args:
        x: (N, F).
        bias: (F,), of the same dtype.
    """
    return bias_gelu_fused(x, bias) if x.is_cuda else bias_gelu_ref(x, bias)


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.gelu(x + bias)


@triton.jit
def _beyond(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The normal distribution beyond `abs(x)` to 8e-8, and its density at 0 times so
    many: both from one exponential, where an error function of its own would take
    longer than the memory (Abramowitz and Stegun, "Handbook of Mathematical Functions",
    1964, 7.1.26).
    """
    bell = _exp2(x * x * -0.7213475204444817)
    t = _reciprocal(1.0 + 0.23164188 * tl.abs(x))
    tail = 0.5307027145 * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = tail * t + 0.1274147959
    return tail * (t * bell), bell


# Without the cases of numbers below 2^-126: with them, forward passes take as long for
# instructions as for memory.
@triton.jit
def _exp2(x: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        constraints="=f,f",
        args=[x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _reciprocal(x: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        constraints="=f,f",
        args=[x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


if triton.knobs.runtime.interpret:
    # It has no assembler.
    def _exp2(x: Any) -> Any:
        return tl.exp2(x)

    def _reciprocal(x: Any) -> Any:
        return 1.0 / x


@triton.jit
def _bias_gelu_forward_kernel(
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n: tl.int64,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x_ptr += start
    y_ptr += start
    first = tl.arange(0, BLOCK // VECTOR) * VECTOR
    along = tl.arange(0, VECTOR)[None, :]
    at = first[:, None] + along
    inside = at < n - start
    # One division for VECTOR features, and one load.
    column = ((start % FEATURES).to(tl.int32) + first) % FEATURES
    column = tl.multiple_of(column[:, None] + along, (1, VECTOR))
    column = tl.max_contiguous(column, (1, VECTOR))
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column).to(tl.float32)
    beyond, _bell = _beyond(x)
    y = tl.maximum(x, 0.0) - tl.abs(x) * beyond
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _bias_gelu_backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    part_ptr: tl.tensor,
    rows: tl.int64,
    tiles: tl.int32,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = (column < FEATURES)[None, :]
    bias = tl.load(bias_ptr + column, mask=column < FEATURES, other=0.0)
    bias = bias.to(tl.float32)[None, :]
    first = program.to(tl.int64) * tiles * ROWS
    dy_ptr += first * FEATURES
    x_ptr += first * FEATURES
    dx_ptr += first * FEATURES
    row = tl.arange(0, ROWS)
    own = row[:, None] * FEATURES + column[None, :]
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(0, bound(tiles), num_stages=3):
        at = own + tile * (ROWS * FEATURES)
        inside = (row < rows - first - tile * ROWS)[:, None] & wide
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        beyond, bell = _beyond(x)
        below = tl.where(x < 0, beyond, 1.0 - beyond)
        dx = dy * (below + x * 0.3989422804014327 * bell)
        found += dx
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part = part_ptr + program.to(tl.int64) * FEATURES + column
    tl.store(part, tl.sum(found, 0), mask=column < FEATURES)


def bias_gelu_fused(x: Tensor, bias: Tensor) -> Tensor:
    """The kernel, wherever the tensors are."""
    y: Tensor = _forward(x, bias) if observed() else _direct(x, bias)
    return y


@library.custom_op("palimpsest::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    return _launch_forward(x, bias)


def _launch_forward(x: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _bias_gelu_forward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            *(x, bias.contiguous(), y, x.numel()),
            FEATURES=x.shape[1],
            BLOCK=_BLOCK,
            VECTOR=_VECTOR if x.shape[1] % _VECTOR == 0 else 1,
            num_warps=4,
        )
    return y


@_forward.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@library.custom_op("palimpsest::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the bias."""
    return _launch_backward(dy, x, bias)


def _launch_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    rows, features = x.shape
    dx = torch.empty_like(x)
    cuts = cut(rows, features, _TILE)
    parts = x.new_empty(1, cuts.grid[0], features, dtype=torch.float32)
    if rows:
        _bias_gelu_backward_kernel[cuts.grid](
            *(dy, x, bias.contiguous(), dx, parts, rows, cuts.tiles),
            FEATURES=features,
            ROWS=cuts.rows,
            COLUMNS=cuts.columns,
            num_warps=8,
        )
    return dx, sum_parts(parts, bias.dtype)[0]


@bias_gelu_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(bias, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(
    backward: Callable[..., tuple[Tensor, Tensor]], ctx: Any, dy: Tensor
) -> tuple[Tensor, Tensor]:
    return backward(dy, *ctx.saved_tensors)


_forward.register_autograd(
    partial(_differentiate, bias_gelu_backward), setup_context=_keep
)
_direct = direct(_launch_forward, _keep, partial(_differentiate, _launch_backward))


def _case(rows: int, features: int, *, small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, features, generator=generator, device=device)
        bias = torch.randn(features, generator=generator, device=device)
        return tuple(part.to(dtype).requires_grad_() for part in (x, 0.3 * bias))

    def moved(dtype: torch.dtype, *, tables: int) -> int:
        return (tables * rows + 1) * features * dtype.itemsize

    return Case(
        kernel="bias + GELU",
        shape=f"N={rows} F={features}",
        inputs=inputs,
        fused=bias_gelu_fused,
        reference=bias_gelu_ref,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 6e-3},
        reason="fp32: the normal distribution to 8e-8, and sums in another order; "
        "bf16: outputs and gradients are rounded once (2^-9 of them on average), and "
        "cut off to it by up to 2^-7 under Triton's interpreter",
        forward_bytes=lambda dtype: moved(dtype, tables=2),
        backward_bytes=lambda dtype: moved(dtype, tables=3),
        small=small,
    )


# The last two are feed-forward layers of 96 pairs, as in `trainer.kernels.layer_norm`;
# the one before them is the embedder's first layer, of a quarter of the pixels.
CASES = (
    _case(1, 8, small=True),
    _case(37, 24, small=True),
    _case(3, 300, small=True),
    _case(130, 96, small=True),
    _case(96 * 49 * 256, 24),
    _case(7_008, 3_072),
    _case(16_128, 4_096),
)
