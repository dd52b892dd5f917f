from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.masking import MaskConfig, Masks, Mode, mam

P = 16


def draw(
    n_words: list[int],
    *,
    config: MaskConfig | None = None,
    seed: int = 3,
    epoch: int = 0,
    first_uid: int = 0,
    capacity: int | None = None,
    mode: Mode | None = None,
) -> Masks:
    count = torch.tensor(n_words)
    return mam(
        config or MaskConfig(),
        seed=seed,
        epoch=epoch,
        uids=torch.arange(first_uid, first_uid + len(n_words)) * 0x9E3779B97F4A7C1,
        n_text=count,
        text_capacity=capacity or max(n_words),
        n_image=P,
        mode=mode,
    )


def half_up(rate: float, count: int) -> int:
    wanted = int(np.floor(rate * count + 0.5))
    return max(wanted, 1) if rate > 0 and count > 0 else 0


def test_exact_counts_round_half_up_and_mask_at_least_one() -> None:
    n_words = [0, 1, 2, 3, 5, 10, 23, 50] * 40
    config = MaskConfig(light_text_rate=0.15, light_image_rate=0.2)
    masks = draw(n_words, config=config)
    seen = set()
    for row, count in enumerate(n_words):
        mode = int(masks.mode[row])
        seen.add(mode)
        text, image = config.text_rates[mode], config.image_rates[mode]
        assert int(masks.text[row].sum()) == half_up(text, count)
        assert int(masks.image[row].sum()) == half_up(image, P)
        assert not masks.text[row, count:].any()
    assert seen == set(Mode)


def test_modes_come_in_thirds_and_heavy_modes_leave_the_partner_clean() -> None:
    masks = draw([12] * 6000)
    share = torch.bincount(masks.mode, minlength=3) / 6000
    assert (share - 1 / 3).abs().max() < 0.03
    assert not masks.text[masks.mode == Mode.IMAGE_HEAVY].any()
    assert not masks.image[masks.mode == Mode.TEXT_HEAVY].any()


def test_mode_probabilities_are_obeyed() -> None:
    masks = draw([5] * 2000, config=MaskConfig(mode_probabilities=(0.0, 1.0, 0.0)))
    assert (masks.mode == Mode.TEXT_HEAVY).all()


@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_a_pair_is_masked_the_same_in_every_batch_and_capacity(count: str) -> None:
    config = MaskConfig(count=count)  # type: ignore[arg-type]
    n_words = [3, 20, 7, 11, 1, 16]
    whole = draw(n_words, config=config)
    for row, words in enumerate(n_words):
        alone = draw([words], config=config, first_uid=row, capacity=64)
        assert alone.mode[0] == whole.mode[row]
        assert torch.equal(alone.text[0, :20], whole.text[row])
        assert not alone.text[0, 20:].any()
        assert torch.equal(alone.image[0], whole.image[row])


def test_masks_change_with_seed_epoch_and_sample() -> None:
    base = draw([20] * 50).image
    for other in (
        draw([20] * 50, seed=4),
        draw([20] * 50, epoch=1),
        draw([20] * 50, first_uid=1000),
    ):
        assert not torch.equal(base, other.image)


def test_every_position_is_masked_equally_often() -> None:
    masks = draw([10] * 8000, mode=Mode.LIGHT)
    expected = half_up(0.15, 10) / 10
    assert (masks.text.float().mean(0) - expected).abs().max() < 0.02
    expected = half_up(0.15, P) / P
    assert (masks.image.float().mean(0) - expected).abs().max() < 0.02


def test_bernoulli_masks_at_the_rate_with_varying_counts() -> None:
    masks = draw(
        [30] * 3000, config=MaskConfig(count="bernoulli"), mode=Mode.TEXT_HEAVY
    )
    assert abs(float(masks.text.float().mean()) - 0.8) < 0.01
    assert len(set(masks.text.sum(1).tolist())) > 5


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="add up"):
        MaskConfig(mode_probabilities=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        MaskConfig(heavy_rate=1.5)


def test_masks_are_those_of_a_plain_reading_of_the_definition() -> None:
    """Python integers, one draw at a time: rank positions by (word 0, position)."""
    from trainer.philox import Use, philox

    config, seed, epoch, n_words = MaskConfig(), (5 << 33) + 9, 4, [9, 4, 14]
    masks = draw(n_words, config=config, seed=seed, epoch=epoch)
    for row, count in enumerate(n_words):
        uid = (row * 0x9E3779B97F4A7C1) % (1 << 64)

        def word(use: Use, index: int, uid: int = uid) -> int:
            counter = (index, (use << 24) | epoch, uid & 0xFFFFFFFF, uid >> 32)
            arrays = [np.array([value], dtype=np.int64) for value in counter]
            return int(philox(*arrays, seed & 0xFFFFFFFF, seed >> 32)[0][0])

        mode = min(int(word(Use.MODE, 0) / 2**32 * 3), 2)
        assert int(masks.mode[row]) == mode
        for use, size, rate, mask in (
            (Use.TEXT_MASK, count, config.text_rates[mode], masks.text[row]),
            (Use.IMAGE_MASK, P, config.image_rates[mode], masks.image[row]),
        ):
            ranked = sorted(range(size), key=lambda i, use=use: (word(use, i), i))
            expected = set(ranked[: half_up(rate, size)])
            assert set(mask.nonzero().flatten().tolist()) == expected
