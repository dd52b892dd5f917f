from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.numbers import CPU, interpreted, spread_out
from trainer.kernels.case import Case
from trainer.kernels.compact import CASES, compact, compact_fused, compact_ref

pytestmark = interpreted


def assert_same(chosen: torch.Tensor, capacity: int) -> None:
    pairs = zip(
        compact_fused(chosen, capacity), compact_ref(chosen, capacity), strict=True
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.shape)
def test_lists_are_those_of_a_stable_sort(case: Case) -> None:
    assert_same(*case.inputs(CPU, torch.float32, 1))


@pytest.mark.parametrize("places", [1, 1024, 1025, 4097])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("over", [-1, 0, 9])
def test_any_number_may_be_chosen_and_fill_any_part(
    places: int, share: float, over: int
) -> None:
    generator = torch.Generator().manual_seed(places)
    chosen = torch.rand(places, generator=generator) < share
    assert_same(chosen, max(int(chosen.sum()) + over, 0))


def test_chosen_places_come_first_in_order() -> None:
    chosen = torch.tensor([False, True, False, True, True, False])
    index, valid = compact_fused(chosen, 5)
    assert index.tolist() == [1, 3, 4, 0, 2]
    assert valid.tolist() == [True, True, True, False, False]


def test_flags_need_not_be_contiguous() -> None:
    chosen = torch.arange(50) % 3 == 0
    assert_same(spread_out(chosen), 20)


def test_without_a_gpu_the_reference_sorts() -> None:
    assert torch.equal(compact(torch.tensor([False, True]), 1)[0], torch.tensor([1]))


@pytest.mark.parametrize("capacity", [4, 30])
def test_the_operator_keeps_the_rules_of_operators(capacity: int) -> None:
    library.opcheck(compact_fused, (torch.arange(20) % 3 == 0, capacity))
