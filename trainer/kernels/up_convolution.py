"""Transposed convolutions of 4 x 4 by steps of 2 whose channels are few.

Owns the kernels, forward and of the weights' gradient, and their reference. Does not
own the layers that are made of them (`trainer.models.convolutions`).

A pixel of the result has two rows and two columns of what is given below it. Those of
a column of the result, even or odd, are the same two neighbours for all pixels of a
row, and lie side by side in memory: a program reads them once, going down a strip, and
multiplies them by the weights of the four rows of the result that they are part of
(cuDNN has slow kernels alone, for the GPUs before Hopper). Sums are fp32 and without
atomics: the same inputs give the same bits.

Shapes: B images of H x W pixels, C channels, N of the result.
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
from trainer.kernels.parts import bound, direct, dot, observed, sum_parts
from trainer.kernels.small_convolution import (
    Strip,
    channels_last,
    lanes_for,
    strip_at,
    strips_of,
)

# On an H200, of seven, those of results were the fastest for images of 56 and of 96
# pixels, and those of weights for 56; for 96 narrower ones took a tenth less
# (`benchmarks/results/gpu/small-convolution.txt`).
_RESULTS, _WEIGHTS = Strip(64, 96), Strip(64, 32)
# Of gradients of weights, about, for even columns and as many for odd ones: two for
# each of the 132 multiprocessors of an H100 or H200. Not asked of the device: sums
# would depend on it.
_PROGRAMS = 132
_MOST_CHANNELS, _MOST_RESULTS = 64, 32


def supported(channels: int, results: int) -> bool:
    """Whether the kernels are for so many channels."""
    return channels <= _MOST_CHANNELS and results <= _MOST_RESULTS


def up_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """A transposed convolution of 4 x 4 by steps of 2 with padding 1, without a bias,
    (B, N, 2 H, 2 W). On CUDA by kernels, with channels last in memory, where the
    channels are few (`supported`) and of 16 bits: in 32 the kernels are there for
    tests, and have more numbers than a thread has registers.

    Args:
        x: (B, C, H, W), best with channels last in memory.
        weight: (C, N, 4, 4), of the same dtype.
    """
    fused = x.is_cuda and x.element_size() == 2 and supported(*weight.shape[:2])
    chosen = up_convolution_fused if fused else up_convolution_ref
    return chosen(x, weight)


def up_convolution_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.conv_transpose2d(x, weight, None, 2, 1)


def up_convolution_fused(x: Tensor, weight: Tensor) -> Tensor:
    """The kernels, wherever the tensors are."""
    y: Tensor = (_forward if observed() else _direct)(x, weight)
    return y


@triton.jit
def _neighbours(x, lane, odd, width, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in its row the channels of each pixel and its left neighbour lie, or `odd`
    its right one, side by side, and which of them are inside the image.
    """
    left = x - 1 + odd
    beside = left + lane // CHANNELS
    inside = (beside >= 0) & (beside < width) & (lane < 2 * CHANNELS)
    return left * CHANNELS + lane, inside


