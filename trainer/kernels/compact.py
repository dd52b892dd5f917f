"""Fixed-capacity lists of what is chosen: masked words, images with a masked position.

Owns the list, the kernel that makes it without a sort, and its reference. Does not own
what is chosen (`trainer.kernels.mam_masks`) or its capacity (`trainer.loader`).

Shapes: N places, C capacity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs

_BLOCK = 1024
"""Places of a program."""
_SCAN = 4096
"""Places that it counts at a time."""


def compact(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Indices (C,) of the true entries of `chosen` (N,), in order, then of the others,
    and which of them are real: no shape depends on data, so the host need not wait.
    Their number is that of the real ones. N, where that is less than `capacity`.
    """
    if chosen.is_cuda:
        return compact_fused(chosen, capacity)
    return compact_ref(chosen, capacity)


def compact_ref(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same by a stable sort."""
    order = torch.argsort(~chosen, stable=True)[:capacity]
    return order, chosen[order]


@triton.jit(do_not_specialize=["n", "capacity"])
def _compact_kernel(
    chosen: tl.tensor,
    index: tl.tensor,
    valid: tl.tensor,
    n: tl.int32,
    capacity: tl.int32,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK
    before = tl.zeros((SCAN,), tl.int32)
    all_of = tl.zeros((SCAN,), tl.int32)
    start = first * 0
    while start < n:
        at = start + tl.arange(0, SCAN)
        flag = tl.load(chosen + at, mask=at < n, other=0).to(tl.int32)
        all_of += flag
        before += tl.where(at < first, flag, 0)
        start += SCAN
    here = first + tl.arange(0, BLOCK)
    inside = here < n
    mine = tl.load(chosen + here, mask=inside, other=0).to(tl.int32)
    rank = tl.sum(before) + tl.cumsum(mine, 0) - mine
    # What is not chosen follows, in order too, as after a stable sort.
    place = tl.where(mine != 0, rank, tl.sum(all_of) + here - rank)
    kept = inside & (place < capacity)
    tl.store(index + place, here.to(tl.int64), mask=kept)
    tl.store(valid + place, mine.to(tl.uint8), mask=kept)


@library.custom_op(
    "palimpsest::compact",
    mutates_args=(),
    schema="(Tensor chosen, SymInt capacity) -> (Tensor, Tensor)",
)
def compact_fused(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same by the kernel, wherever `chosen` is: every program counts what is chosen
    before its own places, so none waits for another.
    """
    found = _empty(chosen, capacity)
    index, valid = found
    _compact_kernel[(triton.cdiv(len(chosen), _BLOCK),)](
        chosen.contiguous().view(torch.uint8),
        index,
        valid.view(torch.uint8),
        len(chosen),
        capacity,
        BLOCK=_BLOCK,
        SCAN=_SCAN,
    )
    return found


@compact_fused.register_fake
def _empty(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    rows = min(len(chosen), capacity)
    index = torch.empty(rows, dtype=torch.int64, device=chosen.device)
    return index, torch.empty_like(index, dtype=torch.bool)


def _case(*, places: int, share: float, capacity: int, small: bool) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(places, generator=generator) < share
        return chosen.to(device), capacity

    rows = min(places, capacity)
    return Case(
        kernel="compact list",
        shape=f"N={places} C={capacity}, {share:.0%} chosen",
        inputs=inputs,
        fused=compact_fused,
        reference=compact_ref,
        tolerances={},
        reason="integers, equal",
        forward_bytes=lambda dtype: places + 9 * rows,
        small=small,
    )


CASES = (
    _case(places=1, share=1.0, capacity=8, small=True),
    _case(places=77, share=0.3, capacity=40, small=True),
    _case(places=5000, share=0.4, capacity=2304, small=True),
    # Words and images of 96 pairs.
    _case(places=2304, share=0.35, capacity=896, small=False),
    _case(places=96, share=0.67, capacity=72, small=False),
)
