from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import library

import trainer.models.mlim
from tests.trainer.kernels.numbers import (
    CPU,
    errors,
    exact,
    interpreted,
    output_and_gradients,
    spread_out,
)
from tests.trainer.test_mlim import LENGTHS, TINY, batch, build, matching
from trainer.kernels.case import Case, Inputs
from trainer.kernels.compact import compact_fused
from trainer.kernels.mam_embed import (
    CASES,
    Embedding,
    embed_backward,
    embed_fused,
    embed_ref,
    mam_embed,
)
from trainer.kernels.pixels import normalised_fused

pytestmark = interpreted
SMALL = [case for case in CASES if case.small]
FIRST = SMALL[0]
BOTH = [torch.float32, torch.bfloat16]


def embedding(case: Case = FIRST) -> Embedding:
    return Embedding(*case.inputs(CPU, torch.float32, 2))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_output_and_gradients_are_those_of_the_reference(
    case: Case, dtype: torch.dtype
) -> None:
    found = errors(case, case.inputs(CPU, dtype, 0))
    assert len(found) == 7
    assert max(found) < case.tolerances[dtype], found


@pytest.mark.parametrize("hidden", [False, True])
def test_everything_or_nothing_may_be_hidden(hidden: bool) -> None:
    given = embedding()
    assert given.hidden_text is not None
    assert given.hidden_image is not None
    given = given._replace(
        hidden_text=torch.full_like(given.hidden_text, hidden),
        hidden_image=torch.full_like(given.hidden_image, hidden),
    )
    assert max(errors(FIRST, tuple(given))) < FIRST.tolerances[torch.float32]
    same = given if hidden else given._replace(hidden_text=None, hidden_image=None)
    assert torch.equal(embed_fused(*given), embed_fused(*same))


def test_words_that_are_the_mask_itself_share_its_gradient() -> None:
    given = embedding(SMALL[-1])
    shown = torch.full_like(given.shown, given.mask_id)
    inputs = tuple(given._replace(shown=shown))
    assert max(errors(FIRST, inputs)) < FIRST.tolerances[torch.float32]


def test_an_epsilon_of_nought_leaves_gradients_finite() -> None:
    inputs = tuple(embedding()._replace(eps=0.0))
    assert max(errors(FIRST, inputs)) < FIRST.tolerances[torch.float32]


def test_inputs_need_not_be_contiguous() -> None:
    given = embedding()
    gaps: Inputs = tuple(
        spread_out(each) if isinstance(each, torch.Tensor) else each for each in given
    )
    assert not gaps[9].is_contiguous()
    found = output_and_gradients(embed_fused, gaps)
    for mine, theirs in zip(
        found, output_and_gradients(embed_fused, tuple(given)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_gradients_of_the_reference_are_right() -> None:
    inputs = exact(SMALL[1].inputs(CPU, torch.float64, 0))
    # Norms of two values are steep.
    assert torch.autograd.gradcheck(embed_ref, (*inputs[:-1], 1e-3))


@pytest.mark.parametrize("case", [SMALL[1], SMALL[-1]], ids=lambda case: case.shape)
def test_the_operator_keeps_the_rules_of_operators(case: Case) -> None:
    inputs = case.inputs(CPU, torch.float32, 0)
    library.opcheck(embed_fused, inputs)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    grad_td = torch.randn(embed_fused(*plain).shape)
    library.opcheck(embed_backward, (grad_td, *plain))


def test_without_a_gpu_the_reference_embeds() -> None:
    given = embedding()
    assert torch.equal(mam_embed(given), embed_ref(*given))


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_encodes_the_same_with_the_kernels(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    plain = model.encode(inputs, masks if masked else None)
    use_kernels(monkeypatch)
    fused = model.encode(inputs, masks if masked else None)
    assert torch.allclose(fused, plain, atol=2e-5)
    assert not torch.equal(fused, plain)


def test_a_model_learns_the_same_with_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = losses_and_gradients()
    use_kernels(monkeypatch)
    fused = losses_and_gradients()
    assert fused.keys() == plain.keys()
    for name, wanted in plain.items():
        error = (fused[name] - wanted).double().norm()
        assert error < 1e-4 * max(float(wanted.double().norm()), 1e-2), name


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would run, on the tensors of this one."""

    def embed(given: Embedding) -> Any:
        return embed_fused(*given)

    for name, kernel in (
        ("mam_embed", embed),
        ("compact", compact_fused),
        ("normalised", normalised_fused),
    ):
        monkeypatch.setattr(trainer.models.mlim, name, kernel)


def losses_and_gradients() -> dict[str, torch.Tensor]:
    model = build(dataclasses.replace(TINY, itm_weight=1))
    inputs, masks = batch(LENGTHS)
    output = model(inputs._replace(matching=matching(len(LENGTHS))), masks)
    output.total.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    losses = {f"{name} loss": loss for name, loss in output.losses.items()}
    return {**gradients, **losses, **output.figures, "by_mode": output.by_mode}
