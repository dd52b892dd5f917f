"""Convolutions with GELU after them: of squares that do not overlap, and transposed.

Owns how they are computed where. Does not own which there are, or their weights
(`trainer.models.mlim`).

On a CUDA device bias and GELU are one pass (`trainer.kernels.bias_gelu`), over what a
product or convolution without its bias gives, and convolutions of few channels have
kernels of their own (`trainer.kernels.small_convolution`, `up_convolution`).

Shapes: B images, C channels, O of the result, N pixels or squares in nested order
(`trainer.kernels.pixels`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels import small_convolution
from trainer.kernels.bias_gelu import bias_gelu
from trainer.kernels.up_convolution import up_convolution
from trainer.models import dense
from trainer.models.dense import gelu_after

_FEW = 4
"""Channels."""


class Stack(nn.Sequential):
    """Layers one after the other, which `torch.compile` takes as one: of torch's own
    class it compiles each layer by itself, and gives up after eight that differ.
    """

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives."""
        for layer in self:
            x = layer(x)
        return x


class SquareConv(nn.Conv2d):
    """A convolution of `side` x `side` by steps of `side`, and GELU if asked for."""

    def __init__(self, channels: int, width: int, side: int, *, gelu: bool) -> None:
        super().__init__(channels, width, side, stride=side)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H / side, W / side); or in nested order (N, C), whose
        channels may be followed by some that are 0, -> (N / side^2, O).
        """
        assert self.bias is not None
        if x.dim() == 4:
            found = super().forward(x)
            return F.gelu(found) if self.gelu else found
        taps_ohwc = self.weight.permute(0, 2, 3, 1)
        # Channels that are 0 have weights that are 0.
        taps_ohwc = F.pad(taps_ohwc, (0, x.shape[1] - self.in_channels))
        weight_ok = taps_ohwc.flatten(1)
        x_nk = x.view(-1, weight_ok.shape[1])
        if not self.gelu:
            return F.linear(x_nk, weight_ok, self.bias)
        return gelu_after(F.linear(x_nk, weight_ok), self.bias)


class TransposedConv(nn.ConvTranspose2d):
    """A transposed convolution, and GELU if asked for."""

    def __init__(
        self, channels: int, width: int, side: int, stride: int, *, gelu: bool
    ) -> None:
        super().__init__(channels, width, side, stride, padding=1)
        self.gelu = gelu
        form = (side, stride)
        # cuDNN has slow kernels alone for a transposed convolution to three channels,
        # and for others of few channels.
        self._quarters = form == (4, 2) and width <= _FEW
        self._turned = form == (3, 1) and small_convolution.supported(channels, width)
        self._up = form == (4, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, h, w) -> (B, O, H, W)."""
        assert self.bias is not None
        if not dense.fuses(x):
            found = super().forward(x)
        elif self._quarters:
            found = by_quarters(x, self.weight, self.bias)
        else:
            return self._fused(x)
        return F.gelu(found) if self.gelu else found

    def _fused(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        bias = None if self.gelu else self.bias
        if self._turned:
            found = turned(x, self.weight, bias)
        elif self._up and self.gelu:
            found = up_convolution(x, self.weight)
        else:
            found = F.conv_transpose2d(x, self.weight, bias, self.stride, 1)
        if not self.gelu:
            return found
        last = found.permute(0, 2, 3, 1)
        if not last.is_contiguous():
            return F.gelu(found + self.bias[:, None, None])
        flat = bias_gelu(last.flatten(0, 2), self.bias)
        return flat.view(last.shape).permute(0, 3, 1, 2)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution of 3 x 3 by steps of 1 with padding 1, as a convolution
    whose weights are turned by half a circle: (B, O, h, w).

    Args:
        x: (B, C, h, w).
        weight: (C, O, 3, 3).
        bias: (O,), or None.
    """
    around = weight.flip(2, 3).transpose(0, 1)
    return small_convolution.convolution(x, around, bias)


def by_quarters(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution of 4 x 4 by steps of 2 with padding 1, as a convolution
    of 3 x 3 whose channels are the four quarters of what is between two steps (Shi et
    al., "Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network", 2016).

    Args:
        x: (B, C, h, w).
        weight: (C, O, 4, 4).
        bias: (O,).

    Returns:
        (B, O, 2 h, 2 w).
    """
    channels, width = weight.shape[:2]
    # Half a of a step takes from input d - 1 the weight numbered a + 3 - 2 d, if any.
    half = torch.arange(6, device=x.device)
    number = half // 3 + 3 - 2 * (half % 3)
    chosen = number[:, None] == torch.arange(4, device=x.device)
    chosen = chosen.to(weight.dtype)
    taps = chosen @ weight.flatten(0, 1) @ chosen.t()
    taps = taps.view(channels, width, 2, 3, 2, 3).permute(1, 2, 4, 0, 3, 5)
    quarters = taps.reshape(4 * width, channels, 3, 3)
    biases = bias.repeat_interleave(4, output_size=4 * width)
    return small_convolution.convolution(x, quarters, biases, shuffled=True)
