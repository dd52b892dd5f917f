"""What a kernel is held against, and on which inputs, for tests and benchmarks alike.

Owns the form. Does not own kernels or their cases (the modules beside this one, each
with a tuple `CASES`), the checks (`tests/trainer/kernels`, `benchmarks.gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    """What it is called in tables."""
    shape: str
    """The shape in words, such as `T=21504 D=1024`."""
    inputs: Callable[[torch.device, torch.dtype, int], Inputs]
    """Fresh random arguments on a device, in a dtype, from a seed; floating-point ones
    that need a gradient say so."""
    fused: Callable[..., Outputs]
    """The kernel, forward and backward through autograd."""
    reference: Callable[..., Outputs]
    """The same in plain torch, differentiable, exact to the dtype that it is given: in
    float64 it is what both are measured against, in bf16 the eager baseline, and under
    `torch.compile` the other one."""
    tolerances: Mapping[torch.dtype, float]
    """Largest relative error ||out - ref|| / ||ref|| of any floating-point output or
    gradient, by dtype; integers must be equal."""
    reason: str
    """Why the tolerances are what they are."""
    forward_bytes: Callable[[torch.dtype], int]
    """Fewest bytes that a forward pass moves: each input read once, each output
    written once."""
    backward_bytes: Callable[[torch.dtype], int] | None = None
    """The same of a backward pass; None: there is none."""
    forward_flops: float = 0.0
    """Of its matrix products."""
    backward_flops: float = 0.0
    """Of those of its backward pass."""
    small: bool = False
    """Small enough for Triton's interpreter."""
