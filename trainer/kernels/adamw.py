"""AdamW on flat weights in one pass: gradients clipped, moments, fp32 master, weights.

Owns the kernels and their reference. Does not own where flat weights come from, the
clip factor or when an update is not wanted (`trainer.one_rank`).

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, in the order of
torch.optim.AdamW(fused=True). Apart, these are five passes over all weights: gradients
are widened, then clipped, AdamW reads and writes fp32, and the weights are rounded.

Shapes: N weights.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.case import Case, Inputs

_BLOCK = 1024
"""Weights of a program."""

Updated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def adamw(
    gradients: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    step: Tensor,
    factor: Tensor,
    refused: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Updated:
    """One step, in place, on CUDA by one pass; nothing waits for the device.

    Args:
        gradients: (N,), of any floating-point dtype.
        master: (N,) fp32.
        exp_avg: (N,) fp32, the first moment.
        exp_avg_sq: (N,) fp32, the second.
        weights: (N,), which become the master's, rounded to nearest even.
        step: () fp32, the steps taken before; becomes one more.
        factor: () fp32, what gradients are multiplied by first.
        refused: () fp32; unless it is 0, nothing changes, `step` neither.

    Returns:
        Master, moments, weights and `step`, which are those given.
    """
    update = adamw_fused if gradients.is_cuda else adamw_ref
    return update(
        *(gradients, master, exp_avg, exp_avg_sq, weights, step, factor, refused),
        *(lr, betas, eps, weight_decay),
    )


def adamw_ref(
    gradients: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    step: Tensor,
    factor: Tensor,
    refused: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Updated:
    """The same in plain torch."""
    wanted = refused == 0
    step += wanted
    first, second = (1 - beta ** step.double() for beta in betas)
    gradient = gradients.to(master.dtype) * factor
    mean = exp_avg.lerp(gradient, 1 - betas[0])
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient * gradient
    root = square.sqrt() / second.sqrt() + eps
    found = master - lr * weight_decay * master
    found = found - lr / first * mean / root
    for old, new in (
        (master, found), (exp_avg, mean), (exp_avg_sq, square), (weights, found)
    ):  # fmt: skip
        old.copy_(torch.where(wanted, new.to(old.dtype), old))
    return master, exp_avg, exp_avg_sq, weights, step


@triton.jit
def _adamw_count_kernel(
    step_ptr: tl.tensor,
    refused_ptr: tl.tensor,
    corrections_ptr: tl.tensor,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
) -> None:
    step = tl.load(step_ptr) + tl.where(tl.load(refused_ptr) == 0, 1.0, 0.0)
    tl.store(step_ptr, step)
    # In fp32, what is left of 1 after a step with 0.999 would have three digits less.
    step = step.to(tl.float64)
    first = 1.0 - tl.exp2(step * log2_beta1)
    second = tl.sqrt(1.0 - tl.exp2(step * log2_beta2))
    tl.store(corrections_ptr, first.to(tl.float32))
    tl.store(corrections_ptr + 1, second.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _adamw_kernel(
    gradient_ptr: tl.tensor,
    master_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    square_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    corrections_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    refused_ptr: tl.tensor,
    n: tl.int64,
    lr: tl.float32,
    rest1: tl.float32,
    beta2: tl.float32,
    rest2: tl.float32,
    eps: tl.float32,
    decay: tl.float32,
    BLOCK: tl.constexpr,
) -> None:
    if tl.load(refused_ptr) == 0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        gradient_ptr += start
        master_ptr += start
        mean_ptr += start
        square_ptr += start
        weight_ptr += start
        at = tl.arange(0, BLOCK)
        rate = lr / tl.load(corrections_ptr)
        root = tl.load(corrections_ptr + 1)
        factor = tl.load(factor_ptr)
        # Under a mask of any N a thread would load its numbers one by one.
        if start + BLOCK <= n:
            _update(
                gradient_ptr + at, master_ptr + at, mean_ptr + at, square_ptr + at,
                weight_ptr + at, factor, rate, root, rest1, beta2, rest2, eps, decay,
                None,
            )  # fmt: skip
        else:
            _update(
                gradient_ptr + at, master_ptr + at, mean_ptr + at, square_ptr + at,
                weight_ptr + at, factor, rate, root, rest1, beta2, rest2, eps, decay,
                at < n - start,
            )  # fmt: skip


@triton.jit
def _update(
    gradient_at: tl.tensor,
    master_at: tl.tensor,
    mean_at: tl.tensor,
    square_at: tl.tensor,
    weight_at: tl.tensor,
    factor: tl.tensor,
    rate: tl.tensor,
    root: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    inside: tl.tensor | None,
) -> None:
    gradient = tl.load(gradient_at, mask=inside).to(tl.float32) * factor
    master = tl.load(master_at, mask=inside)
    mean = tl.load(mean_at, mask=inside)
    square = tl.load(square_at, mask=inside)
    master -= decay * master
    mean += rest1 * (gradient - mean)
    square = beta2 * square + rest2 * gradient * gradient
    master -= rate * mean / (tl.sqrt(square) / root + eps)
    tl.store(mean_at, mean, mask=inside)
    tl.store(square_at, square, mask=inside)
    tl.store(master_at, master, mask=inside)
    tl.store(weight_at, master.to(weight_at.dtype.element_ty), mask=inside)


def adamw_fused(
    gradients: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    step: Tensor,
    factor: Tensor,
    refused: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Updated:
    """The kernels, wherever the tensors are, which must be contiguous."""
    flat = gradients, master, exp_avg, exp_avg_sq, weights
    assert all(each.is_contiguous() for each in flat)
    corrections = master.new_empty(2)
    _adamw_count_kernel[(1,)](
        *(step, refused, corrections),
        *(math.log2(beta) if beta else -math.inf for beta in betas),
        num_warps=1,
    )
    if master.numel():
        _adamw_kernel[(triton.cdiv(master.numel(), _BLOCK),)](
            *(*flat, corrections, factor, refused, master.numel()),
            *(lr, 1 - betas[0], betas[1], 1 - betas[1], eps, lr * weight_decay),
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return master, exp_avg, exp_avg_sq, weights, step


def _case(weights: int, *, small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def drawn(scale: float) -> Tensor:
            return scale * torch.randn(weights, generator=generator, device=device)

        def number(value: float) -> Tensor:
            return torch.full((), value, device=device)

        master = drawn(1.0)
        return (
            *(drawn(1.0).to(dtype), master, drawn(0.3), drawn(0.5).square()),
            *(master.to(dtype), number(2.0), number(0.7), number(0.0)),
            # Large ones, so that an error in any part of an update is one of weights.
            *(0.3, (0.9, 0.98), 1e-6, 0.2),
        )

    return Case(
        kernel="AdamW",
        shape=f"N={weights}",
        inputs=inputs,
        fused=adamw_fused,
        reference=adamw_ref,
        tolerances={torch.float32: 1e-6, torch.bfloat16: 5e-3},
        reason="fp32: some ten roundings of 2^-24 each, division and root of twice as "
        "much; bf16: weights are rounded once (by 2^-9 of them at most), and cut off "
        "under Triton's interpreter (by 2^-7)",
        forward_bytes=lambda dtype: weights * (6 * 4 + 2 * dtype.itemsize),
        small=small,
    )


# The last one is a seventh of a base model, and has no whole number of vectors.
CASES = (
    _case(37, small=True),
    _case(6_000, small=True),
    _case(2 * _BLOCK, small=True),
    _case((1 << 24) + 6),
)
