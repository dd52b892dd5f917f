"""A product of what a residual connection reads too: one gradient, in one table.

Owns the first layer of a branch as autograd sees it. Does not own what the branch and
the residual meet in (`trainer.kernels.layer_norm`) or which layers these are
(`trainer.models.layers`).

A layer's input is read by the first product of a branch and by the residual connection
around it, and autograd would add the gradients of both in a kernel of its own. Here the
residual reads what the product passes on. Its gradient so comes to the backward pass of
the product, which adds its own to it as it is made, in place: rounded once, and not
before. The graph itself sees to it that the one comes before the other.

Shapes: N rows, C channels, O of the result.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def linear_beside(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.linear` of (N, C), and `x`, for the residual to read.

    The gradient of the second is overwritten. What reads it must give a table that
    nothing needs any more when all that follows from the product has had its backward
    pass, as `trainer.kernels.layer_norm` does for the branch's own norm; a hook that
    keeps this gradient has to copy it.
    """
    product, passed = _LinearBeside.apply(x, weight, bias)
    return product, passed


class _LinearBeside(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # A result that nothing reads has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, d_passed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if dy is None:
            return d_passed if of_x else None, None, None
        x, weight = ctx.saved_tensors
        dx = None
        if of_x:
            dx = dy @ weight if d_passed is None else d_passed.addmm_(dy, weight)
        return (
            dx,
            dy.t() @ x if of_weight else None,
            dy.sum(0) if of_bias else None,
        )
