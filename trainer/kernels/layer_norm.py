"""Residual and LayerNorm in one pass over the rows, with or without dropout, and with
or without the bias of the layer that ends the branch.

Owns the operators, forward and backward, and their references. Does not own what a
program does (`trainer.kernels.layer_norm_kernels`), where a layer has its norms
(`trainer.models.layers`) or what is dropped (`trainer.kernels.dropout`): it is drawn in
the kernel, and again in the backward pass.

Sum, mean and variance are fp32 whatever the inputs are, and so are the gradients of
weight and biases until they are whole: each program adds up its own rows, in their
order, and what the programs found is added in their order too. No atomics: the same
inputs give the same bits. The gradient of the branch's bias is that of the branch added
up over the rows, before it is rounded: a backward pass that has it at hand saves
another that would read it again.

The gradient of `x` is a tensor that nothing else reads once the branch has been gone
through: its first layer may add to it in place (`trainer.models.residual`). Without
dropout it is that of the branch too.

Ba, Kiros, Hinton, "Layer Normalization", 2016. Shapes: T rows, D width, G programs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, library

from trainer.dropout import Dropout
from trainer.kernels import dropout
from trainer.kernels.case import Case, Inputs
from trainer.kernels.layer_norm_kernels import (
    layer_norm_backward_kernel,
    layer_norm_forward_kernel,
)
from trainer.kernels.parts import direct, observed, sum_parts

# Most programs of a backward pass, each with rows of its own: eight for each of the 132
# multiprocessors of an H100 or H200, which hide each other's waits. Not asked of the
# device: sums would depend on it.
_PROGRAMS = 1056
# So that eight programs of 128 threads are on a multiprocessor at once: the sums of a
# third table would take a few more, and the last programs would wait for the others.
_REGISTERS = 64


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + branch + branch_bias` and its LayerNorm, both (T, D). On CUDA by one kernel.

    Args:
        x: (T, D).
        branch: (T, D), of the same dtype.
        weight: (D,).
        bias: (D,).
        branch_bias: (D,), of the weight's dtype; None: the branch has it already.
    """
    chosen = add_layer_norm_fused if x.is_cuda else add_layer_norm_ref
    return chosen(x, branch, weight, bias, eps, branch_bias)


