"""Convolutions of 3 x 3 whose channels are few, for which cuDNN has slow kernels alone.

Owns the kernels, forward and backward, and their reference. Does not own the layers
that are made of them (`trainer.models.convolutions`).

A program has a strip of pixels of a band of rows, and goes down it. It reads a row
once, each pixel with its two neighbours, which lie side by side in memory, and
multiplies it by the weights of the three rows of the window: what it is worth to the
row above, to its own and to the one below. Nothing is laid out anew, but for gradients
that lie as pixels of squares (Shi et al., "Real-time single image and video
super-resolution using an efficient sub-pixel convolutional neural network", 2016), and
results are written as these. Sums are fp32 and without atomics: the same inputs give
the same bits.

Shapes: B images of H x W pixels, C channels, N of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs
from trainer.kernels.parts import bound, direct, dot, observed, sum_parts


class Strip(NamedTuple):
    """Of an image."""

    across: int
    """Pixels."""
    rows: int
    """At most, of which a program reads one or two more."""


# Strips and programs were the fastest of eight on an H200, or as fast, for images of
# 112 and of 192 pixels (`benchmarks/results/gpu/small-convolution.txt`).
_RESULTS = Strip(64, 32)
# Of gradients of weights, by the lanes of their windows, with about how many programs:
# 8 or 16 for each of the 132 multiprocessors of an H100 or H200. Not asked of the
# device: sums would depend on it.
_WEIGHTS = {128: (Strip(32, 32), 1056)}
_NARROW_WEIGHTS = (Strip(64, 48), 2112)
_PIXELS = 64
"""Of a program that lays pixels of squares side by side."""
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
def strip_at(number, height, width, ROWS: tl.constexpr, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Image, first row and the row after the last of a strip of a band, and the column
    of each of its pixels, below each other.
    """
    across = tl.cdiv(width, ACROSS)
    bands = tl.cdiv(height, ROWS)
    first = number // across % bands * ROWS
    x = number % across * ACROSS + tl.arange(0, ACROSS)[:, None]
    image = (number // across // bands).to(tl.int64)
    return image, first, tl.minimum(first + ROWS, height), x


@triton.jit
def _windows(x, lane, width, LAID: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in its row the channels of each pixel and its neighbours lie, side by side,
    and which of them are inside the image.
    """
    beside = x + (lane // LAID - 1)
    inside = (beside >= 0) & (beside < width) & (lane < 3 * LAID)
    return (x - 1) * LAID + lane, inside


@triton.jit(do_not_specialize=["height"])
def _convolution_kernel(  # type: ignore[no-untyped-def]
    given_ptr,
    weight_ptr,
    bias_ptr,
    found_ptr,
    height,
    width,
    of_given,
    of_found,
    GIVEN: tl.constexpr,
    LAID: tl.constexpr,
    FOUND: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    TURNED: tl.constexpr,
    SHUFFLED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What is given has GIVEN channels, in LAID numbers of memory, what is found FOUND;
    a weight of them is `of_given` and `of_found` numbers after that of the channel
    before.
    """
    image, first, end, x = strip_at(tl.program_id(0), height, width, ROWS, ACROSS)
    lane = tl.arange(0, LANES)
    found = tl.arange(0, WIDE)
    channel, is_found = _channel(found, WIDE, FOUND, SHUFFLED)
    place = lane // LAID
    along = lane % LAID * of_given + (2 - place if TURNED else place)
    weight_ptr += along[:, None] + channel[None, :] * of_found
    there = (lane % LAID < GIVEN) & (place < 3)
    there = there[:, None] & is_found[None, :]
    upper = tl.load(weight_ptr + (6 if TURNED else 0), mask=there, other=0.0)
    middle = tl.load(weight_ptr + 3, mask=there, other=0.0)
    lower = tl.load(weight_ptr + (0 if TURNED else 6), mask=there, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=is_found, other=0.0)
        bias = bias.to(tl.float32)[None, :]
    at, inside = _windows(x, lane[None, :], width, LAID)
    row = given_ptr + image * height * width * LAID
    row += (first - 1).to(tl.int64) * width * LAID
    own = found_ptr + image * height * width * FOUND
    is_own = (x < width) & is_found[None, :]
    window = tl.load(row + at, mask=inside & (first > 0), other=0.0)
    above = tl.zeros((ACROSS, WIDE), tl.float32)
    level = tl.zeros((ACROSS, WIDE), tl.float32)
    for y in range(bound(first - 1), bound(end + 1)):
        row += width * LAID
        ahead = tl.load(row + at, mask=inside & (y + 1 < height), other=0.0)
        whole = dot(window, lower, above)
        above = dot(window, middle, level)
        level = dot(window, upper, None)
        if HAS_BIAS:
            whole += bias
        to = own + _place(y - 1, x, found[None, :], width, WIDE, FOUND, SHUFFLED)
        tl.store(to, whole.to(found_ptr.dtype.element_ty), mask=is_own & (y > first))
        window = ahead


@triton.jit(do_not_specialize=["count", "strips", "height"])
def _convolution_weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    part_ptr,
    count,
    strips,
    height,
    width,
    CHANNELS: tl.constexpr,
    LAID: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What `strips` strips are worth to the weights, (3, LANES, WIDE), and after them
    to the biases, (WIDE,). Lanes are the channels of three neighbours in a row.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)[None, :]
    result = tl.arange(0, WIDE)[None, :]
    upper = tl.zeros((LANES, WIDE), tl.float32)
    middle = tl.zeros((LANES, WIDE), tl.float32)
    lower = tl.zeros((LANES, WIDE), tl.float32)
    alone = tl.zeros((ACROSS, WIDE), tl.float32)
    start = program * strips
    for number in range(bound(start), bound(tl.minimum(start + strips, count))):
        image, first, end, x = strip_at(number, height, width, ROWS, ACROSS)
        at, inside = _windows(x, lane, width, CHANNELS)
        row = x_ptr + (image * height + first) * width * CHANNELS
        own = dy_ptr + (image * height + first) * width * LAID + (x * LAID + result)
        is_own = (x < width) & (result < LAID)
        step = width * LAID
        dy_above = tl.load(own - step, mask=is_own & (first > 0), other=0.0)
        dy = tl.load(own, mask=is_own, other=0.0)
        for y in range(bound(first), bound(end)):
            own += step
            window = tl.load(row + at, mask=inside, other=0.0)
            dy_below = tl.load(own, mask=is_own & (y + 1 < height), other=0.0)
            turned = tl.trans(window)
            upper = dot(turned, dy_below, upper)
            middle = dot(turned, dy, middle)
            lower = dot(turned, dy_above, lower)
            alone += dy.to(tl.float32)
            dy_above = dy
            dy = dy_below
            row += width * CHANNELS
    part_ptr += program.to(tl.int64) * (3 * LANES + 1) * WIDE
    to = tl.arange(0, LANES)[:, None] * WIDE + result
    tl.store(part_ptr + to, upper)
    tl.store(part_ptr + LANES * WIDE + to, middle)
    tl.store(part_ptr + 2 * LANES * WIDE + to, lower)
    last = part_ptr + 3 * LANES * WIDE + tl.arange(0, WIDE)
    tl.store(last, tl.sum(alone, 0))


@triton.jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    squares_ptr,
    out_ptr,
    width,
    RESULTS: tl.constexpr,
    LAID: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Channels side by side, (width, LAID), of a row of squares; others are 0."""
    row = tl.program_id(0).to(tl.int64) * width
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, LAID)[None, :]
    beside = channel % 4 // 2 * (2 * width) + 2 * pixel + channel % 2
    at = beside * (RESULTS // 4) + channel // 4
    inside = (pixel < width) & (channel < RESULTS)
    squares = tl.load(squares_ptr + row * RESULTS + at, mask=inside, other=0.0)
    to = out_ptr + row * LAID + (pixel * LAID + channel)
    tl.store(to, squares, mask=pixel < width)


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
    """Where the channel of each lane of a pixel lies in its image."""
    if SHUFFLED:
        row = width * (CHANNELS // 2)
        start = y * (2 * row) + x * (CHANNELS // 2)
        return start + lane // (LANES // 2) * row + lane % (LANES // 2)
    return (y * width + x) * CHANNELS + lane


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
    return channels_last(x, (images, results, height, width))


def channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of a shape, with channels last in memory."""
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
    shuffled: bool = False,
) -> None:
    """Writes all of `found`, which is `shuffled` or not; `turned` it has the channels
    that `weight` is given. What is given may have more channels in memory, of zeros.
    """
    weight = weight.contiguous()
    results, channels = weight.shape[:2]
    ends = (results, channels) if turned else (channels, results)
    steps = (9 * channels, 9) if turned else (9, 9 * channels)
    laid, height, width = given.shape[1:]
    count = strips_of(given, _RESULTS)
    if not count:
        return
    _convolution_kernel[(count,)](
        given.contiguous(memory_format=torch.channels_last),
        weight,
        weight if bias is None else bias.contiguous(),
        found,
        *(height, width),
        *steps,
        GIVEN=ends[0],
        LAID=laid,
        FOUND=ends[1],
        LANES=lanes_for(3 * laid),
        WIDE=lanes_for(ends[1]),
        TURNED=turned,
        SHUFFLED=shuffled,
        HAS_BIAS=bias is not None,
        ROWS=_RESULTS.rows,
        ACROSS=_RESULTS.across,
        num_warps=4,
        num_stages=1,
    )


