from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trainer.masks import P, draw, half_up
from trainer.mask_config import MaskConfig, MaskSchedule, Mode


@pytest.mark.parametrize("policy", ["uniform", "text_only", "image_only"])
def test_a_baseline_masks_every_pair_alike_at_one_rate(policy: str) -> None:
    config = MaskConfig(policy=policy, uniform_rate=0.3)  # type: ignore[arg-type]
    n_words = list(range(1, 31))
    masks = draw(n_words, config=config)
    assert (masks.mode == Mode.LIGHT).all()
    text = [half_up(0.3, count) for count in n_words]
    image = [half_up(0.3, P)] * len(n_words)
    nothing = [0] * len(n_words)
    assert masks.text.sum(1).tolist() == (nothing if policy == "image_only" else text)
    assert masks.image.sum(1).tolist() == (nothing if policy == "text_only" else image)


@pytest.mark.parametrize("policy", ["mam", "uniform", "text_only", "image_only"])
def test_evaluation_in_a_mode_masks_the_same_whatever_policy_trained(
    policy: str,
) -> None:
    config = MaskConfig(policy=policy)  # type: ignore[arg-type]
    for mode in (Mode.TEXT_HEAVY, Mode.IMAGE_HEAVY):
        plain = draw([9, 20], mode=mode)
        asked = draw([9, 20], config=config, mode=mode)
        assert torch.equal(plain.text, asked.text)
        assert torch.equal(plain.image, asked.image)


def test_heavy_rates_of_text_and_image_can_differ() -> None:
    config = MaskConfig(heavy_text_rate=0.5, heavy_image_rate=0.75)
    assert config.text_rates == (0.0, 0.5, 0.15)
    assert config.image_rates == (0.75, 0.0, 0.15)
    assert MaskConfig(heavy_rate=0.6, heavy_text_rate=0.0).text_rates[1] == 0.0
    assert MaskConfig(heavy_rate=0.6, heavy_text_rate=0.0).image_rates[0] == 0.6


def test_scheduled_rates_go_linearly_from_their_start_to_their_values() -> None:
    schedule = MaskSchedule(steps=8, heavy_start=0.5, light_start=2.0)
    config = MaskConfig(heavy_text_rate=0.4, schedule=schedule)
    for step, heavy, light in ((0, 0.5, 2.0), (4, 0.75, 1.5), (6, 0.875, 1.25)):
        now = config.at(step)
        assert now.text_rates == pytest.approx((0, 0.4 * heavy, 0.15 * light))
        assert now.image_rates == pytest.approx((0.8 * heavy, 0, 0.15 * light))
        baseline = dataclasses.replace(config, policy="uniform").at(step)
        assert baseline.image_rates[Mode.LIGHT] == pytest.approx(0.15 * light)
    for step in (8, 9, 1_000_000):
        assert config.at(step).text_rates == config.text_rates
        assert config.at(step).image_rates == config.image_rates


def test_a_schedule_changes_how_many_positions_are_masked_and_nothing_else() -> None:
    config = MaskConfig(schedule=MaskSchedule(steps=10, heavy_start=0.25))
    words = [20] * 60
    first, last = (draw(words, config=config.at(step)) for step in (0, 10))
    assert torch.equal(first.mode, last.mode)
    heavy = first.mode == Mode.TEXT_HEAVY
    assert heavy.any()
    assert (first.text[heavy].sum(1) == half_up(0.2, 20)).all()
    assert (last.text[heavy].sum(1) == half_up(0.8, 20)).all()
    # What is masked early stays masked: the draws are the same.
    assert (first.text <= last.text).all()
    light = first.mode == Mode.LIGHT
    assert torch.equal(first.text[light], last.text[light])
    assert torch.equal(last.text, draw(words).text)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="add up"):
        MaskConfig(mode_probabilities=(0.5, 0.5, 0.5))
    for wrong in ({"heavy_rate": 1.5}, {"uniform_rate": -0.1}, {"keep_share": 2.0}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            MaskConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 1"):
        MaskConfig(keep_share=0.6, random_share=0.6)
    with pytest.raises(ValueError, match="1 or more"):
        MaskConfig(image_block=0)
    with pytest.raises(ValueError, match="over how many steps"):
        MaskSchedule(heavy_start=0.5)
    with pytest.raises(ValueError, match=r"takes mask\.heavy_text_rate to 1\.2"):
        MaskConfig(schedule=MaskSchedule(steps=3, heavy_start=1.5))
