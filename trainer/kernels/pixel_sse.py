"""Error of restored images over squares of pixels, straight from uint8 and logits.

Owns the kernel, its reference and its cases. Does not own the decoder or the choice of
images and squares (`trainer.models.mlim`).

One program takes one square of one image: it normalises the target, takes the sigmoid,
and sums in fp32 in a fixed order; a second sum runs over the squares of each image.
Squares that do not count are not read. Nothing of the size of the images is written but
the gradient, in the dtype of the decoder's outputs.

Shapes: B images of a micro-batch, R restored ones (a capacity), H, W pixels, P squares.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs

_TILE = 4096

Error = Literal["squared", "absolute"]


def masked_pixel_error(
    raw: Tensor,
    pixels: Tensor,
    image: Tensor,
    scored: Tensor,
    *,
    side: int,
    error: Error = "squared",
) -> Tensor:
    """Error (R,) in fp32 between sigmoid(raw) and pixels / 255, summed over channels
    and over the squares that count of each image: the kernel on CUDA tensors, the
    reference elsewhere.

    Sums, so that a step divides by its global count. RECON (MLIM, section 3) is a mean
    of squared errors over pixels. MaskVLM's (Kwon et al., 2023) is of absolute ones,
    "absolute"; its paper does not say whether the mean is over pixels or over their
    three channels: for the latter divide by three times the pixels.

    Args:
        raw: (R, 3, H, W) outputs of the decoder, before the sigmoid.
        pixels: (B, H, W, 3) uint8.
        image: (R,) integers, which of `pixels` each restores.
        scored: (R, P) bool, which squares of each image count, row by row.
        side: of a square, in pixels.

    Raises:
        ValueError: H x W is not P such squares.
    """
    chosen = masked_pixel_error_fused if raw.is_cuda else reference
    return chosen(raw, pixels, image, scored, side=side, error=error)


def reference(
    raw: Tensor,
    pixels: Tensor,
    image: Tensor,
    scored: Tensor,
    *,
    side: int,
    error: Error = "squared",
) -> Tensor:
    """`masked_pixel_error` in plain torch; in fp64 if `raw` is."""
    _require_squares(raw, scored, side)
    wide = torch.promote_types(raw.dtype, torch.float32)
    target = pixels[image].permute(0, 3, 1, 2).to(wide) / 255
    difference = torch.sigmoid(raw.to(wide)) - target
    each = difference.square() if error == "squared" else difference.abs()
    return (sums_of_squares(each.sum(1), side) * scored).sum(1)


def masked_pixel_error_fused(
    raw: Tensor,
    pixels: Tensor,
    image: Tensor,
    scored: Tensor,
    *,
    side: int,
    error: Error = "squared",
) -> Tensor:
    """`masked_pixel_error` by the kernel, on CUDA tensors or under Triton's
    interpreter.
    """
    _require_squares(raw, scored, side)
    return _forward_op(raw, pixels, image, scored, side, error == "absolute").sum(1)


def sums_of_squares(map_rhw: Tensor, side: int) -> Tensor:
    """Sum of a map (R, H, W) over each square of `side` x `side`: (R, P)."""
    tiles = map_rhw.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return tiles.sum((2, 4)).flatten(1)


def _require_squares(raw: Tensor, scored: Tensor, side: int) -> None:
    height, width = raw.shape[2:]
    count = (height // side) * (width // side)
    if height % side or width % side or scored.shape[1] != count:
        raise ValueError(
            f"{height} x {width} pixels are not {scored.shape[1]} squares of {side}: "
            "give `scored` a column for every square"
        )


@triton.jit
def _pixel_error_forward_kernel(
    raw: tl.tensor,
    pixels: tl.tensor,
    image: tl.tensor,
    scored: tl.tensor,
    sums: tl.tensor,
    raw_stride: tl.tensor,
    pixels_stride: tl.tensor,
    RAW_ROW: tl.constexpr,
    RAW_COLUMN: tl.constexpr,
    RAW_CHANNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    SIDE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program a square."""
    program = tl.program_id(0).to(tl.int64)
    total = 0.0
    if tl.load(scored + program) != 0:
        row, square = program // SQUARES, (program % SQUARES).to(tl.int32)
        raw += row * raw_stride
        pixels += tl.load(image + row) * pixels_stride
        partial = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.static_range(0, SIDE, ROWS):
            y, j, inside = _places(first, SIDE, ROWS, COLUMNS)
            at, to = _offsets(
                square, y, j, RAW_ROW, RAW_COLUMN, RAW_CHANNEL, WIDTH, SIDE
            )
            x = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)
            target = tl.load(pixels + to, mask=inside, other=0).to(tl.float32)
            difference = tl.sigmoid(x) - target / 255
            if ABSOLUTE:
                each = tl.abs(difference)
            else:
                each = difference * difference
            partial += tl.where(inside, each, 0.0)
        total = tl.sum(tl.sum(partial, 1), 0)
    tl.store(sums + program, total)


