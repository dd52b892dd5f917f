from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.against_reference import check, close
from tests.trainer.kernels.numbers import CPU, interpreted
from trainer.kernels import small_convolution
from trainer.kernels.case import Case
from trainer.kernels.small_convolution import (
    CASES,
    Strip,
    convolution,
    convolution_backward,
    convolution_fused,
    convolution_ref,
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
@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case.shape)
def test_programs_have_bands_strips_and_several_of_them(
    case: Case, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (Strip(16, 4), programs)
    monkeypatch.setattr(small_convolution, "_RESULTS", Strip(16, 4))
    monkeypatch.setattr(small_convolution, "_NARROW_WEIGHTS", weights)
    monkeypatch.setattr(small_convolution, "_WEIGHTS", {128: weights})
    check(case, torch.float32)


@interpreted
@pytest.mark.parametrize("shuffled", [False, True])
def test_images_and_gradients_that_lie_otherwise_are_taken_as_they_are(
    shuffled: bool,
) -> None:
    x = torch.randn(5, 9, 4, 11)[::2].transpose(1, 2).requires_grad_()
    weight = torch.randn(4, 3, 3, 8).permute(3, 0, 1, 2).requires_grad_()
    bias = torch.linspace(-1, 1, 16)[::2].requires_grad_()
    inputs = (x, weight, bias)
    found = convolution_fused(*inputs, shuffled)
    wanted = convolution_ref(*inputs, shuffled)
    close(found, wanted, 1e-5)
    upstream = torch.randn(*reversed(wanted.shape)).permute(3, 2, 1, 0)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        close(ours, theirs, 1e-5)


@interpreted
def test_no_images_have_no_gradient() -> None:
    x = torch.empty(0, 16, 4, 4, requires_grad=True)
    weight = torch.ones(12, 16, 3, 3, requires_grad=True)
    found = convolution_fused(x, weight, None, True)
    assert found.shape == (0, 3, 8, 8)
    of_x, of_weight = torch.autograd.grad(found.sum(), (x, weight))
    assert of_x.shape == x.shape
    assert torch.equal(of_weight, torch.zeros_like(weight))


@interpreted
def test_results_and_gradients_lie_with_channels_last() -> None:
    x, weight, bias, shuffled = CASES[2].inputs(CPU, torch.float32, 0)
    found = convolution_fused(x, weight, bias, shuffled)
    (of_x,) = torch.autograd.grad(found.sum(), x)
    for table in (found, of_x):
        assert table.is_contiguous(memory_format=torch.channels_last)


@interpreted
def test_gradients_of_weights_and_biases_have_the_same_bits_every_time() -> None:
    x, weight, _, shuffled = CASES[2].inputs(CPU, torch.bfloat16, 4)
    dy = torch.randn(2, 3, 14, 40).bfloat16()
    with torch.no_grad():
        once, again = (convolution_backward(dy, x, weight, shuffled) for _ in range(2))
    assert torch.equal(once[1], again[1])
    assert torch.equal(once[2], again[2])


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_reference_has_the_gradients_of_its_function(shuffled: bool) -> None:
    x, weight, bias = (
        torch.randn(shape).double().requires_grad_()
        for shape in ((1, 2, 3, 4), (4, 2, 3, 3), (4,))
    )
    assert torch.autograd.gradcheck(
        lambda *given: convolution_ref(*given, shuffled), (x, weight, bias)
    )


def test_without_a_gpu_the_reference_is_taken() -> None:
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(4, 2, 3, 3)
    wanted = convolution_ref(x, weight, None, True)
    assert torch.equal(convolution(x, weight, None, shuffled=True), wanted)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_operators_keep_the_rules_of_operators(
    shuffled: bool, dtype: torch.dtype
) -> None:
    case = small_convolution._case(1, 3, 4, 2, 3, bias=shuffled, shuffled=shuffled)
    given = case.inputs(CPU, dtype, 0)
    x, weight, *_ = given
    operators = torch.ops.palimpsest
    library.opcheck(operators.small_convolution.default, given)
    dy = torch.ones_like(convolution_ref(*given)).detach()
    plain = (dy, x.detach(), weight.detach(), shuffled)
    library.opcheck(operators.small_convolution_backward.default, plain)
