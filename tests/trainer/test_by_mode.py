from __future__ import annotations

import math

import pytest
import torch

from trainer.by_mode import mode_metrics, psnr, sums_of_modes
from trainer.contract import MODE_METRIC_NAMES
from trainer.mask_config import Mode


def test_sums_are_of_each_mode_and_carry_no_gradient() -> None:
    mode = torch.tensor([2, 0, 1, 2])
    pair = torch.tensor([0, 0, 1, 3, 3, 2])
    value = torch.tensor([1.0, 2, 4, 8, 16, 32], requires_grad=True)
    found = sums_of_modes(mode, [(pair, value), (torch.arange(4), mode + 1)])
    assert found.tolist() == [[4.0, 32.0, 27.0], [1.0, 2.0, 6.0]]
    assert not found.requires_grad


def test_only_modes_that_masked_something_have_a_loss() -> None:
    mlm, recon = [0.0, 30.0, 8.0], [48.0, 0.0, 16.0]
    words, positions = [0.0, 10.0, 4.0], [3.0, 0.0, 2.0]
    sums = [*mlm, *recon, *words, *positions]
    row = mode_metrics(sums, patch_size=4, names=("mlm", "recon"))
    assert row == {
        "mlm_loss_text_heavy": 3.0,
        "mlm_loss_light": 2.0,
        "recon_loss_image_heavy": 1.0,
        "recon_loss_light": 0.5,
    }
    names = ("mlm", "recon")
    everything = mode_metrics([1.0] * 12, patch_size=1, names=names)
    assert set(everything) | {"psnr"} == set(MODE_METRIC_NAMES)
    assert len(everything) == 2 * len(Mode)


def test_psnr_is_of_the_error_of_a_channel() -> None:
    error = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) / 10
    expected = 10 * math.log10(1 / float(error.square().mean()))
    found = psnr(float(error.square().sum(1).mean()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert psnr(0.0) is None
