"""Cross-entropy of logits rows: loss in one pass, gradient written over the logits.

Owns the kernel, its reference and its cases. Does not own the matrix product that makes
the logits or the choice of rows (`trainer.models.mlim`).

The forward pass reads the logits once (online softmax, Milakov and Gimelshein, 2018)
and leaves them alone, so that metrics and panels can read them. The backward pass
overwrites them with their gradient: there is no second buffer of their size, unless
they are columns of a wider table, whose gradient autograd makes of theirs. Whoever
reads them later reads a gradient; autograd counts it as an in-place change, so a second
backward pass, or an operation that kept the logits for its own, is an error and never a
wrong number. Logits that are a leaf are the caller's own: they stay, and their gradient
is a buffer of its own.

Shapes: M rows (a capacity), V vocabulary, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs

_BLOCK = 4096


def masked_cross_entropy(
    logits_mv: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss (M,) in fp32, and whether the target is the likeliest (M,): the kernel on
    CUDA tensors, the reference elsewhere. Zero, no and no gradient where not valid.

    Args:
        logits_mv: (M, V). On CUDA the backward pass leaves their gradient in them,
            unless they are a leaf.
        target: (M,) integers from 0 to V - 1, in rows that are not valid too.
        valid: (M,) bool.
        label_smoothing: share of the target spread evenly over all V (Szegedy et al.,
            2016, section 7).
        z_loss: factor of the squared log of the softmax's denominator, which it keeps
            near 0 (PaLM, Chowdhery et al., 2022, section 5).
    """
    chosen = masked_cross_entropy_fused if logits_mv.is_cuda else reference
    return chosen(
        logits_mv, target, valid, label_smoothing=label_smoothing, z_loss=z_loss
    )


def reference(
    logits_mv: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`masked_cross_entropy` in plain torch; in fp64 if the logits are."""
    wide = logits_mv.to(torch.promote_types(logits_mv.dtype, torch.float32))
    loss_m = F.cross_entropy(
        wide, target, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        loss_m = loss_m + z_loss * wide.logsumexp(1).square()
    return loss_m * valid, (logits_mv.argmax(1) == target) & valid


def masked_cross_entropy_fused(
    logits_mv: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`masked_cross_entropy` by the kernel, on CUDA tensors or under Triton's
    interpreter.
    """
    loss_m, _, correct_m = _forward_op(
        logits_mv, target, valid, label_smoothing, z_loss
    )
    return loss_m, correct_m


@triton.jit
def _cross_entropy_forward_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    valid: tl.tensor,
    loss: tl.tensor,
    log_sum: tl.tensor,
    correct: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    N_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * ROW_STRIDE
    row_loss = 0.0
    row_log_sum = 0.0
    row_correct = False
    if tl.load(valid + row) != 0:
        wanted = tl.load(target + row)
        at_target = tl.load(start + wanted * COLUMN_STRIDE).to(tl.float32)
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        beaten = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, N_WORDS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < N_WORDS
            at = start + column * COLUMN_STRIDE
            x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, 0))
            total = total * tl.exp(highest - higher) + tl.exp(x - higher)
            highest = higher
            plain += tl.where(inside, x, 0.0)
            # Of equal ones the first counts, as in torch.argmax on a CPU.
            ahead = (x > at_target) | ((x == at_target) & (column < wanted))
            beaten += ahead.to(tl.int32)
        row_log_sum = highest + tl.log(tl.sum(total, 0))
        row_loss = row_log_sum - (1 - smoothing) * at_target
        row_loss -= smoothing * tl.sum(plain, 0) / N_WORDS
        row_loss += z_loss * row_log_sum * row_log_sum
        row_correct = tl.sum(beaten, 0) == 0
    tl.store(loss + row, row_loss)
    tl.store(log_sum + row, row_log_sum)
    tl.store(correct + row, row_correct)