@triton.jit
def _pixel_error_backward_kernel(
    grad: tl.tensor,
    raw: tl.tensor,
    pixels: tl.tensor,
    image: tl.tensor,
    scored: tl.tensor,
    output: tl.tensor,
    grad_row: tl.tensor,
    grad_column: tl.tensor,
    raw_stride: tl.tensor,
    pixels_stride: tl.tensor,
    output_stride: tl.tensor,
    RAW_ROW: tl.constexpr,
    RAW_COLUMN: tl.constexpr,
    RAW_CHANNEL: tl.constexpr,
    OUTPUT_ROW: tl.constexpr,
    OUTPUT_COLUMN: tl.constexpr,
    OUTPUT_CHANNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    SIDE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program a square."""
    program = tl.program_id(0).to(tl.int64)
    row, square = program // SQUARES, (program % SQUARES).to(tl.int32)
    counts = tl.load(scored + program) != 0
    upstream = tl.load(grad + row * grad_row + square * grad_column).to(tl.float32)
    raw += row * raw_stride
    output += row * output_stride
    pixels += tl.load(image + row) * pixels_stride
    for first in tl.static_range(0, SIDE, ROWS):
        y, j, inside = _places(first, SIDE, ROWS, COLUMNS)
        slope = tl.zeros((ROWS, COLUMNS), tl.float32)
        if counts:
            at, to = _offsets(
                square, y, j, RAW_ROW, RAW_COLUMN, RAW_CHANNEL, WIDTH, SIDE
            )
            x = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)
            target = tl.load(pixels + to, mask=inside, other=0).to(tl.float32)
            restored = tl.sigmoid(x)
            slope = restored - target / 255
            if ABSOLUTE:
                slope = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, 0.0))
            else:
                slope = 2 * slope
            slope *= upstream * restored * (1 - restored)
        at, _ = _offsets(
            square, y, j, OUTPUT_ROW, OUTPUT_COLUMN, OUTPUT_CHANNEL, WIDTH, SIDE
        )
        tl.store(output + at, slope.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _places(
    first: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows of a square from `first` on, and numbers in a row, three for each pixel."""
    y = first + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    return y, j, (y < SIDE) & (j < 3 * SIDE)


@triton.jit
def _offsets(
    square: tl.tensor,
    y: tl.tensor,
    j: tl.tensor,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CHANNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where numbers of a square lie in an image of the decoder, and in the target."""
    y += square // (WIDTH // SIDE) * SIDE
    left = square % (WIDTH // SIDE) * SIDE
    to = y * (3 * WIDTH) + left * 3 + j
    if COLUMN == 3 and CHANNEL == 1:
        # Channels last: spelt so that the compiler sees whole vectors.
        at = y * ROW + left * 3 + j
    else:
        at = y * ROW + (left + j // 3) * COLUMN + j % 3 * CHANNEL
    return at, to


@library.custom_op("palimpsest::masked_pixel_error", mutates_args=())
def _forward_op(
    raw: Tensor,
    pixels: Tensor,
    image: Tensor,
    scored: Tensor,
    side: int,
    absolute: bool,
) -> Tensor:
    """Error (R, P) of every square, 0 where it does not count."""
    sums = raw.new_empty(scored.shape, dtype=torch.float32)
    pixels = pixels.contiguous()
    first, channel, row, column = raw.stride()
    _pixel_error_forward_kernel[(scored.numel(),)](
        raw,
        pixels,
        image.contiguous(),
        scored.contiguous(),
        sums,
        first,
        pixels.stride(0),
        RAW_ROW=row,
        RAW_COLUMN=column,
        RAW_CHANNEL=channel,
        ABSOLUTE=absolute,
        **_tiling(raw, scored, side),
    )
    return sums


@_forward_op.register_fake
def _(raw: Tensor, _pixels: Tensor, _image: Tensor, scored: Tensor, *_: Any) -> Tensor:
    return raw.new_empty(scored.shape, dtype=torch.float32)


@library.custom_op("palimpsest::masked_pixel_error_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    raw: Tensor,
    pixels: Tensor,
    image: Tensor,
    scored: Tensor,
    side: int,
    absolute: bool,
) -> Tensor:
    """Gradient (R, 3, H, W) of the decoder's outputs."""
    output = torch.empty_like(raw)
    pixels = pixels.contiguous()
    first, channel, row, column = raw.stride()
    output_first, output_channel, output_row, output_column = output.stride()
    _pixel_error_backward_kernel[(scored.numel(),)](
        grad,
        raw,
        pixels,
        image.contiguous(),
        scored.contiguous(),
        output,
        *grad.stride(),
        first,
        pixels.stride(0),
        output_first,
        RAW_ROW=row,
        RAW_COLUMN=column,
        RAW_CHANNEL=channel,
        OUTPUT_ROW=output_row,
        OUTPUT_COLUMN=output_column,
        OUTPUT_CHANNEL=output_channel,
        ABSOLUTE=absolute,
        **_tiling(raw, scored, side),
    )
    return output


@_backward_op.register_fake
def _(_grad: Tensor, raw: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(raw)


def _tiling(raw: Tensor, scored: Tensor, side: int) -> dict[str, int]:
    """Constants of both kernels: a square is taken in tiles of whole rows."""
    columns = triton.next_power_of_2(3 * side)
    rows = min(triton.next_power_of_2(side), max(_TILE // columns, 1))
    return {
        "WIDTH": raw.shape[3],
        "SQUARES": scored.shape[1],
        "SIDE": side,
        "ROWS": rows,
        "COLUMNS": columns,
    }


def _keep(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    *tensors, ctx.side, ctx.absolute = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slope = _backward_op(grad, *ctx.saved_tensors, ctx.side, ctx.absolute)
    return slope, None, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    pairs: int,
    images: int,
    size: int,
    side: int,
    channels_last: bool,
    whole: bool,
) -> Inputs:
    """Images of which half are masked at 80 % and half at 15 %; of several the last is
    not valid.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (images, 3, size, size)
    raw = torch.randn(shape, device=device, generator=generator).to(dtype)
    if channels_last:
        raw = raw.contiguous(memory_format=torch.channels_last)
    pixels = torch.randint(
        256,
        (pairs, size, size, 3),
        dtype=torch.uint8,
        device=device,
        generator=generator,
    )
    image = torch.randperm(pairs, device=device, generator=generator)[:images]
    drawn = torch.rand(
        (images, (size // side) ** 2), device=device, generator=generator
    )
    number = torch.arange(images, device=device)[:, None]
    rate = torch.where(number % 2 == 0, 0.8, 0.15)
    scored = (drawn < rate) | whole
    scored &= (number < images - 1) | (images == 1)
    return raw.requires_grad_(), pixels, image, scored


def _case(
    shape: str,
    *,
    images: int,
    size: int,
    side: int,
    pairs: int | None = None,
    channels_last: bool = True,
    whole: bool = False,
    error: Error = "squared",
    small: bool = False,
) -> Case:
    numbers = images * size**2 * 3
    share = 1.0 if whole else (0.8 + 0.15) / 2
    layout = "channels last" if channels_last else "channels first"
    region = "whole" if whole else "masked"
    return Case(
        kernel="masked-pixel error",
        shape=f"{shape}R={images} {size} px P={(size // side) ** 2}, {region}, {error}"
        f", {layout}",
        inputs=partial(
            _inputs,
            pairs=pairs or images,
            images=images,
            size=size,
            side=side,
            channels_last=channels_last,
            whole=whole,
        ),
        fused=partial(masked_pixel_error_fused, side=side, error=error),
        reference=partial(reference, side=side, error=error),
        tolerances={torch.float32: 1e-5, torch.bfloat16: 8e-3},
        reason="all in fp32; the gradient is rounded to the dtype of the decoder's "
        "outputs, in bf16 by up to 2^-8, and cut off to it by up to 2^-7 under "
        "Triton's interpreter",
        forward_bytes=lambda dtype: int(share * numbers * (dtype.itemsize + 1)),
        backward_bytes=lambda dtype: int(
            share * numbers * (dtype.itemsize + 1) + numbers * dtype.itemsize
        ),
        small=small,
    )


# Of 96 pairs two thirds have masked image positions.
_base = partial(_case, "mlim-base: ", pairs=96, images=64, size=224, side=32)
_large = partial(_case, "mlim-large-384: ", pairs=96, images=64, size=384, side=32)

CASES = (
    _case("", images=1, size=4, side=4, whole=True, small=True),
    _case("", images=3, size=12, side=2, pairs=5, small=True),
    _case("", images=4, size=21, side=7, pairs=6, channels_last=False, small=True),
    _case("", images=3, size=24, side=8, error="absolute", small=True),
    _case("", images=2, size=48, side=48, whole=True, small=True),
    _base(),
    _base(whole=True),
    _large(),
    _large(whole=True),
    _large(channels_last=False),
    _large(error="absolute"),
)
