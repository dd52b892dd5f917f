from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.masks import UID, P, draw, half_up
from trainer.mask_config import MaskConfig, MaskSchedule, Mode
from trainer.masking import Masks, mam, mam_counts

rates = st.floats(0, 1)
EVERYTHING = MaskConfig(
    count="bernoulli", image_block=3, keep_share=0.1, random_share=0.1
)


@st.composite
def configs(pick: st.DrawFn) -> MaskConfig:
    """Any setting of the masks, at any step."""
    light_start = pick(st.floats(0, 2))
    highest = min(1.0, 1 / light_start) if light_start else 1.0
    light = st.floats(0, highest * 0.999)
    heavy, image = pick(rates), pick(rates)
    config = MaskConfig(
        policy=pick(st.sampled_from(["mam", "uniform", "text_only", "image_only"])),
        mode_probabilities=pick(st.sampled_from([(1 / 3,) * 3, (0.1, 0.2, 0.7)])),
        heavy_rate=pick(rates),
        heavy_text_rate=pick(st.sampled_from([None, heavy])),
        heavy_image_rate=pick(st.sampled_from([None, image])),
        light_text_rate=pick(light),
        light_image_rate=pick(light),
        uniform_rate=pick(light),
        count=pick(st.sampled_from(["exact", "bernoulli"])),
        image_block=pick(st.integers(1, 5)),
        keep_share=pick(st.sampled_from([0.0, 0.1])),
        random_share=pick(st.sampled_from([0.0, 0.1])),
        schedule=MaskSchedule(
            steps=10, heavy_start=pick(rates), light_start=light_start
        ),
    )
    return config.at(pick(st.integers(0, 12)))


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


@pytest.mark.parametrize("block", [1, 2, 3])
def test_masks_are_those_of_a_plain_reading_of_the_definition(block: int) -> None:
    """Python integers, one draw at a time: rank positions, or blocks of them, by (word
    0, number).
    """
    from trainer.philox import Use, philox

    config = MaskConfig(image_block=block)
    seed, epoch, n_words = (5 << 33) + 9, 4, [9, 4, 14]
    masks = draw(n_words, config=config, seed=seed, epoch=epoch)
    for row, count in enumerate(n_words):
        uid = (row * UID) % (1 << 64)

        def word(use: Use, index: int, uid: int = uid) -> int:
            counter = (index, (use << 24) | epoch, uid & 0xFFFFFFFF, uid >> 32)
            arrays = [np.array([value], dtype=np.int64) for value in counter]
            return int(philox(*arrays, seed & 0xFFFFFFFF, seed >> 32)[0][0])

        mode = min(int(word(Use.MODE, 0) / 2**32 * 3), 2)
        assert int(masks.mode[row]) == mode
        across = -(-4 // block)
        blocks = [y // block * across + x // block for y in range(4) for x in range(4)]
        words = list(range(count))
        for use, of_position, rate, mask in (
            (Use.TEXT_MASK, words, config.text_rates[mode], masks.text[row]),
            (Use.IMAGE_MASK, blocks, config.image_rates[mode], masks.image[row]),
        ):
            numbers = sorted(set(of_position))
            ranked = sorted(numbers, key=lambda i, use=use: (word(use, i), i))
            chosen = set(ranked[: half_up(rate, len(numbers))])
            expected = {n for n, each in enumerate(of_position) if each in chosen}
            assert set(mask.nonzero().flatten().tolist()) == expected


@settings(max_examples=80, deadline=None)
@given(
    config=configs(),
    n_words=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    grid=st.integers(1, 7),
    seed=st.integers(0, (1 << 64) - 1),
    own_epochs=st.booleans(),
)
def test_counting_says_what_is_masked_whatever_the_setting(
    config: MaskConfig, n_words: list[int], grid: int, seed: int, own_epochs: bool
) -> None:
    arguments = {
        "seed": seed,
        "epoch": torch.arange(len(n_words)) if own_epochs else 7,
        "uids": torch.arange(1, len(n_words) + 1) * UID,
        "n_text": torch.tensor(n_words),
        "text_capacity": 48,
        "n_image": grid**2,
    }
    counts = mam_counts(config, **arguments)  # type: ignore[arg-type]
    masks = mam(config, **arguments)  # type: ignore[arg-type]
    assert torch.equal(counts.text, masks.text.sum(1))
    assert torch.equal(counts.image, masks.image.sum(1))


@pytest.mark.parametrize(("grid", "block"), [(6, 2), (5, 2), (7, 3), (4, 4), (5, 5)])
def test_blocks_are_masked_whole_and_their_number_is_exact(
    grid: int, block: int
) -> None:
    config = MaskConfig(image_block=block)
    masks = draw([4] * 90, config=config, n_image=grid**2)
    assert set(masks.mode.tolist()) == set(Mode)
    starts = range(0, grid, block)
    image = masks.image.unflatten(1, (grid, grid))
    for row, mode in enumerate(masks.mode.tolist()):
        tiles = [
            image[row, y : y + block, x : x + block].flatten()
            for y in starts
            for x in starts
        ]
        assert all(tile.all() or not tile.any() for tile in tiles)
        masked = sum(bool(tile.any()) for tile in tiles)
        assert masked == half_up(config.image_rates[mode], len(tiles))


def test_every_block_is_masked_equally_often() -> None:
    config = MaskConfig(image_block=2, light_image_rate=0.25)
    masks = draw([4] * 4000, config=config, mode=Mode.LIGHT)
    assert (masks.image.float().mean(0) - 0.25).abs().max() < 0.03


def test_bernoulli_tosses_a_coin_for_each_block() -> None:
    config = MaskConfig(image_block=2, count="bernoulli", light_image_rate=0.4)
    masks = draw([4] * 3000, config=config, mode=Mode.LIGHT)
    assert abs(float(masks.image.float().mean()) - 0.4) < 0.02
    assert set(masks.image.sum(1).tolist()) == {0, 4, 8, 12, 16}


@pytest.mark.parametrize("config", [MaskConfig(), EVERYTHING])
def test_no_value_is_needed_on_the_host(config: MaskConfig) -> None:
    """On the meta device there are no values, only shapes."""
    words = torch.full((5,), 9, device="meta")
    masks = mam(
        config,
        seed=3,
        epoch=words,
        uids=words,
        n_text=words,
        text_capacity=16,
        n_image=49,
    )
    assert (masks.text.shape, masks.image.shape) == ((5, 16), (5, 49))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [MaskConfig(), EVERYTHING])
def test_on_a_gpu_masks_are_those_of_the_host(config: MaskConfig) -> None:
    def masks(device: str) -> Masks:
        return mam(
            config,
            seed=(5 << 33) + 9,
            epoch=torch.arange(64, device=device),
            uids=torch.arange(64, device=device) * UID,
            n_text=torch.arange(64, device=device) % 41,
            text_capacity=48,
            n_image=49,
        )

    host, device = masks("cpu"), masks("cuda")
    for name in ("mode", "text", "image"):
        assert torch.equal(getattr(host, name), getattr(device, name).cpu())
    assert (host.replacement is None) == (device.replacement is None)
    for mine, theirs in zip(
        host.replacement or (), device.replacement or (), strict=True
    ):
        assert torch.equal(mine, theirs.cpu())
