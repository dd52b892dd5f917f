"""MLIM's losses by the kernels, as on a GPU, beside those of plain torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.trainer.test_mlim import TINY, batch, build
from trainer.kernels.cross_entropy import masked_cross_entropy_fused
from trainer.kernels.pixel_sse import masked_pixel_error_fused
from trainer.masking import Masks
from trainer.models import mlim
from trainer.models.base import Inputs, Output
from trainer.models.mlim import MlimForPreTraining

LENGTHS = [7, 2, 12, 9, 3, 15]


def choose_kernels(patch: pytest.MonkeyPatch) -> None:
    """What CUDA tensors would choose."""
    patch.setattr(mlim, "masked_cross_entropy", masked_cross_entropy_fused)
    patch.setattr(mlim, "masked_pixel_error", masked_pixel_error_fused)


def step(
    model: MlimForPreTraining, inputs: Inputs, masks: Masks
) -> tuple[Output, list[Tensor]]:
    """Losses, and the gradients of all parameters."""
    output = model(inputs, masks)
    loss = 0.3 * output.losses["mlm"] + 2 * output.losses["recon"]
    return output, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("region", ["masked", "whole"])
def test_losses_and_gradients_are_those_of_plain_torch(
    region: Literal["masked", "whole"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dataclasses.replace(TINY, recon_region=region))
    inputs, masks = batch(LENGTHS)
    # Rows beyond the counts in both lists.
    inputs = inputs._replace(
        n_masked_words=inputs.n_masked_words + 5, n_recon_images=len(LENGTHS)
    )
    wanted, wanted_gradients = step(model, inputs, masks)
    choose_kernels(monkeypatch)
    found, found_gradients = step(model, inputs, masks)
    for ours, theirs in zip(
        [*found, *found_gradients], [*wanted, *wanted_gradients], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(found.figures["mlm_accuracy"]) == int(wanted.figures["mlm_accuracy"])


def test_bf16_losses_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and the decoder's outputs are the same bits; losses are fp32."""
    model = build().to(torch.bfloat16)
    inputs, masks = batch(LENGTHS)
    wanted, wanted_gradients = step(model, inputs, masks)
    choose_kernels(monkeypatch)
    found, found_gradients = step(model, inputs, masks)
    assert found.losses["mlm"].dtype == found.losses["recon"].dtype == torch.float32
    torch.testing.assert_close(
        found.losses["mlm"], wanted.losses["mlm"], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        found.losses["recon"], wanted.losses["recon"], rtol=1e-5, atol=0
    )
    for ours, theirs in zip(found_gradients, wanted_gradients, strict=True):
        # Both round to bf16 at every layer on the way back.
        error = (ours.float() - theirs.float()).norm()
        assert error <= 2e-2 * theirs.float().norm() + 1e-6


def test_logits_are_there_for_whoever_only_evaluates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    with torch.inference_mode():
        hidden = model.encode(inputs, masks)
        wanted = model.score_words(hidden, inputs, masks)
        choose_kernels(monkeypatch)
        found = model.score_words(hidden, inputs, masks)
    assert torch.equal(found.logits, wanted.logits)
    torch.testing.assert_close(found.nll, wanted.nll)
    assert torch.equal(found.correct, wanted.correct)


def test_nothing_masked_gives_loss_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, masks = batch(LENGTHS)
    nothing = dataclasses.replace(
        masks, text=torch.zeros_like(masks.text), image=torch.zeros_like(masks.image)
    )
    choose_kernels(monkeypatch)
    output, gradients = step(build(), inputs, nothing)
    assert (
        float(output.losses["mlm"].detach())
        == float(output.losses["recon"].detach())
        == 0
    )
    assert all(not gradient.any() for gradient in gradients)