@triton.jit
def _cross_entropy_backward_kernel(
    grad: tl.tensor,
    logits: tl.tensor,
    target: tl.tensor,
    valid: tl.tensor,
    log_sum: tl.tensor,
    output: tl.tensor,
    grad_stride: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    OUTPUT_ROW_STRIDE: tl.constexpr,
    OUTPUT_COLUMN_STRIDE: tl.constexpr,
    N_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a row; `output` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N_WORDS
    scored = tl.load(valid + row) != 0
    at = logits + row * ROW_STRIDE + column * COLUMN_STRIDE
    x = tl.load(at, mask=inside & scored, other=0.0).to(tl.float32)
    row_log_sum = tl.load(log_sum + row)
    slope = tl.exp(x - row_log_sum) * (1 + 2 * z_loss * row_log_sum)
    slope -= smoothing / N_WORDS
    slope = tl.where(column == tl.load(target + row), slope - (1 - smoothing), slope)
    slope *= tl.load(grad + row * grad_stride).to(tl.float32)
    slope = tl.where(scored, slope, 0.0)
    to = output + row * OUTPUT_ROW_STRIDE + column * OUTPUT_COLUMN_STRIDE
    tl.store(to, slope.to(output.dtype.element_ty), mask=inside)


@library.custom_op("palimpsest::masked_cross_entropy", mutates_args=())
def _forward_op(
    logits: Tensor, target: Tensor, valid: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (M,), log of the softmax's denominator (M,), correct (M,)."""
    rows, n_words = logits.shape
    loss, log_sum, correct = _empty(logits)
    _cross_entropy_forward_kernel[(rows,)](
        logits,
        target.contiguous(),
        valid.contiguous(),
        loss,
        log_sum,
        correct.view(torch.int8),
        smoothing,
        z_loss,
        *logits.stride(),
        N_WORDS=n_words,
        BLOCK=min(_BLOCK, triton.next_power_of_2(n_words)),
        num_warps=8,
    )
    return loss, log_sum, correct


@_forward_op.register_fake
def _(
    logits: Tensor, target: Tensor, valid: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(logits)


def _empty(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)


@library.custom_op("palimpsest::masked_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    log_sum: Tensor,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """Gradient (M, V) of the logits, beside them."""
    output = torch.empty_like(logits)
    _launch_backward(
        grad, logits, target, valid, log_sum, smoothing, z_loss, output=output
    )
    return output


@_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


@library.custom_op(
    "palimpsest::masked_cross_entropy_backward_", mutates_args={"logits"}
)
def _backward_op_(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    log_sum: Tensor,
    smoothing: float,
    z_loss: float,
) -> None:
    """The same, in the place of the logits."""
    _launch_backward(
        grad, logits, target, valid, log_sum, smoothing, z_loss, output=logits
    )


@_backward_op_.register_fake
def _(*_: Any) -> None:
    return None


def _launch_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    log_sum: Tensor,
    smoothing: float,
    z_loss: float,
    *,
    output: Tensor,
) -> None:
    rows, n_words = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(n_words))
    _cross_entropy_backward_kernel[(rows, triton.cdiv(n_words, block))](
        grad,
        logits,
        target.contiguous(),
        valid.contiguous(),
        log_sum,
        output,
        grad.stride(0),
        smoothing,
        z_loss,
        *logits.stride(),
        *output.stride(),
        N_WORDS=n_words,
        BLOCK=block,
        num_warps=8,
    )


def _keep(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, valid, ctx.smoothing, ctx.z_loss = inputs
    ctx.own = logits.is_leaf
    ctx.save_for_backward(logits, target, valid, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # Reading what was saved raises if the logits have changed, by us or by others.
    logits, *rest = ctx.saved_tensors
    logits = logits.detach()
    if ctx.own:
        slope = _backward_op(grad, logits, *rest, ctx.smoothing, ctx.z_loss)
    else:
        _backward_op_(grad, logits, *rest, ctx.smoothing, ctx.z_loss)
        slope = logits
    return slope, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def _head_fused(
    hidden_md: Tensor, words_vd: Tensor, bias: Tensor, target: Tensor, valid: Tensor
) -> Tensor:
    logits_mv = F.linear(hidden_md, words_vd, bias)
    return masked_cross_entropy_fused(logits_mv, target, valid)[0]


def _head_reference(
    hidden_md: Tensor, words_vd: Tensor, bias: Tensor, target: Tensor, valid: Tensor
) -> Tensor:
    logits_mv = F.linear(hidden_md, words_vd, bias)
    return reference(logits_mv, target, valid)[0]


def _logits_inputs(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, n_words: int
) -> Inputs:
    """Logits as an untrained model's, of which the last sixteenth is not valid."""
    generator = torch.Generator(device).manual_seed(seed)
    logits_mv = torch.randn(
        rows, n_words, device=device, generator=generator, dtype=torch.float32
    )
    target = torch.randint(n_words, (rows,), device=device, generator=generator)
    valid = torch.arange(rows, device=device) < rows - rows // 16
    return logits_mv.to(dtype).requires_grad_(), target, valid


def _head_inputs(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    rows: int,
    n_words: int,
    width: int,
) -> Inputs:
    _, target, valid = _logits_inputs(device, dtype, seed, rows=rows, n_words=n_words)
    generator = torch.Generator(device).manual_seed(seed + 1)
    shapes = (((rows, width), 1.0), ((n_words, width), width**-0.5), ((n_words,), 0.1))
    drawn = [
        (std * torch.randn(shape, device=device, generator=generator))
        .to(dtype)
        .requires_grad_()
        for shape, std in shapes
    ]
    return *drawn, target, valid


def _case(shape: str, *, rows: int, n_words: int, small: bool = False) -> Case:
    cells = rows * n_words
    return Case(
        kernel="masked cross-entropy",
        shape=f"{shape}M={rows} V={n_words}",
        inputs=partial(_logits_inputs, rows=rows, n_words=n_words),
        fused=masked_cross_entropy_fused,
        reference=reference,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 8e-3},
        reason="sums and exponentials in fp32; the gradient is rounded to the dtype of "
        "the logits, in bf16 by up to 2^-8, and cut off to it by up to 2^-7 under "
        "Triton's interpreter",
        forward_bytes=lambda dtype: cells * dtype.itemsize + rows * (8 + 1 + 4 + 1),
        backward_bytes=lambda dtype: 2 * cells * dtype.itemsize + rows * (8 + 1 + 8),
        small=small,
    )


def _head_case(
    shape: str, *, rows: int, n_words: int, width: int, small: bool = False
) -> Case:
    hidden, words, cells = rows * width, n_words * (width + 1), rows * n_words
    return Case(
        kernel="word head: F.linear + masked cross-entropy in place",
        shape=f"{shape}M={rows} V={n_words} D={width}",
        inputs=partial(_head_inputs, rows=rows, n_words=n_words, width=width),
        fused=_head_fused,
        reference=_head_reference,
        tolerances={torch.float32: 1e-4, torch.bfloat16: 2e-2},
        reason="the product's logits are rounded to the dtype (bf16: by up to 2^-8, of "
        "logits up to about 5, so by 0.02 at most), and so are all gradients",
        forward_bytes=lambda dtype: (hidden + words + 2 * cells) * dtype.itemsize,
        backward_bytes=lambda dtype: (
            (2 * (hidden + words) + 4 * cells) * dtype.itemsize
        ),
        forward_flops=2.0 * hidden * n_words,
        backward_flops=4.0 * hidden * n_words,
        small=small,
    )


# Masked words of 96 pairs with 22 words: a third of them at 80 %, a third at 15 %.
_ROWS = 672
_BERT_WORDS = 30522

CASES = (
    _case("", rows=1, n_words=7, small=True),
    _case("", rows=37, n_words=211, small=True),
    _case("", rows=17, n_words=9001, small=True),
    _head_case("", rows=19, n_words=97, width=12, small=True),
    _case("mlim-base, mlim-large-384: ", rows=_ROWS, n_words=_BERT_WORDS),
    _head_case("mlim-base: ", rows=_ROWS, n_words=_BERT_WORDS, width=768),
    _head_case("mlim-large-384: ", rows=_ROWS, n_words=_BERT_WORDS, width=1024),
)
