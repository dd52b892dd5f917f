"""Pixels from uint8 to what the embedder takes, in one pass.

Owns the normalisation, its kernel and its reference. Does not own the embedder
(`trainer.models.mlim`).

Shapes: B images of H x W pixels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs

_BLOCK = 4096
"""Values of a program."""


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


@triton.jit(do_not_specialize=["n"])
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


def _case(*, images: int, side: int, small: bool = False) -> Case:
    values = images * side * side * 3

    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape = (images, side, side, 3)
        drawn = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return drawn.to(device), dtype

    def n_bytes(dtype: Any) -> int:
        return values * (1 + int(dtype.itemsize))

    return Case(
        kernel="pixels",
        shape=f"B={images} H=W={side}",
        inputs=inputs,
        fused=normalised_fused,
        reference=normalised_ref,
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
)
