from __future__ import annotations

import pytest
import torch
from torch import library

from tests.trainer.kernels.numbers import CPU, interpreted
from trainer.kernels.case import Case
from trainer.kernels.pixels import CASES, normalised, normalised_fused, normalised_ref

pytestmark = interpreted
SMALL = [case for case in CASES if case.small]
EVERY = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_pixels_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    pixels, _ = case.inputs(CPU, dtype, 0)
    found = case.fused(pixels, dtype)
    wanted = case.reference(pixels, torch.float64)
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


def test_images_need_not_be_contiguous() -> None:
    window = EVERY[:, 2:9, 1:8]
    found = normalised_fused(window, torch.float32)
    assert torch.allclose(found, normalised_ref(window, torch.float32), atol=1e-6)


def test_without_a_gpu_the_reference_normalises() -> None:
    found = normalised(EVERY, torch.float32)
    assert torch.equal(found, normalised_ref(EVERY, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_operators(dtype: torch.dtype) -> None:
    library.opcheck(torch.ops.palimpsest.normalised_pixels.default, (EVERY, dtype))
