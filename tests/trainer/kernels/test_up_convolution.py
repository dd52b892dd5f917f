from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.against_reference import check, close
from tests.trainer.kernels.numbers import interpreted
from trainer.kernels import up_convolution as module
from trainer.kernels.case import Case
from trainer.kernels.small_convolution import Strip
from trainer.kernels.up_convolution import (
    CASES,
    up_convolution,
    up_convolution_fused,
    up_convolution_ref,
    weights_gradient,
)

SMALL = [case for case in CASES if case.small]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_results_and_all_gradients_are_those_of_the_reference(
    case: Case, dtype: torch.dtype
) -> None:
    check(case, dtype)


@interpreted
@pytest.mark.parametrize("programs", [1, 3])
def test_programs_have_bands_strips_and_several_of_them(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESULTS", Strip(16, 4))
    monkeypatch.setattr(module, "_WEIGHTS", Strip(16, 4))
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    check(CASES[1], torch.float32)


@interpreted
def test_images_and_gradients_that_lie_otherwise_are_taken_as_they_are() -> None:
    x = torch.randn(5, 9, 4, 11)[::2].transpose(1, 2).requires_grad_()
    weight = torch.randn(4, 3, 4, 4).permute(0, 1, 3, 2).requires_grad_()
    found, wanted = up_convolution_fused(x, weight), up_convolution_ref(x, weight)
    close(found, wanted, 1e-5)
    upstream = torch.randn(*reversed(wanted.shape)).permute(3, 2, 1, 0)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), upstream),
        torch.autograd.grad(wanted, (x, weight), upstream),
        strict=True,
    ):
        close(ours, theirs, 1e-5)


@interpreted
def test_no_images_have_no_gradient() -> None:
    x, weight = torch.zeros(0, 3, 5, 5, requires_grad=True), torch.randn(3, 2, 4, 4)
    y = up_convolution_fused(x, weight.requires_grad_())
    assert y.shape == (0, 2, 10, 10)
    dx, d_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_the_reference_has_the_gradients_of_its_function() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(up_convolution_ref, (x, weight))


def test_without_a_gpu_the_reference_is_taken() -> None:
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(up_convolution(x, weight), up_convolution_ref(x, weight))


@interpreted
def test_the_operators_keep_the_rules_of_operators() -> None:
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 3, 4, 4)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    library.opcheck(torch.ops.palimpsest.up_convolution.default, leaves)
    given = (torch.randn(1, 3, 6, 8), x.detach(), weight.detach())
    library.opcheck(weights_gradient, given)
