from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.against_reference import check, close
from tests.trainer.kernels.numbers import CPU, interpreted
from trainer.kernels import adamw as module
from trainer.kernels.adamw import CASES, adamw, adamw_fused, adamw_ref
from trainer.kernels.case import Case

SMALL = [case for case in CASES if case.small]
UPDATES = [
    pytest.param(adamw_fused, id="kernel", marks=interpreted),
    pytest.param(adamw_ref, id="reference"),
]
SETTINGS = (1e-3, (0.9, 0.999), 1e-8, 0.1)


def given(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Gradients, master, moments, weights, step, factor and refused of a run that
    begins.
    """
    generator = torch.Generator().manual_seed(0)
    gradients, master = (torch.randn(count, generator=generator) for _ in range(2))
    moments = torch.zeros(count), torch.zeros(count)
    numbers = (torch.tensor(value) for value in (0.0, 0.25, 0.0))
    return [gradients.to(dtype), master, *moments, master.to(dtype), *numbers]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_a_step_is_that_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("update", UPDATES)
def test_many_steps_are_those_of_torch(update: Any) -> None:
    """Each rounds some ten numbers of fp32 a step, in its own order and perhaps with
    multiplication and addition in one; what is rounded adds up over steps.
    """
    inputs = given(3_000)
    master = inputs[1].clone().requires_grad_()
    lr, betas, eps, decay = SETTINGS
    torchs = torch.optim.AdamW(
        [master], lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        inputs[0] = torch.randn(3_000, generator=generator).bfloat16()
        master.grad = inputs[0].float() * 0.25
        torchs.step()
        update(*inputs, *SETTINGS)
    state = torchs.state[master]
    wanted = [master.detach(), state["exp_avg"], state["exp_avg_sq"]]
    for ours, theirs in zip(inputs[1:4], wanted, strict=True):
        close(ours, theirs, 1e-6)
    assert torch.equal(inputs[5], state["step"])


@pytest.mark.parametrize("update", UPDATES)
def test_a_refused_step_changes_nothing_and_does_not_count(update: Any) -> None:
    inputs = given(1_500)
    inputs[0][7] = torch.nan
    inputs[7].fill_(1.0)
    inputs[6].fill_(torch.nan)
    before = [each.clone() for each in inputs[1:6]]
    found = update(*inputs, *SETTINGS)
    for ours, now, then in zip(found, inputs[1:6], before, strict=True):
        assert ours is now
        assert torch.equal(now, then)


@interpreted
@pytest.mark.parametrize("count", [1, 1_023, 1_024, 1_030, 2_999])
def test_nothing_is_written_beside_flat_weights(count: int) -> None:
    assert module._BLOCK == 1_024
    wide = [torch.full((count + 2_000,), 3.0, dtype=each.dtype) for each in given(1)]
    narrow = given(count)
    for whole, part in zip(wide[:5], narrow[:5], strict=True):
        whole[:count] = part
    numbers = [each.clone() for each in narrow[5:]]
    adamw_fused(*(each[:count] for each in wide[:5]), *numbers, *SETTINGS)
    adamw_ref(*narrow, *SETTINGS)
    for whole, part in zip(wide[1:5], narrow[1:5], strict=True):
        assert (whole[count:] == 3.0).all()
        close(whole[:count], part, 1e-6 if part.dtype == torch.float32 else 1e-2)


@interpreted
def test_late_and_early_steps_are_corrected_alike() -> None:
    for steps in (0.0, 1.0, 1e3, 1e6):
        ours, theirs = given(50, torch.float32), given(50, torch.float32)
        for each in (ours, theirs):
            each[5].fill_(steps)
        adamw_fused(*ours, *SETTINGS)
        exact = [x.double() for x in theirs]
        adamw_ref(*exact, *SETTINGS)
        for mine, true in zip(ours[1:6], exact[1:6], strict=True):
            close(mine, true, 3e-7)


@interpreted
def test_flat_weights_may_be_none() -> None:
    inputs = given(0)
    adamw_fused(*inputs, *SETTINGS)
    assert inputs[5] == 1.0


def test_without_a_gpu_the_reference_is_taken() -> None:
    ours = CASES[1].inputs(CPU, torch.bfloat16, 0)
    theirs = [x.clone() if isinstance(x, Tensor) else x for x in ours]
    for mine, true in zip(adamw(*ours), adamw_ref(*theirs), strict=True):
        assert torch.equal(mine, true)
