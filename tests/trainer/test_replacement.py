from __future__ import annotations

import torch

from tests.trainer.masks import UID, draw
from trainer.mask_config import MaskConfig, Mode
from trainer.philox import Use, philox
from trainer.replacement import random_words

BERT = MaskConfig(keep_share=0.1, random_share=0.1)
SPECIAL = (0, 3, 4, 9, 29)


def test_one_word_in_ten_is_kept_and_one_in_ten_is_swapped() -> None:
    masks = draw([40] * 1500, config=BERT, mode=Mode.TEXT_HEAVY)
    assert masks.replacement is not None
    kept, swapped, _ = masks.replacement
    assert not (kept & swapped).any()
    assert (kept | swapped <= masks.text).all()
    words = masks.text.sum()
    # 48,000 words: five standard deviations.
    assert abs(float(kept.sum() / words) - 0.1) < 0.007
    assert abs(float(swapped.sum() / words) - 0.1) < 0.007


def test_replacing_changes_no_mask_and_is_off_by_default() -> None:
    plain, replaced = draw([12, 30, 7]), draw([12, 30, 7], config=BERT)
    assert torch.equal(plain.text, replaced.text)
    assert torch.equal(plain.image, replaced.image)
    assert plain.replacement is None
    assert replaced.replacement is not None


def test_shares_of_all_and_nothing_are_obeyed() -> None:
    keep = draw([30] * 20, config=MaskConfig(keep_share=1.0))
    swap = draw([30] * 20, config=MaskConfig(random_share=1.0))
    assert keep.replacement is not None
    assert swap.replacement is not None
    assert torch.equal(keep.replacement.kept, keep.text)
    assert not keep.replacement.swapped.any()
    assert torch.equal(swap.replacement.swapped, swap.text)
    assert not swap.replacement.kept.any()


def test_a_pair_is_replaced_the_same_in_every_batch_and_capacity() -> None:
    words = [3, 20, 7, 11]
    config = MaskConfig(keep_share=0.4, random_share=0.4)
    whole = draw(words, config=config, mode=Mode.TEXT_HEAVY).replacement
    assert whole is not None
    for row, count in enumerate(words):
        alone = draw(
            [count], config=config, first_uid=row, capacity=64, mode=Mode.TEXT_HEAVY
        ).replacement
        assert alone is not None
        for mine, theirs in zip(alone, whole, strict=True):
            assert torch.equal(mine[0, :20], theirs[row])


def test_replacements_are_those_of_a_plain_reading_of_the_definition() -> None:
    """Python integers: word 0 of the draw is the coin, word 1 the other word."""
    seed, epoch, words = (5 << 33) + 9, 4, [9, 14]
    config = MaskConfig(keep_share=0.25, random_share=0.5)
    masks = draw(words, config=config, seed=seed, epoch=epoch, mode=Mode.TEXT_HEAVY)
    assert masks.replacement is not None
    for row, count in enumerate(words):
        uid = (row * UID) % (1 << 64)
        for place in range(count):
            counter = (place, (Use.REPLACEMENT << 24) | epoch, uid & 0xFFFFFFFF)
            arrays = [torch.tensor([n]) for n in (*counter, uid >> 32)]
            drawn = philox(*arrays, seed & 0xFFFFFFFF, seed >> 32)
            coin, word = int(drawn[0]), int(drawn[1])
            masked = bool(masks.text[row, place])
            kept, swapped, words_drawn = (
                part[row, place] for part in masks.replacement
            )
            assert bool(kept) == (masked and coin < 1 << 30)
            assert bool(swapped) == (masked and 1 << 30 <= coin < 3 << 30)
            assert int(words_drawn) == word


def test_random_words_are_every_word_alike_and_never_special() -> None:
    size = 30
    draws = torch.arange(0, 1 << 32, (1 << 32) // 50_000)
    ids = random_words(draws, size, SPECIAL)
    share = torch.bincount(ids, minlength=size) / len(ids)
    assert len(share) == size
    ordinary = [number for number in range(size) if number not in SPECIAL]
    assert (share[list(SPECIAL)] == 0).all()
    assert (share[ordinary] - 1 / len(ordinary)).abs().max() < 1e-3
