"""Pixels from uint8 to what the embedder takes, in one pass.

Owns the normalisation, its kernels and their references, and the nested order of
pixels. Does not own the embedder (`trainer.models.convolutions`).

In nested order (Morton's) the four pixels of every square of 2 x 2 follow each other,
and so do the four squares of 2 x 2 of every one of 4 x 4, up to one of S x S: then a
convolution of 2 x 2 by steps of 2 is a matrix product on what lies there.

Shapes: B images of H x W pixels, P squares of S x S in each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs

_BLOCK = 4096
"""Values of a program."""
CHANNELS = 4
"""Of a pixel in nested order: red, green, blue and 0. Four pixels are 16 numbers then,
which matrix products take in whole vectors."""


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) from -1 to 1, in `dtype`, channels last in
    memory: by the kernel on a CUDA device, elsewhere by the reference.
    """
    if pixels.is_cuda:
        return normalised_fused(pixels, dtype)
    return normalised_ref(pixels, dtype)


def normalised_ref(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, every step of it rounded to `dtype`."""
    return pixels.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def normalised_fused(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by the kernel, wherever the pixels are; rounded once."""
    found: Tensor = _normalise(pixels, dtype)
    return found.permute(0, 3, 1, 2)


# For multiples of 16, as of any usual image, it is compiled to whole vectors.
@triton.jit
def _normalise_kernel(
    pixels: tl.tensor, out: tl.tensor, n: tl.int64, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(pixels + at, mask=at < n, other=0).to(tl.float32) / 127.5 - 1.0
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@library.custom_op(
    "palimpsest::normalised_pixels",
    mutates_args=(),
    schema="(Tensor pixels, ScalarType dtype) -> Tensor",
)
def _normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    out = _empty(pixels, dtype)
    _normalise_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        pixels.contiguous(), out, out.numel(), BLOCK=_BLOCK
    )
    return out


@_normalise.register_fake
def _empty(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(pixels.shape, dtype=dtype, device=pixels.device)


def nested(pixels: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """(B, H, H, 3) uint8 -> (B x P x S x S, 4) from -1 to 1 in nested order, squares of
    an image by rows: by the kernel on a CUDA device, elsewhere by the reference.

    Raises:
        ValueError: an image is no square of squares, or `side` no power of two.
    """
    if pixels.is_cuda:
        return nested_fused(pixels, side, dtype)
    return nested_ref(pixels, side, dtype)


def nested_ref(pixels: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, every step of it rounded to `dtype`."""
    levels, grid = _levels(pixels, side)
    halves = (2,) * levels
    # Images, rows of squares, halves of halves of their rows, and the same of columns.
    parts = pixels.reshape(len(pixels), grid, *halves, grid, *halves, 3)
    down, across = 2, 3 + levels
    pairs = [n for level in range(levels) for n in (down + level, across + level)]
    ordered = parts.permute(0, 1, across - 1, *pairs, across + levels)
    values = ordered.reshape(-1, 3).to(dtype) / 127.5 - 1
    return torch.nn.functional.pad(values, (0, CHANNELS - 3))


def nested_fused(pixels: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """The same by the kernel, wherever the pixels are; rounded once."""
    found: Tensor = _nest(pixels, side, dtype)
    return found


def _levels(pixels: Tensor, side: int) -> tuple[int, int]:
    """How often a square is halved, and squares in a row."""
    levels, (height, width) = side.bit_length() - 1, pixels.shape[1:3]
    if side != 1 << levels or height != width or width % side:
        raise ValueError(
            f"{height} x {width} pixels are no square of squares of {side} x {side}, "
            "or that is no power of two"
        )
    return levels, width // side


@triton.jit
def _nested_kernel(
    pixels: tl.tensor,
    out: tl.tensor,
    n: tl.int64,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = (at % 4).to(tl.int32)
    place = at // 4
    inner = (place % (1 << (2 * LEVELS))).to(tl.int32)
    square = (place >> (2 * LEVELS)).to(tl.int32)
    x = inner * 0
    y = inner * 0
    for level in tl.static_range(0, LEVELS):
        x |= ((inner >> (2 * level)) & 1) << level
        y |= ((inner >> (2 * level + 1)) & 1) << level
    x += square % (WIDTH >> LEVELS) << LEVELS
    y += square // (WIDTH >> LEVELS) % (WIDTH >> LEVELS) << LEVELS
    image = square // ((WIDTH >> LEVELS) * (WIDTH >> LEVELS))
    source = (image * WIDTH + y).to(tl.int64) * (3 * WIDTH) + x * 3 + channel
    there = (at < n) & (channel < 3)
    value = tl.load(pixels + source, mask=there, other=0).to(tl.float32) / 127.5 - 1.0
    value = tl.where(there, value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@library.custom_op(
    "palimpsest::nested_pixels",
    mutates_args=(),
    schema="(Tensor pixels, int side, ScalarType dtype) -> Tensor",
)
def _nest(pixels: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    levels, _ = _levels(pixels, side)
    out = _empty_nested(pixels, side, dtype)
    _nested_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        *(pixels.contiguous(), out, out.numel()),
        WIDTH=pixels.shape[2],
        LEVELS=levels,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out


@_nest.register_fake
def _empty_nested(pixels: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    _levels(pixels, side)
    return pixels.new_empty((pixels.numel() // 3, CHANNELS), dtype=dtype)


def _case(*, images: int, side: int, small: bool = False, square: int = 0) -> Case:
    """Of pixels as they lie, or nested in squares of `square`."""
    values = images * side * side * 3

    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape = (images, side, side, 3)
        drawn = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return drawn.to(device), *([square] if square else []), dtype

    def n_bytes(dtype: Any) -> int:
        written = values // 3 * CHANNELS if square else values
        return values + written * int(dtype.itemsize)

    return Case(
        kernel="pixels, nested" if square else "pixels",
        shape=f"B={images} H=W={side}" + (f" S={square}" if square else ""),
        inputs=inputs,
        fused=nested_fused if square else normalised_fused,
        reference=nested_ref if square else normalised_ref,
        tolerances={torch.float32: 1e-6, torch.bfloat16: 5e-3},
        reason="fp32 differs in the last digit; bf16: kernel rounds once (2^-9), "
        "reference after each of three operations",
        forward_bytes=n_bytes,
        small=small,
    )


CASES = (
    _case(images=3, side=7, small=True),
    _case(images=1, side=40, small=True),
    _case(images=96, side=224),
    _case(images=96, side=384),
    _case(images=2, side=6, square=2, small=True),
    _case(images=3, side=24, square=8, small=True),
    _case(images=96, side=224, square=32),
    _case(images=96, side=384, square=32),
)
