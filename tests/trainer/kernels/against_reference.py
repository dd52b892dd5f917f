"""A kernel held against its reference in fp64, as the cases of the modules say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.case import Case, Outputs


def check(case: Case, dtype: torch.dtype) -> None:
    """Assert that outputs and gradients of a case are those of its reference."""
    inputs = case.inputs(torch.device("cpu"), dtype, 0)
    exact = [_exact(value) for value in inputs]
    wanted = outputs_and_gradients(case.reference, exact)
    found = outputs_and_gradients(case.fused, inputs)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, case.tolerances[dtype])


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Assert a relative error; integers must be equal."""
    assert found.shape == wanted.shape
    if not wanted.dtype.is_floating_point:
        assert torch.equal(found, wanted)
        return
    error = (found.double() - wanted.double()).norm()
    assert error <= tolerance * wanted.double().norm(), (error, wanted.norm())


def outputs_and_gradients(
    function: Callable[..., Outputs], inputs: Any
) -> list[Tensor]:
    """What a function gives, and the gradients of its inputs under random ones of its
    floating-point outputs, the same in every dtype.
    """
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    scored = [each for each in outputs if each.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(each.shape, generator=generator, dtype=torch.float32).to(each.dtype)
        for each in scored
    ]
    wanting = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(scored, wanting, upstream) if scored else ()
    return [each.detach() for each in (*outputs, *gradients)]


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
