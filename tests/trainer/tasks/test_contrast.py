"""What stands against a pair in fine-tuning is never its own match."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.tasks.contrast import contrastive_loss, drawn_negatives, strangers

PAIRS = 600
NUMBER = torch.arange(PAIRS)
# Every sixth pair shares its sample, image or caption with the one before.
UIDS = torch.where(NUMBER % 6 == 1, NUMBER - 1, NUMBER) * 0x9E3779B97F4A7C1
IMAGES = torch.where(NUMBER % 6 == 3, NUMBER - 1, NUMBER)
CAPTIONS = torch.where(NUMBER % 6 == 5, NUMBER - 1, NUMBER)[:, None].expand(-1, 3)
STRANGE = strangers(UIDS, IMAGES, CAPTIONS)
GENERATOR = torch.Generator().manual_seed(1)
SIMILARITY = torch.randn(PAIRS, PAIRS, generator=GENERATOR) * 3


def alike(a: int, b: int) -> bool:
    return bool(
        UIDS[a] == UIDS[b]
        or IMAGES[a] == IMAGES[b]
        or (CAPTIONS[a] == CAPTIONS[b]).all()
    )


def negatives(hard: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn_negatives(
        SIMILARITY,
        STRANGE,
        hard=hard,
        seed=seed,
        epochs=torch.zeros_like(UIDS),
        uids=NUMBER,
    )


def test_pairs_that_share_something_are_no_strangers() -> None:
    for a in range(12):
        for b in range(12):
            assert bool(STRANGE[a, b]) != alike(a, b)


@pytest.mark.parametrize("hard", [0.0, 0.5, 1.0])
def test_a_negative_is_a_stranger_in_both_directions(hard: float) -> None:
    for chosen in negatives(hard):
        assert bool(STRANGE[NUMBER, chosen].all())


def test_hard_ones_are_drawn_by_similarity_and_the_others_evenly() -> None:
    def mean(hard: float) -> tuple[float, float]:
        text, image = negatives(hard)
        of_text, of_image = SIMILARITY[NUMBER, text], SIMILARITY[image, NUMBER]
        return float(of_text.mean()), float(of_image.mean())

    # A softmax of normal scores of deviation 3 moves their mean up by 9.
    for even, half, hard in zip(mean(0.0), mean(0.5), mean(1.0), strict=True):
        assert abs(even) < 0.5
        assert 0.35 < half / hard < 0.65
        assert hard > 5
    assert not torch.equal(negatives(0.5)[0], negatives(0.5, seed=1)[0])


def test_a_pair_without_strangers_keeps_itself() -> None:
    nobody = torch.zeros(4, 4, dtype=torch.bool)
    nobody[0, 1] = nobody[1, 0] = True
    text, image = drawn_negatives(
        torch.randn(4, 4, generator=GENERATOR),
        nobody,
        hard=1.0,
        seed=0,
        epochs=torch.zeros(4, dtype=torch.int64),
        uids=torch.arange(4),
    )
    assert text.tolist() == [1, 0, 2, 3]
    assert image.tolist() == [1, 0, 2, 3]


def test_the_contrastive_loss_is_that_of_a_loop_over_strangers() -> None:
    scores, strange = SIMILARITY[:12, :12], STRANGE[:12, :12]
    total = 0.0
    for pair in range(12):
        others = [n for n in range(12) if n == pair or strange[pair, n]]
        for way in (scores[pair], scores[:, pair]):
            rest = sum(math.exp(float(way[n])) for n in others)
            total -= float(way[pair]) - math.log(rest)
    assert float(contrastive_loss(scores, strange)) == pytest.approx(total / 24, 1e-5)
