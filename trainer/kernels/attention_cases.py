"""What attention is held against its reference on.

Owns lengths, tables and what they take. Does not own the operators
(`trainer.kernels.attention`) or the checks (`tests/trainer/kernels`, `benchmarks.gpu`).

Shapes: N queries, T keys, H heads, E channels of a head, B segments, S longest one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.case import Case, Inputs


class Forms(NamedTuple):
    """Of one entry."""

    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    left: int,
    heads: int,
    width: int,
    packed: bool,
    biased: bool,
) -> Inputs:
    # On the host, so that all devices see the same numbers.
    draw = torch.Generator().manual_seed(seed)
    rows, other = sum(queries) + left, sum(keys) + left
    drawn = torch.randn(other, 3, heads, width, generator=draw)
    qkv = drawn.to(device, dtype)
    cu_q, cu_k = (
        torch.tensor([0, *each]).cumsum(0).to(device, torch.int32)
        for each in (queries, keys)
    )
    longest_q, longest_k = max(queries), max(keys)
    if packed:
        # What it is says nothing of its gradient.
        bias = (torch.zeros(drawn[0].numel(), device=device, dtype=dtype),) * biased
        wanting = (each.requires_grad_() for each in bias)
        return qkv.requires_grad_(), cu_k, longest_k, *wanting
    q, k, v = qkv.unbind(1)
    parts = (part.requires_grad_() for part in (q[:rows], k, v))
    return *parts, cu_q, cu_k, longest_q, longest_k


def _case(
    forms: Forms,
    keys: tuple[int, ...],
    *,
    heads: int,
    width: int,
    queries: tuple[int, ...] | None = None,
    left: int = 0,
    biased: bool = False,
    small: bool = False,
) -> Case:
    packed = queries is None
    queries = keys if queries is None else queries
    own, other = sum(queries) + left, sum(keys) + left
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    product = 2.0 * pairs * heads * width

    def moved_bytes(dtype: torch.dtype, *, own_tables: int, tables: int) -> int:
        rows = own_tables * own + tables * other
        return heads * (rows * width * dtype.itemsize + 4 * own)

    spread = f"T={other} B={len(keys)} S={max(keys)} H={heads} E={width}"
    return Case(
        kernel=f"attention{', packed' * packed}{' with bias' * biased}",
        shape=spread if packed else f"N={own} {spread}",
        inputs=partial(
            _inputs,
            queries=queries,
            keys=keys,
            left=left,
            heads=heads,
            width=width,
            packed=packed,
            biased=biased,
        ),
        fused=forms.fused,
        reference=forms.reference,
        tolerances={torch.float32: 5e-6, torch.bfloat16: 1.5e-2},
        reason=(
            "fp32: rounding of sums over channels and rows. bf16: weights and their "
            "gradients are rounded to 8 bits before products that sum in fp32, and "
            "outputs, from which the backward pass starts, after them: 2^-9 each on "
            "average of a relative error, cut off to by twice that under Triton's "
            "interpreter"
        ),
        # Reads three tables, writes one and a number for each query and head.
        forward_bytes=partial(moved_bytes, own_tables=2, tables=2),
        # Reads those and the gradient of the output, writes three.
        backward_bytes=partial(moved_bytes, own_tables=4, tables=4),
        forward_flops=2 * product,
        backward_flops=5 * product,
        small=small,
    )


def _micro_batch(image: int) -> tuple[int, ...]:
    """Rows of 96 pairs of an image and 12 to 36 words."""
    return tuple(image + 12 + 7 * pair % 25 for pair in range(96))


def attention_cases(apart: Forms, packed: Forms) -> tuple[Case, ...]:
    """Of the packed entry those in which every row is a query.

    Micro-batches are those of mlim-base (49 image tokens) and mlim-large-384 (144),
    whose last layer computes some of the rows.
    """
    lengths = (1, 7, 64, 0, 65, 130)
    odd = partial(_case, packed, lengths, small=True)
    odd_apart = partial(_case, apart, lengths, small=True)
    return (
        odd(heads=2, width=16, left=5),
        odd(heads=1, width=64),
        odd(heads=2, width=16, left=5, biased=True),
        odd(heads=2, width=64, biased=True),
        odd_apart(heads=1, width=16, queries=(1, 0, 64, 0, 3, 70), left=67),
        odd_apart(heads=1, width=128, queries=(0, 7, 1, 0, 65, 129), left=3),
        _case(packed, (33, 32), heads=3, width=32, left=200, small=True),
        _case(packed, (33, 1, 0, 70), heads=2, width=64, left=80, small=True),
        _case(
            packed,
            (0, 33, 1, 0, 70, 0),
            heads=2,
            width=64,
            left=80,
            biased=True,
            small=True,
        ),
        _case(
            apart,
            (80, 7, 33),
            heads=1,
            width=64,
            queries=(64, 0, 3),
            left=1,
            small=True,
        ),
        *(
            _case(packed, _micro_batch(image), heads=heads, width=64, left=7, biased=of)
            for image, heads in ((49, 12), (144, 16))
            for of in (False, True)
        ),
        _case(
            apart,
            _micro_batch(144),
            heads=16,
            width=64,
            queries=tuple(rows // 3 for rows in _micro_batch(144)),
            left=7,
        ),
    )
