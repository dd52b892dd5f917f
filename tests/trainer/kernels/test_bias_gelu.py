from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.against_reference import check, close
from tests.trainer.kernels.numbers import CPU, interpreted
from trainer.kernels import bias_gelu as bias_gelu_module
from trainer.kernels import parts
from trainer.kernels.bias_gelu import (
    CASES,
    bias_gelu,
    bias_gelu_backward,
    bias_gelu_fused,
    bias_gelu_ref,
)
from trainer.kernels.case import Case

SMALL = [case for case in CASES if case.small]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_outputs_and_both_gradients_are_those_of_the_reference(
    case: Case, dtype: torch.dtype
) -> None:
    check(case, dtype)


@interpreted
def test_rows_of_a_larger_table_and_a_gradient_laid_across_are_taken_as_they_are() -> (
    None
):
    table = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    x = table[::2, 8:32].requires_grad_()
    bias = torch.linspace(-1, 1, 48)[::2].requires_grad_()
    across = torch.randn(24, 10).t()
    found = torch.autograd.grad(bias_gelu_fused(x, bias), (x, bias), across)
    wanted = torch.autograd.grad(bias_gelu_ref(x, bias), (x, bias), across)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, 1e-5)


@interpreted
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_a_program_goes_over_many_tiles(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PROGRAMS", programs)
    monkeypatch.setattr(bias_gelu_module, "_TILE", 256)
    check(CASES[3], torch.float32)


@interpreted
def test_no_rows_have_no_gradient() -> None:
    x = torch.empty(0, 24, requires_grad=True)
    bias = torch.ones(24, requires_grad=True)
    found = bias_gelu_fused(x, bias)
    assert found.shape == (0, 24)
    of_x, of_bias = torch.autograd.grad(found.sum(), (x, bias))
    assert of_x.shape == (0, 24)
    assert torch.equal(of_bias, torch.zeros(24))


@interpreted
def test_the_bias_gradient_has_the_same_bits_every_time() -> None:
    given = CASES[3].inputs(CPU, torch.bfloat16, 4)
    dy = torch.randn(given[0].shape).bfloat16()
    with torch.no_grad():
        once, again = (bias_gelu_backward(dy, *given) for _ in range(2))
    assert torch.equal(once[1], again[1])


def test_the_reference_has_the_gradients_of_its_function() -> None:
    x, bias = torch.randn(4, 6).double(), torch.randn(6).double()
    assert torch.autograd.gradcheck(
        bias_gelu_ref, (x.requires_grad_(), bias.requires_grad_())
    )


def test_without_a_gpu_the_reference_is_taken() -> None:
    x, bias = torch.randn(4, 6), torch.randn(6)
    assert torch.equal(bias_gelu(x, bias), bias_gelu_ref(x, bias))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_rules_of_operators(dtype: torch.dtype) -> None:
    x, bias = CASES[1].inputs(CPU, dtype, 0)
    operators = torch.ops.palimpsest
    library.opcheck(operators.bias_gelu.default, (x, bias))
    plain = (torch.ones_like(x), x.detach(), bias.detach())
    library.opcheck(operators.bias_gelu_backward.default, plain)
