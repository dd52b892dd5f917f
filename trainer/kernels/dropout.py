"""Dropout at a site: which channels of a row become 0.

Owns the draws, what is done with them, and the kernel. Does not own sites and what rows
are counted by (`trainer.dropout`), the generator (`trainer.philox`) or dropout on the
way into a norm (`trainer.kernels.layer_norm`).

One call of Philox serves four channels. Channel c of a row of D at `place` takes word
c % 4 of the call with

    counter = (place * ceil(D / 4) + c // 4, use, uid_lo, uid_hi),  key = seed

and is kept if that word is floor(share * 2^32) or more. It follows from the counter
alone: the kernel stores no mask, and its backward pass draws it again.

Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
2014. Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.dropout import Dropout
from trainer.kernels.case import Case, Inputs
from trainer.philox import Use, philox

_WORD = (1 << 32) - 1
_WORDS = 4
"""Of a draw, each for a channel."""
_SMALLEST_BLOCK = 16


def dropped(x: Tensor, drop: Dropout | None) -> Tensor:
    """`x` (N, D) after dropout; itself where there is none. On CUDA by one kernel."""
    if drop is None:
        return x
    chosen = dropout_fused if x.is_cuda else dropout_ref
    return chosen(x, drop)


def dropout_ref(x: Tensor, drop: Dropout) -> Tensor:
    """The same in plain torch."""
    return torch.where(kept(drop, x.shape[1]), x * scale(drop.share), 0)


def kept(drop: Dropout, width: int) -> Tensor:
    """Which channels (N, D) stay, bool."""
    calls = -(-width // _WORDS)
    number = torch.arange(calls, device=drop.place.device)
    uid = drop.uid[:, None]
    words = philox(
        drop.place[:, None] * calls + number,
        drop.use[:, None],
        uid & _WORD,
        (uid >> 32) & _WORD,
        *(drop.seed & _WORD, (drop.seed >> 32) & _WORD),
    )
    return torch.stack(words, 2).flatten(1)[:, :width] >= first_kept(drop.share)


def first_kept(share: float) -> int:
    """Words below it are dropped. Unlike `trainer.philox.edge` rounded down, so that it
    has 32 bits for every share below 1.
    """
    return int(share * (1 << 32))


def scale(share: float) -> float:
    """By what the channels that stay grow."""
    return 1 / (1 - share)


def block(width: int) -> int:
    """Channels that a program of a kernel has at a time."""
    return max(triton.next_power_of_2(width), _SMALLEST_BLOCK)


@triton.jit
def keeps(  # type: ignore[no-untyped-def]
    row,
    there,
    use_ptr,
    uid_ptr,
    place_ptr,
    seed,
    least,
    width,
    BLOCK: tl.constexpr,
):
    """Which of a row's channels (BLOCK,) stay, for kernels that drop."""
    use = tl.load(use_ptr + row, mask=there, other=0)
    uid = tl.load(uid_ptr + row, mask=there, other=0)
    place = tl.load(place_ptr + row, mask=there, other=0)
    calls = (width + 3) // 4
    c0 = (place * calls + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        c0,
        zero + use.to(tl.uint32),
        zero + (uid & 0xFFFFFFFF).to(tl.uint32),
        zero + ((uid >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    # Word k of call n is channel 4 n + k.
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= least.to(tl.uint32)


# Values that runs choose: a kernel compiled for one of them serves all.
CHOSEN = ("seed", "least", "grow")


@triton.jit(do_not_specialize=CHOSEN)
def _dropout_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    use_ptr,
    uid_ptr,
    place_ptr,
    seed: tl.int64,
    least: tl.int64,
    grow,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    stays = keeps(row, True, use_ptr, uid_ptr, place_ptr, seed, least, width, BLOCK)
    # Dropped channels are read too: whole vectors cost less than a choice of them.
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(stays, x * grow, 0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@library.custom_op("palimpsest::dropout", mutates_args=())
def dropout_by(
    x: Tensor, use: Tensor, uid: Tensor, place: Tensor, share: float, seed: int
) -> Tensor:
    """(N, D) after dropout, by the kernel."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        _dropout_kernel[(rows,)](
            *(x, out, use.contiguous(), uid.contiguous(), place.contiguous()),
            *(seed, first_kept(share), scale(share), width),
            BLOCK=block(width),
            num_warps=min(max(block(width) // 256, 1), 16),
        )
    return out


@dropout_by.register_fake
def _(
    x: Tensor, use: Tensor, uid: Tensor, place: Tensor, share: float, seed: int
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.chosen = inputs[4:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of what is dropped is dropped, of what grows grows.
    return dropout_by(gradient, *ctx.saved_tensors, *ctx.chosen), *[None] * 5


dropout_by.register_autograd(_differentiate, setup_context=_keep)


def dropout_fused(x: Tensor, drop: Dropout) -> Tensor:
    """The kernel, wherever the tensors are."""
    return dropout_by(x, *drop[2:], drop.share, drop.seed)


def rows_drawn(rows: int, device: torch.device, seed: int) -> Dropout:
    """Dropout of some rows, for cases: 0.1, as in BERT."""
    generator = torch.Generator().manual_seed(seed)
    below = (1 << 24, 1 << 62, 2_048)
    epoch, uid, place = (
        torch.randint(0, most, (rows,), generator=generator).to(device)
        for most in below
    )
    use = int(Use.DROPOUT) << 24 | epoch
    # One seed for all: a compiler would make the reference anew for each.
    return Dropout(0.1, (5 << 60) - (1 << 63), use, uid * 3, place)


def _case(rows: int, width: int, *, small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, width, generator=draw).to(device, dtype)
        return x.requires_grad_(), rows_drawn(rows, device, seed)

    def moved_bytes(dtype: torch.dtype) -> int:
        return rows * (2 * width * dtype.itemsize + 3 * 8)

    return Case(
        kernel="dropout",
        shape=f"N={rows} D={width}",
        inputs=inputs,
        fused=dropout_fused,
        reference=dropout_ref,
        tolerances={torch.float32: 1e-6, torch.bfloat16: 4e-3},
        reason="one product, rounded; which channels are 0 is the same bit for bit",
        forward_bytes=moved_bytes,
        backward_bytes=moved_bytes,
        small=small,
    )


# As in `trainer.kernels.layer_norm`.
CASES = (
    _case(1, 64, small=True),
    _case(5, 33, small=True),
    _case(9, 3, small=True),
    _case(3, 768, small=True),
    _case(7_008, 768),
    _case(16_128, 1_024),
)
