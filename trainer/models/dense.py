"""Linear layers, with and without GELU after them, at both ends of a branch.

Owns how they are computed where. Does not own where they stand, or their weights
(`trainer.models.layers`).

On a CUDA device bias and GELU are one pass over what the product gives
(`trainer.kernels.bias_gelu`), the bias of a branch's last layer is added with the
residual (`trainer.kernels.layer_norm`), and the first layer's gradient to the
residual's (`trainer.models.residual`).

Shapes: N rows, C channels, O of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.bias_gelu import bias_gelu
from trainer.models.residual import linear_beside

VECTOR = 16 // torch.bfloat16.itemsize
"""Numbers of a load of 16 bytes, in the type that models compute with."""


class Unbiased(NamedTuple):
    """What a branch ends in."""

    table_no: Tensor
    bias: Tensor | None = None
    """(O,) yet to be added to it; None: nothing is."""


class Linear(nn.Linear):
    """A linear layer of rows."""

    def unbiased(self, x: Tensor) -> Unbiased:
        """(N, C) -> (N, O), for a norm that adds the bias where it has a kernel."""
        if not fuses(x):
            return Unbiased(self(x))
        return Unbiased(F.linear(x, self.weight), self.bias)


class GeluLinear(nn.Linear):
    """A linear layer of rows and GELU after it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, O)."""
        if not fuses(x):
            return F.gelu(super().forward(x))
        return bias_gelu(F.linear(x, self.weight), self.bias)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and `x` for the residual beside it, as `linear_beside`."""
        if not fuses(x):
            return self(x), x
        product, x = linear_beside(x, self.weight, None)
        return bias_gelu(product, self.bias), x


def biased_beside(
    x_nc: Tensor, weight_oc: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """A linear layer, and `x` for the residual beside it, as `linear_beside`."""
    if not fuses(x_nc):
        return F.linear(x_nc, weight_oc, bias), x_nc
    return linear_beside(x_nc, weight_oc, bias)


def scores_of_words(hidden_mc: Tensor, words_vc: Tensor, bias: Tensor) -> Tensor:
    """Logits (M, V) of M rows for V words. On a CUDA device each row of them begins at
    a multiple of 16 bytes, of which cuBLAS has fast kernels; 30,522 is none.
    """
    n_words = len(words_vc)
    beyond = -n_words % VECTOR
    if not (fuses(hidden_mc) and beyond):
        return F.linear(hidden_mc, words_vc, bias)
    wide_vc = F.pad(words_vc, (0, 0, 0, beyond))
    return F.linear(hidden_mc, wide_vc, F.pad(bias, (0, beyond)))[:, :n_words]


def gelu_after(x_no: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x + bias`, both."""
    return bias_gelu(x_no, bias) if fuses(x_no) else F.gelu(x_no + bias)


def fuses(x: Tensor) -> bool:
    """Whether kernels of ours take a bias: not where a compiler sees it itself."""
    return x.is_cuda and not torch.compiler.is_compiling()