def strips_of(images: Tensor, strip: Strip) -> int:
    """How many there are in (B, C, H, W)."""
    count, _, height, width = images.shape
    return count * triton.cdiv(height, strip.rows) * triton.cdiv(width, strip.across)


def _beside_each_other(dy: Tensor, results: int) -> Tensor:
    """(B, N / 4, 2 H, 2 W) pixels of squares as channels, N and zeros after them:
    (B, 16, H, W), channels last.
    """
    images, _, height, width = dy.shape
    height, width = height // 2, width // 2
    laid = lanes_for(results)
    out = channels_last(dy, (images, laid, height, width))
    rows = images * height
    if rows:
        _squares_kernel[(rows, triton.cdiv(width, _PIXELS))](
            dy.contiguous(memory_format=torch.channels_last),
            out,
            width,
            RESULTS=results,
            LAID=laid,
            PIXELS=_PIXELS,
            num_warps=4,
        )
    return out


def lanes_for(numbers: int) -> int:
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
    results, channels = weight.shape[:2]
    if shuffled:
        dy = _beside_each_other(dy, results)
    dx = channels_last(x, tuple(x.shape))
    _convolve(dy, weight, None, dx, turned=True)
    lanes, wide = lanes_for(3 * channels), lanes_for(results)
    strip, most = _WEIGHTS.get(lanes, _NARROW_WEIGHTS)
    count = strips_of(x, strip)
    strips = max(triton.cdiv(count, most), 1)
    programs = triton.cdiv(count, strips)
    numbers = (3 * lanes + 1) * wide
    parts = x.new_empty(1, programs, numbers, dtype=torch.float32)
    if count:
        _convolution_weights_kernel[(programs,)](
            x.contiguous(memory_format=torch.channels_last),
            dy.contiguous(memory_format=torch.channels_last),
            parts,
            *(count, strips, *x.shape[2:]),
            CHANNELS=channels,
            LAID=dy.shape[1],
            LANES=lanes,
            WIDE=wide,
            ROWS=strip.rows,
            ACROSS=strip.across,
            num_warps=4,
            num_stages=1,
        )
    whole = sum_parts(parts, weight.dtype)[0].view(3 * lanes + 1, wide)[:, :results]
    windows = whole[:-1].unflatten(0, (3, lanes))[:, : 3 * channels]
    d_weight = windows.reshape(3, 3, channels, results).permute(3, 2, 0, 1)
    return dx, d_weight.contiguous(), whole[-1].clone()


@convolution_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, shuffled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return channels_last(x, tuple(x.shape)), d_weight, weight.new_empty(len(weight))


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
