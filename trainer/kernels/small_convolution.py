"""Convolutions of 3 x 3 whose channels are few, for which cuDNN has slow kernels alone.

Owns the kernels, forward and backward, and their reference. Does not own the layers
that are made of them (`trainer.models.convolutions`).

A product of a tile's pixels, each with its two neighbours in a row, by the weights of
that row of the window, three times. Neighbours lie side by side in memory, so a window
is read in vectors, and nothing is laid out anew: results are written where they belong,
also where each four of them are the pixels of a square (Shi et al., "Real-time single
image and video super-resolution using an efficient sub-pixel convolutional neural
network", 2016), and gradients are read from there. Sums are fp32 and without atomics:
the same inputs give the same bits.

Shapes: B images of H x W pixels, C channels, N of the result, G programs.
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

_DOWN, _ACROSS = 4, 16
"""Pixels of a tile: rows and columns."""
_STAGES = 1
# Not more for weights: with two and with three, and tiles of four rows, those of 32
# channels came out wrong on an H200 (Triton 3.6). Why is not known.
_WEIGHT_STAGES = 1
# Of all tiles, about: four programs for each of the 132 multiprocessors of an H100 or
# H200. Not asked of the device: sums would depend on it.
_PROGRAMS = 528
_MOST_CHANNELS, _MOST_RESULTS = 32, 16


def supported(channels: int, results: int) -> bool:
    """Whether the kernels are for convolutions of so many channels."""
    return channels <= _MOST_CHANNELS and results <= _MOST_RESULTS


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, shuffled: bool = False
) -> Tensor:
    """A convolution of 3 x 3 by steps of 1 with padding 1, (B, N, H, W). On CUDA by one
    kernel, with channels last in memory, where the channels are few (`supported`).

    Args:
        x: (B, C, H, W), best with channels last in memory.
        weight: (N, C, 3, 3), of the same dtype.
        bias: (N,), or None.
        shuffled: give the pixels of squares of 2 x 2 instead, as
            `torch.nn.functional.pixel_shuffle` does: (B, N / 4, 2 H, 2 W).
    """
    few = supported(x.shape[1], len(weight))
    chosen = convolution_fused if x.is_cuda and few else convolution_ref
    return chosen(x, weight, bias, shuffled)


def convolution_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool
) -> Tensor:
    """The same in plain torch."""
    found = F.conv2d(x, weight, bias, 1, 1)
    return F.pixel_shuffle(found, 2) if shuffled else found


def convolution_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool
) -> Tensor:
    """The kernel, wherever the tensors are."""
    called = _forward if observed() else _direct
    y: Tensor = called(x, weight, bias, shuffled)
    return y


@triton.jit
def _tile(number, height, width, DOWN: tl.constexpr, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Image of a tile, and row and column of each of its pixels, below each other."""
    across = tl.cdiv(width, ACROSS)
    down = tl.cdiv(height, DOWN)
    pixel = tl.arange(0, DOWN * ACROSS)[:, None]
    x = number % across * ACROSS + pixel % ACROSS
    y = number // across % down * DOWN + pixel // ACROSS
    return (number // across // down).to(tl.int64), y, x


@triton.jit
def _channel(lane, LANES: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channel of each lane, and which lanes have one. Those of squares are in the
    order of memory: one half is of the upper row of a square, the other of the lower.
    """
    if SHUFFLED:
        beside = lane % (LANES // 2)
        upper_left = beside % (CHANNELS // 4) * 4
        right = beside // (CHANNELS // 4)
        channel = upper_left + lane // (LANES // 2) * 2 + right
        return channel, beside < CHANNELS // 2
    return lane, lane < CHANNELS


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    y,
    x,
    lane,
    width,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHUFFLED: tl.constexpr,
):
    """Where the channel of each lane of a pixel lies in its image. A row further down
    is `width` times CHANNELS numbers away; how far the next pixel is, `_beside` says.
    """
    if SHUFFLED:
        row = width * (CHANNELS // 2)
        start = y * (2 * row) + x * (CHANNELS // 2)
        return start + lane // (LANES // 2) * row + lane % (LANES // 2)
    return (y * width + x) * CHANNELS + lane


@triton.jit
def _beside(CHANNELS: tl.constexpr, SHUFFLED: tl.constexpr):  # type: ignore[no-untyped-def]
    return CHANNELS // 2 if SHUFFLED else CHANNELS


@triton.jit(do_not_specialize=["count", "tiles"])
def _convolution_kernel(  # type: ignore[no-untyped-def]
    given_ptr,
    weight_ptr,
    bias_ptr,
    found_ptr,
    count,
    tiles,
    height,
    width,
    of_given,
    of_found,
    GIVEN: tl.constexpr,
    FOUND: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    TURNED: tl.constexpr,
    FROM_SHUFFLED: tl.constexpr,
    TO_SHUFFLED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """A program for every `tiles` tiles. What is given has GIVEN channels, what is
    found FOUND; a weight of them is `of_given` and `of_found` numbers after that of the
    channel before.
    """
    first = tl.program_id(0) * tiles
    lane = tl.arange(0, LANES)
    given_channel, is_given = _channel(lane, LANES, GIVEN, FROM_SHUFFLED)
    found = tl.arange(0, WIDE)
    found_channel, is_found = _channel(found, WIDE, FOUND, TO_SHUFFLED)
    along = given_channel[:, None] * of_given + found_channel[None, :] * of_found
    there = is_given[:, None] & is_found[None, :]
    weights = ()
    for place in tl.static_range(9):
        turned = 8 - place if TURNED else place
        tap = tl.load(weight_ptr + along + turned, mask=there, other=0.0)
        weights += (tap,)  # type: ignore[assignment]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + found_channel, mask=is_found, other=0.0)
        bias = bias.to(tl.float32)[None, :]
    for number in range(bound(first), bound(tl.minimum(first + tiles, count))):
        image, y, x = _tile(number, height, width, DOWN, ACROSS)
        given = given_ptr + image * height * width * GIVEN
        at = _place(y, x, lane[None, :], width, LANES, GIVEN, FROM_SHUFFLED)
        total = tl.zeros((DOWN * ACROSS, WIDE), tl.float32)
        for row in tl.static_range(3):
            for column in tl.static_range(3):
                down, beside = y + (row - 1), x + (column - 1)
                inside = (down >= 0) & (down < height)
                inside &= (beside >= 0) & (beside < width)
                away = (row - 1) * width * GIVEN
                away += (column - 1) * _beside(GIVEN, FROM_SHUFFLED)
                inside &= is_given[None, :]
                pixel = tl.load(given + (at + away), mask=inside, other=0.0)
                total = dot(pixel, weights[3 * row + column], total)
        if HAS_BIAS:
            total += bias
        own = found_ptr + image * height * width * FOUND
        own += _place(y, x, found[None, :], width, WIDE, FOUND, TO_SHUFFLED)
        inside = (y < height) & (x < width) & is_found[None, :]
        tl.store(own, total.to(found_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "tiles"])
def _convolution_weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    part_ptr,
    count,
    tiles,
    height,
    width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What a program's tiles are worth to the weights, (3, LANES, WIDE), and after them
    to the biases, (WIDE,). Lanes are the channels of three neighbours in a row, results
    in the order of `_channel`.
    """
    program = tl.program_id(0)
    first = program * tiles
    lane = tl.arange(0, LANES)[None, :]
    result = tl.arange(0, WIDE)[None, :]
    _number, is_result = _channel(result, WIDE, RESULTS, SHUFFLED)
    above = tl.zeros((LANES, WIDE), tl.float32)
    level = tl.zeros((LANES, WIDE), tl.float32)
    below = tl.zeros((LANES, WIDE), tl.float32)
    alone = tl.zeros((DOWN * ACROSS, WIDE), tl.float32)
    for number in range(bound(first), bound(tl.minimum(first + tiles, count))):
        image, y, x = _tile(number, height, width, DOWN, ACROSS)
        own = dy_ptr + image * height * width * RESULTS
        own += _place(y, x, result, width, WIDE, RESULTS, SHUFFLED)
        inside = (y < height) & (x < width) & is_result
        dy = tl.load(own, mask=inside, other=0.0)
        alone += dy.to(tl.float32)
        given = x_ptr + image * height * width * CHANNELS
        # Side by side: lanes go on where a pixel's channels end.
        at = _place(y, x - 1, lane, width, LANES, CHANNELS, False)
        beside = x + (lane // CHANNELS - 1)
        wide = (beside >= 0) & (beside < width) & (lane < 3 * CHANNELS)
        down = width * CHANNELS
        inside = wide & (y >= 1) & (y <= height)
        window = tl.load(given + (at - down), mask=inside, other=0.0)
        above = dot(tl.trans(window), dy, above)
        window = tl.load(given + at, mask=wide & (y < height), other=0.0)
        level = dot(tl.trans(window), dy, level)
        window = tl.load(given + (at + down), mask=wide & (y + 1 < height), other=0.0)
        below = dot(tl.trans(window), dy, below)
    part_ptr += program.to(tl.int64) * (3 * LANES + 1) * WIDE
    own = tl.arange(0, LANES)[:, None] * WIDE + result
    tl.store(part_ptr + own, above)
    tl.store(part_ptr + LANES * WIDE + own, level)
    tl.store(part_ptr + 2 * LANES * WIDE + own, below)
    last = part_ptr + 3 * LANES * WIDE + tl.arange(0, WIDE)
    tl.store(last, tl.sum(alone, 0))


@library.custom_op("palimpsest::small_convolution", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool) -> Tensor:
    return _launch_forward(x, weight, bias, shuffled)


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool
) -> Tensor:
    y = _result_like(x, weight, shuffled)
    _convolve(x, weight, bias, y, turned=False, shuffled=shuffled)
    return y


def _result_like(x: Tensor, weight: Tensor, shuffled: bool) -> Tensor:
    """What a forward pass gives, by shape; channels last."""
    images, _, height, width = x.shape
    results = len(weight)
    if shuffled:
        height, width, results = 2 * height, 2 * width, results // 4
    return _channels_last(x, (images, results, height, width))


def _channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _convolve(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: Tensor,
    *,
    turned: bool,
    shuffled: bool,
) -> None:
    """Writes all of `found`; `turned` it has the channels that `weight` is given, and
    what is `shuffled` is what is given.
    """
    weight = weight.contiguous()
    results, channels = weight.shape[:2]
    ends = (results, channels) if turned else (channels, results)
    steps = (9 * channels, 9) if turned else (9, 9 * channels)
    images, _, height, width = (found if turned else given).shape
    count, tiles, programs = _share(images, height, width)
    if not count:
        return
    _convolution_kernel[(programs,)](
        given.contiguous(memory_format=torch.channels_last),
        weight,
        weight if bias is None else bias.contiguous(),
        found,
        *(count, tiles, height, width),
        *steps,
        GIVEN=ends[0],
        FOUND=ends[1],
        LANES=_lanes(ends[0]),
        WIDE=_lanes(ends[1]),
        TURNED=turned,
        FROM_SHUFFLED=shuffled and turned,
        TO_SHUFFLED=shuffled and not turned,
        HAS_BIAS=bias is not None,
        DOWN=_DOWN,
        ACROSS=_ACROSS,
        num_warps=4,
        num_stages=_STAGES,
    )


def _share(images: int, height: int, width: int) -> tuple[int, int, int]:
    """Tiles, those of a program, and programs."""
    down, across = triton.cdiv(height, _DOWN), triton.cdiv(width, _ACROSS)
    count = images * down * across
    tiles = max(triton.cdiv(count, _PROGRAMS), 1)
    return count, tiles, triton.cdiv(count, tiles)


def _lanes(numbers: int) -> int:
    """A power of two that is enough for so many, and for a matrix product."""
    return max(triton.next_power_of_2(numbers), 16)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool) -> Tensor:
    return _result_like(x, weight, shuffled)


@library.custom_op("palimpsest::small_convolution_backward", mutates_args=())
def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, shuffled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, channels last, of the weights and of the biases."""
    return _launch_backward(dy, x, weight, shuffled)


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, shuffled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _channels_last(x, tuple(x.shape))
    _convolve(dy, weight, None, dx, turned=True, shuffled=shuffled)
    results, channels = weight.shape[:2]
    lanes, wide = _lanes(3 * channels), _lanes(results)
    images, _, height, width = x.shape
    count, tiles, programs = _share(images, height, width)
    numbers = (3 * lanes + 1) * wide
    parts = x.new_empty(1, programs if count else 0, numbers, dtype=torch.float32)
    if count:
        _convolution_weights_kernel[(programs,)](
            x.contiguous(memory_format=torch.channels_last),
            dy.contiguous(memory_format=torch.channels_last),
            parts,
            *(count, tiles, height, width),
            CHANNELS=channels,
            RESULTS=results,
            LANES=lanes,
            WIDE=wide,
            SHUFFLED=shuffled,
            DOWN=_DOWN,
            ACROSS=_ACROSS,
            num_warps=4,
            num_stages=_WEIGHT_STAGES,
        )
    whole = sum_parts(parts, weight.dtype)[0].view(3 * lanes + 1, wide)
    whole = _by_channel(whole, results, shuffled)
    windows = whole[:-1].unflatten(0, (3, lanes))[:, : 3 * channels]
    d_weight = windows.reshape(3, 3, channels, results).permute(3, 2, 0, 1)
    return dx, d_weight.contiguous(), whole[-1].clone()


def _by_channel(table: Tensor, results: int, shuffled: bool) -> Tensor:
    """Columns in the order of channels, of those that a kernel has (`_channel`)."""
    if not shuffled:
        return table[:, :results]
    halves = table.unflatten(1, (2, -1))[:, :, : results // 2]
    return halves.unflatten(2, (2, -1)).permute(0, 3, 1, 2).flatten(1)


@convolution_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, shuffled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return _channels_last(x, tuple(x.shape)), d_weight, weight.new_empty(len(weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.shuffled = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _differentiate(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], ctx: Any, dy: Tensor
) -> tuple[Tensor | None, ...]:
    dx, d_weight, d_bias = backward(dy, *ctx.saved_tensors, ctx.shuffled)
    return dx, d_weight, d_bias if ctx.has_bias else None, None


_forward.register_autograd(
    partial(_differentiate, convolution_backward), setup_context=_keep
)
_direct = direct(_launch_forward, _keep, partial(_differentiate, _launch_backward))


def _case(
    images: int,
    channels: int,
    results: int,
    height: int,
    width: int,
    *,
    bias: bool,
    shuffled: bool = False,
    small: bool = False,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(images, channels, height, width), (results, channels, 3, 3)]
        drawn = [
            torch.randn(shape, generator=generator, device=device).to(dtype)
            for shape in (*shapes, (results,))
        ]
        x = drawn[0].contiguous(memory_format=torch.channels_last)
        given = [x, drawn[1] * (9 * channels) ** -0.5, drawn[2] if bias else None]
        return *(
            part if part is None else part.requires_grad_() for part in given
        ), shuffled

    pixels = images * height * width
    product = 2.0 * pixels * 9 * channels * results

    def moved(dtype: torch.dtype, *, given: int, found: int) -> int:
        return pixels * (given * channels + found * results) * dtype.itemsize

    kind = ", in squares" if shuffled else ""
    return Case(
        kernel="small convolution",
        shape=f"B={images} C={channels} N={results} H={height} W={width}{kind}",
        inputs=inputs,
        fused=convolution_fused,
        reference=convolution_ref,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 8e-3},
        reason="fp32: sums in another order; bf16: results are rounded once (2^-9 of "
        "them on average), and cut off to it by up to 2^-7 under Triton's interpreter",
        forward_bytes=partial(moved, given=1, found=1),
        # Reads x and the gradient, writes that of x.
        backward_bytes=partial(moved, given=2, found=1),
        forward_flops=product,
        backward_flops=2 * product,
        small=small,
    )


# The last two are the decoder's last layers of 64 images, of mlim-base and of
# mlim-large-384.
CASES = (
    _case(1, 1, 1, 1, 1, bias=True, small=True),
    _case(2, 3, 5, 9, 17, bias=False, small=True),
    _case(2, 16, 12, 7, 20, bias=True, shuffled=True, small=True),
    _case(1, 32, 16, 8, 16, bias=False, small=True),
    _case(64, 32, 16, 112, 112, bias=False),
    _case(64, 16, 12, 112, 112, bias=True, shuffled=True),
    _case(64, 32, 16, 192, 192, bias=False),
    _case(64, 16, 12, 192, 192, bias=True, shuffled=True),
)
