from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.numbers import CPU, interpreted
from trainer.kernels.case import Case
from trainer.kernels.pixels import (
    CASES,
    nested,
    nested_fused,
    nested_ref,
    normalised,
    normalised_fused,
    normalised_ref,
)

pytestmark = interpreted
SMALL = [case for case in CASES if case.small]
EVERY = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_pixels_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    *given, _ = case.inputs(CPU, dtype, 0)
    found = case.fused(*given, dtype)
    wanted = case.reference(*given, torch.float64)
    assert isinstance(found, torch.Tensor)
    assert isinstance(wanted, torch.Tensor)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < case.tolerances[dtype]


def test_black_and_white_are_exact_and_memory_is_channels_last() -> None:
    found = normalised_fused(EVERY, torch.float32)
    assert (float(found.min()), float(found.max())) == (-1.0, 1.0)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert normalised_ref(EVERY, torch.float32).stride() == found.stride()


def test_in_nested_order_each_square_of_any_size_follows_whole() -> None:
    place = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(
        nested(place, 4, torch.float64), nested_ref(place, 4, torch.float64)
    )
    found = nested_fused(place, 4, torch.float64)
    assert torch.equal(found[:, 3], torch.zeros(256, dtype=torch.float64))
    order = ((found[:, 0] + 1) * 127.5).round().long()
    y, x = order // 16, order % 16
    for side in (1, 2, 4):
        for of in (y, x):
            of_squares = (of // side).view(-1, side * side)
            assert (of_squares == of_squares[:, :1]).all()
    # Squares of 4 x 4 by rows; in one of 2 x 2, two of a row and two of the next.
    assert (y // 4 * 4 + x // 4).view(-1, 16)[:, 0].tolist() == list(range(16))
    assert order[:4].tolist() == [0, 1, 16, 17]


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 8, 8, 3), 6), ((1, 8, 12, 3), 4), ((1, 6, 6, 3), 4)]
)
def test_squares_that_cannot_be_nested_are_refused(
    shape: tuple[int, ...], side: int
) -> None:
    for one in (nested_ref, nested_fused):
        with pytest.raises(ValueError, match="square"):
            one(torch.zeros(shape, dtype=torch.uint8), side, torch.float32)


def test_images_need_not_be_contiguous() -> None:
    window = EVERY[:, 2:9, 1:8]
    found = normalised_fused(window, torch.float32)
    assert torch.allclose(found, normalised_ref(window, torch.float32), atol=1e-6)
    window = EVERY[:, 2:10, 1:9]
    found = nested_fused(window, 4, torch.float32)
    assert torch.allclose(found, nested_ref(window, 4, torch.float32), atol=1e-6)


def test_without_a_gpu_the_reference_normalises() -> None:
    found = normalised(EVERY, torch.float32)
    assert torch.equal(found, normalised_ref(EVERY, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_operators(dtype: torch.dtype) -> None:
    library.opcheck(torch.ops.palimpsest.normalised_pixels.default, (EVERY, dtype))
    library.opcheck(torch.ops.palimpsest.nested_pixels.default, (EVERY, 8, dtype))