@triton.jit(do_not_specialize=["height"])
def _up_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    y_ptr,
    height,
    width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """A program for the even columns of the result of a strip, or the odd ones."""
    odd = tl.program_id(1)
    image, first, end, x = strip_at(tl.program_id(0), height, width, ROWS, ACROSS)
    lane = tl.arange(0, LANES)
    result = tl.arange(0, WIDE)[None, :]
    along = lane % CHANNELS * (16 * RESULTS) + 3 - odd - 2 * (lane // CHANNELS)
    weight_ptr += along[:, None] + result * 16
    there = (lane < 2 * CHANNELS)[:, None] & (result < RESULTS)
    row_0 = tl.load(weight_ptr, mask=there, other=0.0)
    row_1 = tl.load(weight_ptr + 4, mask=there, other=0.0)
    row_2 = tl.load(weight_ptr + 8, mask=there, other=0.0)
    row_3 = tl.load(weight_ptr + 12, mask=there, other=0.0)
    at, inside = _neighbours(x, lane[None, :], odd, width, CHANNELS)
    row = x_ptr + image * height * width * CHANNELS
    row += (first - 1).to(tl.int64) * width * CHANNELS
    # The result's row of the same number, of every two.
    below = 2 * width * RESULTS
    own = y_ptr + image * height * (2 * below) + (2 * x + odd) * RESULTS + result
    own += (first - 1).to(tl.int64) * (2 * below)
    is_own = (x < width) & (result < RESULTS)
    window = tl.load(row + at, mask=inside & (first > 0), other=0.0)
    even = tl.zeros((ACROSS, WIDE), tl.float32)
    uneven = tl.zeros((ACROSS, WIDE), tl.float32)
    for y in range(bound(first - 1), bound(end + 1)):
        row += width * CHANNELS
        ahead = tl.load(row + at, mask=inside & (y + 1 < height), other=0.0)
        whole = dot(window, row_0, uneven).to(y_ptr.dtype.element_ty)
        tl.store(own - below, whole, mask=is_own & (y > first))
        uneven = dot(window, row_2, None)
        whole = dot(window, row_1, even).to(y_ptr.dtype.element_ty)
        tl.store(own, whole, mask=is_own & (y >= first) & (y < end))
        even = dot(window, row_3, None)
        window = ahead
        own += 2 * below


@triton.jit(do_not_specialize=["count", "strips", "height"])
def _up_weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    part_ptr,
    count,
    strips,
    height,
    width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What `strips` strips are worth to the weights of even columns of the result, or
    odd ones: (4, LANES, WIDE), by their rows.
    """
    program, odd = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)[None, :]
    result = tl.arange(0, WIDE)[None, :]
    row_0 = tl.zeros((LANES, WIDE), tl.float32)
    row_1 = tl.zeros((LANES, WIDE), tl.float32)
    row_2 = tl.zeros((LANES, WIDE), tl.float32)
    row_3 = tl.zeros((LANES, WIDE), tl.float32)
    below = 2 * width * RESULTS
    start = program * strips
    for number in range(bound(start), bound(tl.minimum(start + strips, count))):
        image, first, end, x = strip_at(number, height, width, ROWS, ACROSS)
        at, inside = _neighbours(x, lane, odd, width, CHANNELS)
        row = x_ptr + (image * height + first) * width * CHANNELS
        own = dy_ptr + (image * height + first) * (2 * below)
        own += (2 * x + odd) * RESULTS + result
        is_own = (x < width) & (result < RESULTS)
        dy_0 = tl.load(own - below, mask=is_own & (first > 0), other=0.0)
        dy_1 = tl.load(own, mask=is_own, other=0.0)
        for y in range(bound(first), bound(end)):
            is_next = is_own & (y + 1 < height)
            window = tl.load(row + at, mask=inside, other=0.0)
            dy_2 = tl.load(own + below, mask=is_own, other=0.0)
            dy_3 = tl.load(own + 2 * below, mask=is_next, other=0.0)
            turned = tl.trans(window)
            row_0 = dot(turned, dy_0, row_0)
            row_1 = dot(turned, dy_1, row_1)
            row_2 = dot(turned, dy_2, row_2)
            row_3 = dot(turned, dy_3, row_3)
            dy_0 = dy_2
            dy_1 = dy_3
            row += width * CHANNELS
            own += 2 * below
    part_ptr += (odd * tl.num_programs(0) + program).to(tl.int64) * (4 * LANES * WIDE)
    part_ptr += tl.arange(0, LANES)[:, None] * WIDE + result
    tl.store(part_ptr, row_0)
    tl.store(part_ptr + LANES * WIDE, row_1)
    tl.store(part_ptr + 2 * LANES * WIDE, row_2)
    tl.store(part_ptr + 3 * LANES * WIDE, row_3)


@library.custom_op("palimpsest::up_convolution", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return _launch_forward(x, weight)


def _launch_forward(x: Tensor, weight: Tensor) -> Tensor:
    y = _result_like(x, weight)
    count = strips_of(x, _RESULTS)
    if count:
        _up_kernel[(count, 2)](
            x.contiguous(memory_format=torch.channels_last),
            weight.contiguous(),
            y,
            *x.shape[2:],
            **_sizes(weight, _RESULTS),
            num_warps=4,
            num_stages=1,
        )
    return y


def _result_like(x: Tensor, weight: Tensor) -> Tensor:
    """What a forward pass gives, by shape; channels last."""
    images, _, height, width = x.shape
    return channels_last(x, (images, weight.shape[1], 2 * height, 2 * width))


def _sizes(weight: Tensor, strip: Strip) -> dict[str, int]:
    channels, results = weight.shape[:2]
    return {
        "CHANNELS": channels,
        "RESULTS": results,
        "LANES": lanes_for(2 * channels),
        "WIDE": lanes_for(results),
        "ROWS": strip.rows,
        "ACROSS": strip.across,
    }


@_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _result_like(x, weight)


@library.custom_op("palimpsest::up_convolution_weights", mutates_args=())
def weights_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient (C, N, 4, 4) of the weights."""
    return _launch_weights(dy, x, weight)


def _launch_weights(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    count = strips_of(x, _WEIGHTS)
    strips = max(triton.cdiv(count, _PROGRAMS), 1)
    programs = triton.cdiv(count, strips)
    sizes = _sizes(weight, _WEIGHTS)
    lanes, wide = sizes["LANES"], sizes["WIDE"]
    parts = x.new_empty(2, programs, 4 * lanes * wide, dtype=torch.float32)
    if count:
        _up_weights_kernel[(programs, 2)](
            x.contiguous(memory_format=torch.channels_last),
            dy.contiguous(memory_format=torch.channels_last),
            parts,
            *(count, strips, *x.shape[2:]),
            **sizes,
            num_warps=8,
            num_stages=1,
        )
    channels, results = weight.shape[:2]
    whole = sum_parts(parts, weight.dtype).view(2, 4, lanes, wide)
    whole = whole[:, :, : 2 * channels, :results].unflatten(2, (2, channels))
    # Columns 3, 1 of the weights are of even columns of the result, 2, 0 of odd ones.
    d_weight = whole.permute(3, 4, 1, 2, 0).flip(3, 4).flatten(3)
    return d_weight.contiguous()


@weights_gradient.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(
    gradient: Callable[..., Tensor], ctx: Any, dy: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad
    return (
        F.conv2d(dy, weight, None, 2, 1) if of_x else None,
        gradient(dy, x, weight) if of_weight else None,
    )


_forward.register_autograd(
    partial(_differentiate, weights_gradient), setup_context=_keep
)
_direct = direct(_launch_forward, _keep, partial(_differentiate, _launch_weights))


def _case(
    images: int,
    channels: int,
    results: int,
    height: int,
    width: int,
    *,
    small: bool = False,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(
            (images, channels, height, width), generator=generator, device=device
        )
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(
            (channels, results, 4, 4), generator=generator, device=device
        )
        weight = (weight * (4 * channels) ** -0.5).to(dtype)
        return x.requires_grad_(), weight.requires_grad_()

    pixels = images * height * width
    product = 2.0 * pixels * 16 * channels * results

    def moved(dtype: torch.dtype, *, given: int, found: int) -> int:
        return pixels * (given * channels + 4 * found * results) * dtype.itemsize

    return Case(
        kernel="up-convolution",
        shape=f"B={images} C={channels} N={results} H={height} W={width}",
        inputs=inputs,
        fused=up_convolution_fused,
        reference=up_convolution_ref,
        tolerances={torch.bfloat16: 8e-3} | ({torch.float32: 1e-5} if small else {}),
        reason="fp32: sums in another order; bf16: results are rounded once (2^-9 of "
        "them on average), and cut off to it by up to 2^-7 under Triton's interpreter",
        forward_bytes=partial(moved, given=1, found=1),
        # Reads x and the gradient, writes that of x.
        backward_bytes=partial(moved, given=2, found=1),
        forward_flops=product,
        backward_flops=2 * product,
        small=small,
    )


# The last two are the decoder's last layer but two of 64 images, of mlim-base and of
# mlim-large-384.
CASES = (
    _case(1, 1, 1, 1, 1, small=True),
    _case(2, 3, 5, 9, 17, small=True),
    _case(1, 16, 24, 7, 20, small=True),
    _case(64, 64, 32, 56, 56),
    _case(64, 64, 32, 96, 96),
)
