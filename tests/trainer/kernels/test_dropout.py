from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.numbers import CPU, errors, interpreted, spread_out
from trainer.dropout import Dropout
from trainer.kernels import dropout
from trainer.kernels.case import Case
from trainer.kernels.dropout import CASES, dropout_fused, dropped, kept, rows_drawn

pytestmark = interpreted
SMALL = [case for case in CASES if case.small]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_the_kernel_is_its_reference_within_the_stated_tolerance(
    case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(CPU, dtype, 0)
    # The interpreter cuts bf16 off where a GPU rounds it.
    allowed = case.tolerances[dtype] * (2 if dtype == torch.bfloat16 else 1)
    assert max(errors(case, inputs)) <= allowed


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1 - 2**-40])
@pytest.mark.parametrize("width", [1, 4, 7, 48])
def test_the_mask_is_that_of_the_reference_bit_for_bit(
    width: int, share: float
) -> None:
    for seed in (1, -5, 3 << 60):
        drop = rows_drawn(11, CPU, 3)._replace(share=share, seed=seed)
        x = torch.ones(11, width, requires_grad=True)
        out = dropout_fused(x, drop)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(out != 0, kept(drop, width))
        assert torch.equal(gradient, out)


def test_rows_need_not_lie_side_by_side() -> None:
    x, drop = torch.randn(6, 20), rows_drawn(6, CPU, 0)
    spread = Dropout(*drop[:2], *(spread_out(each) for each in drop[2:]))
    assert not spread.uid.is_contiguous()
    found = dropout_fused(spread_out(x), spread)
    torch.testing.assert_close(found, dropped(x, drop))


def test_no_rows_are_no_rows() -> None:
    assert dropout_fused(torch.ones(0, 8), rows_drawn(0, CPU, 0)).shape == (0, 8)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    x, drop = torch.randn(3, 20, requires_grad=True), rows_drawn(3, CPU, 0)
    library.opcheck(dropout.dropout_by, (x, *drop[2:], 0.1, 5))