def add_layer_norm_ref(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + _whole(branch, branch_bias)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def _whole(branch: Tensor, branch_bias: Tensor | None) -> Tensor:
    return branch if branch_bias is None else branch + branch_bias


def dropout_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of `x` and of `branch + branch_bias` after dropout."""
    chosen = dropout_add_layer_norm_fused if x.is_cuda else dropout_add_layer_norm_ref
    return chosen(x, branch, weight, bias, eps, drop, branch_bias)


def dropout_add_layer_norm_ref(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    kept = dropout.dropout_ref(_whole(branch, branch_bias), drop)
    return add_layer_norm_ref(x, kept, weight, bias, eps)


@library.custom_op("palimpsest::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and norm (T, D), and mean and reciprocal deviation (T,) of each row, fp32."""
    return _launch_forward(x, branch, weight, bias, eps, branch_bias, None)


def _launch_forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()
    added = bias if branch_bias is None else branch_bias
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        layer_norm_forward_kernel[(rows,)](
            *(x, branch, added.contiguous(), weight.contiguous(), bias.contiguous()),
            *(total, normed, mean, rstd),
            *_drawn_by(drop, x),
            *(width, eps),
            HAS_BRANCH_BIAS=branch_bias is not None,
            DROPS=drop is not None,
            BLOCK=_block(width, drop),
            num_warps=_warps(width),
        )
    return total, normed, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results_like(x)


def _results_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward pass gives, by shape: sum, norm, mean and 1 / deviation."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty(len(x), dtype=torch.float32)
    return total, torch.empty_like(total), statistics, torch.empty_like(statistics)


@library.custom_op("palimpsest::add_layer_norm_backward", mutates_args=())
def _backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, which is that of the branch too, of weight, of bias and of the
    branch's bias: (0,) where it has none.
    """
    d_x, _, *sums = _launch_backward(
        d_normed, d_total, total, mean, rstd, weight, has_branch_bias
    )
    d_weight, d_bias, d_branch_bias = _apart(*sums)
    return d_x, d_weight, d_bias, d_branch_bias


def _apart(
    d_weight: Tensor, d_bias: Tensor, d_branch_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of an operator may not share memory."""
    return d_weight, d_bias.clone(), d_branch_bias.clone()


def _launch_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch_bias: bool,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both tables, the same one without dropout, weight and biases; that
    of the branch's is (0,) where it has none.
    """
    rows, width = total.shape
    d_normed = d_normed.contiguous()
    d_x = torch.empty_like(total)
    d_branch = d_x if drop is None else torch.empty_like(total)
    # A power of two, so that it is compiled for few numbers of rows.
    per_program = triton.next_power_of_2(max(triton.cdiv(rows, _PROGRAMS), 1))
    programs = triton.cdiv(rows, per_program)
    sums = 2 + has_branch_bias
    parts = total.new_empty(sums, programs, width, dtype=torch.float32)
    if rows:
        layer_norm_backward_kernel[(programs,)](
            d_normed,
            d_normed if d_total is None else d_total.contiguous(),
            *(total, mean, rstd, weight.contiguous()),
            *(d_x, d_branch, parts[0], parts[1], parts[-1]),
            *_drawn_by(drop, total),
            *(rows, width),
            PER_PROGRAM=per_program,
            DROPS=drop is not None,
            HAS_D_TOTAL=d_total is not None,
            HAS_BRANCH_BIAS=has_branch_bias,
            BLOCK=_block(width, drop),
            num_warps=_warps(width),
            maxnreg=_REGISTERS,
        )
    d_weight, d_bias, *added = sum_parts(parts, weight.dtype)
    return d_x, d_branch, d_weight, d_bias, *(added or [weight.new_empty(0)])


@_backward.register_fake
def _(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(total), *_sums_like(weight, has_branch_bias)


def _sums_like(weight: Tensor, has_branch_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (D,), by shape."""
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    d_branch_bias = weight.new_empty(len(weight) if has_branch_bias else 0)
    return d_weight, torch.empty_like(d_weight), d_branch_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # A sum that nothing uses (post-norm) has no gradient, rather than one of zeros.
    ctx.set_materialize_grads(False)
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # With dropout, what it is drawn by besides.
    ctx.save_for_backward(total, mean, rstd, inputs[2], *inputs[6:9])
    ctx.chosen = inputs[9:]


def _differentiate(
    backward: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[5]
    if d_normed is not None:
        # What is launched gives a gradient of the branch besides, the same without
        # dropout.
        found = backward(d_normed, d_total, *ctx.saved_tensors, asked)
        d_weight, d_bias, d_branch_bias = found[-3:]
        of_norm = (d_weight, d_bias, None)
        return found[0], found[0], *of_norm, d_branch_bias if asked else None
    if d_total is None:
        return (None,) * 6
    return _of_sum_alone(d_total, d_total, asked)


def _of_sum_alone(
    d_total: Tensor, d_branch: Tensor, asked: bool
) -> tuple[Tensor | None, ...]:
    # Whoever gave the gradient of the sum may read it again.
    d_branch_bias = d_branch.sum(0) if asked else None
    return d_total.clone(), d_branch, None, None, None, d_branch_bias


_forward.register_autograd(partial(_differentiate, _backward), setup_context=_keep)
_direct = direct(
    partial(_launch_forward, drop=None),
    _keep,
    partial(_differentiate, _launch_backward),
)


@library.custom_op("palimpsest::dropout_add_layer_norm", mutates_args=())
def _forward_dropping(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, with what the branch's dropout is drawn by."""
    drop = Dropout(share, seed, use, uid, place)
    return _launch_forward(x, branch, weight, bias, eps, branch_bias, drop)


@_forward_dropping.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results_like(x)


@library.custom_op("palimpsest::dropout_add_layer_norm_backward", mutates_args=())
def _backward_dropping(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
    has_branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_backward`, with the gradient of the branch after that of `x`."""
    drop = Dropout(share, seed, use, uid, place)
    d_x, d_branch, *sums = _launch_backward(
        d_normed, d_total, total, mean, rstd, weight, has_branch_bias, drop
    )
    return d_x, d_branch, *_apart(*sums)


@_backward_dropping.register_fake
def _(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    use: Tensor,
    uid: Tensor,
    place: Tensor,
    share: float,
    seed: int,
    has_branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(total)
    return d_x, torch.empty_like(d_x), *_sums_like(weight, has_branch_bias)


def _differentiate_dropping(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    asked, kept = ctx.needs_input_grad[5], ctx.saved_tensors
    if d_normed is not None:
        d_x, d_branch, d_weight, d_bias, d_branch_bias = _backward_dropping(
            d_normed, d_total, *kept, *ctx.chosen, asked
        )
        of_norm = (d_weight, d_bias, None)
        found = (d_x, d_branch, *of_norm, d_branch_bias if asked else None)
        return *found, *[None] * 5
    if d_total is None:
        return (None,) * 11
    d_branch = dropout.dropout_by(d_total, *kept[4:], *ctx.chosen)
    return *_of_sum_alone(d_total, d_branch, asked), *[None] * 5


_forward_dropping.register_autograd(_differentiate_dropping, setup_context=_keep)


def _drawn_by(drop: Dropout | None, unused: Tensor) -> tuple[Any, ...]:
    """What the kernels are given of it."""
    if drop is None:
        return unused, unused, unused, 0, 0, 1.0
    rows = (each.contiguous() for each in drop[2:])
    return *rows, drop.seed, dropout.first_kept(drop.share), dropout.scale(drop.share)


def _block(width: int, drop: Dropout | None) -> int:
    """Channels that a program has: all."""
    return triton.next_power_of_2(width) if drop is None else dropout.block(width)


def _warps(width: int) -> int:
    """So that a thread has about eight columns: 16 bytes of bf16."""
    return min(max(triton.next_power_of_2(width) // 256, 1), 16)


def add_layer_norm_fused(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, wherever the tensors are."""
    called = _forward if observed() else _direct
    total, normed, *_ = called(x, branch, weight, bias, eps, branch_bias)
    return total, normed


def dropout_add_layer_norm_fused(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    drop: Dropout,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with dropout."""
    given = (branch_bias, *drop[2:], drop.share, drop.seed)
    return _forward_dropping(x, branch, weight, bias, eps, *given)[:2]


def _case(
    rows: int,
    width: int,
    *,
    small: bool = False,
    drops: bool = False,
    biased: bool = False,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        # On the host, so that all devices see the same numbers.
        draw = torch.Generator().manual_seed(seed)
        x, branch = torch.randn(2, rows, width, generator=draw).unbind(0)
        weight = 1 + 0.1 * torch.randn(width, generator=draw)
        # A mean that is not 0 is what the two passes over a row are for.
        bias, branch_bias = (torch.randn(width, generator=draw) for _ in range(2))
        *moved, branch_bias = (
            part.to(device, dtype).requires_grad_()
            for part in (x + 3, branch, weight, bias, 0.3 * branch_bias)
        )
        drawn = (dropout.rows_drawn(rows, device, seed),) if drops else ()
        return *moved, 1e-12, *drawn, *((branch_bias,) if biased else ())

    def moved_bytes(dtype: torch.dtype, *, tables: int) -> int:
        statistics = 2 * rows * 4 + drops * 3 * rows * 8
        vectors = 2 + biased
        return (tables * rows + vectors) * width * dtype.itemsize + statistics

    return Case(
        kernel=f"{'bias + ' * biased}residual + {'dropout + ' * drops}LayerNorm",
        shape=f"T={rows} D={width}",
        inputs=inputs,
        fused=dropout_add_layer_norm_fused if drops else add_layer_norm_fused,
        reference=dropout_add_layer_norm_ref if drops else add_layer_norm_ref,
        tolerances={torch.float32: 2e-6, torch.bfloat16: 1e-2},
        reason=(
            "fp32: rounding of sums over a row and, in the gradients of weight and "
            "bias, over the rows. bf16: outputs and the sum that the backward pass "
            "starts from are rounded to 8 bits, 2^-9 each on average of a relative "
            "error, statistics are not"
        ),
        # Reads x and branch, writes sum and norm.
        forward_bytes=lambda dtype: moved_bytes(dtype, tables=4),
        # Reads the gradients of both and the sum, writes that of the inputs, which are
        # two with dropout.
        backward_bytes=lambda dtype: moved_bytes(dtype, tables=4 + drops),
        small=small,
    )


# Rows and width of micro-batches of 96 pairs with about 24 words of mlim-base (49 image
# tokens) and mlim-large-384 (144).
CASES = (
    _case(1, 64, small=True),
    _case(5, 33, small=True),
    _case(300, 24, small=True),
    _case(3, 768, small=True),
    _case(2, 1_024, small=True),
    _case(7_008, 768),
    _case(16_128, 1_024),
    _case(1, 64, small=True, drops=True),
    _case(5, 33, small=True, drops=True),
    _case(7_008, 768, drops=True),
    _case(16_128, 1_024, drops=True),
    *(
        _case(*shape, small=shape[0] < 1_000, drops=drops, biased=True)
        for drops in (False, True)
        for shape in ((1, 64), (5, 33), (20, 24), (7_008, 768), (16_128, 1_024))
    ),
)
