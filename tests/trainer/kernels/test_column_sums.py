from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import library

from tests.trainer.kernels.against_reference import check
from tests.trainer.kernels.numbers import interpreted
from trainer.kernels import column_sums as module
from trainer.kernels.case import Case
from trainer.kernels.column_sums import CASES, column_sums, column_sums_fused, linear

SMALL = [case for case in CASES if case.small]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_sums_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@interpreted
def test_no_rows_sum_to_zero_and_rows_may_lie_apart() -> None:
    assert torch.equal(column_sums_fused(torch.empty(0, 9)), torch.zeros(9))
    table = torch.randn(20, 48)
    assert torch.allclose(column_sums_fused(table[::2, ::3]), table[::2, ::3].sum(0))


@interpreted
def test_a_linear_layer_has_the_gradients_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "column_sums", column_sums_fused)
    x, weight, bias = torch.randn(6, 5), torch.randn(7, 5), torch.randn(7)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    upstream = torch.randn(6, 7)
    wanted = torch.autograd.grad(F.linear(*leaves), leaves, upstream)
    found = torch.autograd.grad(linear(*leaves), leaves, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    x.requires_grad_(False)
    (alone,) = torch.autograd.grad(linear(*leaves), [bias], upstream)
    assert torch.allclose(alone, wanted[2], atol=1e-6)


def test_without_a_gpu_torch_sums() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(column_sums(x), x.sum(0))


@interpreted
def test_the_operator_keeps_the_rules_of_operators() -> None:
    library.opcheck(torch.ops.palimpsest.column_sums.default, (torch.randn(9, 5),))
