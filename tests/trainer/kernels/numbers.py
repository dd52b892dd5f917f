"""A kernel against its reference, on the inputs of a case."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.kernels.case import Case, Inputs

CPU = torch.device("cpu")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="kernels on a CPU need TRITON_INTERPRET=1; on a GPU, make gpu-check",
)


def exact(inputs: Inputs) -> Inputs:
    """The same values in fp64."""
    return tuple(
        value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in inputs
    )


def output_and_gradients(call: Any, inputs: Inputs) -> list[Tensor]:
    """What `call` gives, and the gradient of each input that asks for one, by a fixed
    gradient of the output.
    """
    output = call(*inputs)
    leaves = [each for each in inputs if isinstance(each, Tensor)]
    leaves = [each for each in leaves if each.requires_grad]
    if not leaves:
        return [output]
    generator = torch.Generator().manual_seed(7)
    given = torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, given)]


def errors(case: Case, inputs: Inputs) -> list[float]:
    """Relative error of the output and of each gradient against fp64, infinite where
    one is not a number, which `max` would pass over.
    """
    found = output_and_gradients(case.fused, inputs)
    wanted = output_and_gradients(case.reference, exact(inputs))
    relative = [
        float((mine.double() - true).norm() / true.double().norm().clamp(min=1e-12))
        for mine, true in zip(found, wanted, strict=True)
    ]
    return [math.inf if math.isnan(error) else error for error in relative]


def spread_out(value: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    wide = value.detach().new_zeros((*value.shape, 2))
    wide[..., 0] = value.detach()
    return wide[..., 0].requires_grad_(value.requires_grad)
