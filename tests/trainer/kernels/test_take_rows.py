from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.against_reference import check
from tests.trainer.kernels.numbers import interpreted
from trainer.kernels.case import Case
from trainer.kernels.take_rows import (
    CASES,
    put_rows,
    take_rows,
    take_rows_fused,
    take_rows_ref,
)

SMALL = [case for case in CASES if case.small]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_rows_and_gradients_are_those_of_the_reference(
    case: Case, dtype: torch.dtype
) -> None:
    check(case, dtype)


@interpreted
def test_a_row_that_does_not_count_leaves_the_gradient_of_the_same_row_alone() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    row, valid = torch.tensor([2, 4, 2]), torch.tensor([True, True, False])
    dy = torch.randn(3, 4)
    for function in (take_rows_fused, take_rows_ref):
        (dx,) = torch.autograd.grad(function(x, row, valid), x, dy)
        wanted = torch.zeros(6, 4)
        wanted[2], wanted[4] = dy[0], dy[1]
        assert torch.equal(dx, wanted)


@interpreted
def test_rows_and_gradients_may_lie_anywhere() -> None:
    x = torch.randn(9, 5).t().requires_grad_()
    row = torch.tensor([[3, 9], [0, 9], [4, 9]])[:, 0]
    dy = torch.randn(9, 3).t()
    found, wanted = take_rows_fused(x, row), take_rows_ref(x, row)
    assert torch.equal(found, wanted)
    (ours,) = torch.autograd.grad(found, x, dy)
    (theirs,) = torch.autograd.grad(wanted, x, dy)
    assert torch.equal(ours, theirs)


def test_the_reference_has_the_gradients_of_its_function() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    row = torch.tensor([4, 1])
    assert torch.autograd.gradcheck(lambda x: take_rows_ref(x, row), (x,))


def test_without_a_gpu_torch_takes_them() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(take_rows(x, torch.tensor([2, 0])), x[[2, 0]])


@interpreted
@pytest.mark.parametrize("valid", [None, torch.tensor([True, False, True])])
def test_the_operators_keep_the_rules_of_operators(valid: torch.Tensor | None) -> None:
    x, row = torch.randn(7, 5, requires_grad=True), torch.tensor([6, 0, 2])
    library.opcheck(torch.ops.palimpsest.take_rows.default, (x, row, valid))
    library.opcheck(put_rows, (torch.randn(3, 5), row, valid, 7))
