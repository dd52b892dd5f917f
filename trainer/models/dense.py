"""Linear layers, with and without GELU after them.

Owns how they are computed where. Does not own where they stand, or their weights
(`trainer.models.layers`).

On a CUDA device bias and GELU are one pass over what the product gives
(`trainer.kernels.bias_gelu`), and a bias has its gradient from a kernel
(`trainer.kernels.column_sums`).

Shapes: N rows, C channels, O of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.bias_gelu import bias_gelu
from trainer.kernels.column_sums import linear

VECTOR = 16 // torch.bfloat16.itemsize
"""Numbers of a load of 16 bytes, in the type that models compute with."""


class Linear(nn.Linear):
    """A linear layer of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, O)."""
        return biased(x, self.weight, self.bias)


class GeluLinear(nn.Linear):
    """A linear layer of rows and GELU after it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, O)."""
        if not fuses(x):
            return F.gelu(super().forward(x))
        return bias_gelu(F.linear(x, self.weight), self.bias)


def biased(x_nc: Tensor, weight_oc: Tensor, bias: Tensor) -> Tensor:
    """`x` times the weight's transpose, and the bias: (N, O)."""
    product = linear if fuses(x_nc) else F.linear
    return product(x_nc, weight_oc, bias)


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
