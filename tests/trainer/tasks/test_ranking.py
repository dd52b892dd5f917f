"""Ranks are those of a naive loop, and ties never help a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from trainer.tasks.ranked_gallery import Ranked
from trainer.tasks.ranking import (
    Candidates,
    candidates,
    chance_recall,
    image_ranks,
    reranked,
    text_ranks,
)
from trainer.tasks.retrieval_examples import chosen

IMAGES = 300
GENERATOR = np.random.Generator(np.random.Philox(key=5))
OWNER = np.repeat(np.arange(IMAGES), GENERATOR.integers(1, 6, IMAGES))
# Few different values, so that there are many ties.
SCORES = GENERATOR.integers(0, 40, (IMAGES, len(OWNER))).astype(np.float32)


def naive_rank(scores: np.ndarray, right: np.ndarray) -> int:
    """Place of the best right target when wrong ones come first among equals."""
    order = sorted(range(len(scores)), key=lambda one: (-scores[one], right[one]))
    return next(place for place, one in enumerate(order) if right[one])


def test_ranks_agree_with_a_naive_loop_over_several_captions() -> None:
    by_image = [naive_rank(SCORES[n], n == OWNER) for n in range(IMAGES)]
    assert image_ranks(SCORES, OWNER).tolist() == by_image
    by_text = [
        naive_rank(SCORES[:, c], np.arange(IMAGES) == own)
        for c, own in enumerate(OWNER)
    ]
    assert text_ranks(SCORES, OWNER).tolist() == by_text


def test_a_model_that_says_the_same_of_everything_finds_nothing() -> None:
    same = np.zeros_like(SCORES)
    counts = np.bincount(OWNER)
    assert (image_ranks(same, OWNER) == len(OWNER) - counts).all()
    assert (text_ranks(same, OWNER) == IMAGES - 1).all()


def test_reranking_agrees_with_a_naive_loop_and_is_none_for_the_same_scores() -> None:
    scores = SCORES + 20 * (np.arange(IMAGES)[:, None] == OWNER)
    ranks = image_ranks(scores, OWNER)
    found = candidates(scores, np.arange(IMAGES), OWNER, k=16)
    assert 10 < np.count_nonzero(~found.right.any(1)) < IMAGES - 10
    own = np.take_along_axis(scores, found.target, 1)
    # Ties that the end of the list cut apart could count otherwise.
    whole = found.right.any(1) & (own[:, -1] < np.where(found.right, own, -1).max(1))
    assert whole.sum() > 10
    assert np.array_equal(reranked(ranks, found, own)[whole], ranks[whole])

    better = GENERATOR.integers(0, 9, found.target.shape).astype(np.float32)
    for query, rank in enumerate(reranked(ranks, found, better)):
        if found.right[query].any():
            assert rank == naive_rank(better[query], found.right[query])
        else:
            assert rank == ranks[query] >= 16


def test_candidates_are_the_best_in_a_fixed_order() -> None:
    found = candidates(SCORES.T, OWNER, np.arange(IMAGES), k=7)
    for text in range(0, len(OWNER), 37):
        order = sorted(range(IMAGES), key=lambda n: (-SCORES[n, text], n))
        assert found.target[text].tolist() == order[:7]
        assert found.right[text].tolist() == [n == OWNER[text] for n in order[:7]]
    assert candidates(SCORES, np.arange(IMAGES), OWNER, k=9999).target.shape == (
        SCORES.shape
    )


def test_chance_is_what_random_orders_give() -> None:
    n_right = np.array([1, 2, 5])
    draws = np.array([GENERATOR.permutation(30) for _ in range(40_000)])
    for k in (1, 5, 10, 28, 30):
        hit = [(draws[:, :right] < k).any(1).mean() for right in n_right]
        assert chance_recall(n_right, 30, k) == pytest.approx(np.mean(hit), abs=0.01)
    assert chance_recall(np.ones(5), 645, 1) == pytest.approx(1 / 645)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    broken = SCORES.copy()
    broken[3, 7] = bad
    for ranks in (image_ranks, text_ranks):
        with pytest.raises(ValueError, match=r"--optimizer\.lr"):
            ranks(broken, OWNER)
    found = Candidates(target=np.zeros((1, 1)), right=np.ones((1, 1), dtype=bool))
    with pytest.raises(ValueError, match="no numbers"):
        reranked(np.zeros(1), found, np.array([[bad]]))


def test_a_rank_depends_on_no_order_of_the_samples() -> None:
    order = GENERATOR.permutation(IMAGES)
    texts = np.array(
        list(itertools.chain.from_iterable(np.flatnonzero(n == OWNER) for n in order))
    )
    shuffled, counts = SCORES[order][:, texts], np.bincount(OWNER)[order]
    owner = np.repeat(np.arange(IMAGES), counts)
    assert np.array_equal(
        image_ranks(shuffled, owner), image_ranks(SCORES, OWNER)[order]
    )
    assert np.array_equal(text_ranks(shuffled, owner), text_ranks(SCORES, OWNER)[texts])


def test_only_queries_that_are_answered_rightly_are_shown_as_such() -> None:
    scores = np.array([[3.0, 1.0], [5.0, 4.0], [2.0, 1.5], [9.0, 0.0]])
    right = np.array([[True, False], [False, True], [True, False], [False, False]])
    ranked = Ranked(
        ranks=np.array([0, 1, 0, 7]),
        found=Candidates(target=np.zeros((4, 2), dtype=np.int64), right=right),
        scores=scores,
    )
    assert chosen(ranked, 3) == {"best": [0, 2], "worst": [3, 1], "near": []}
    nobody = replace(ranked, ranks=np.array([1, 1, 2, 7]))
    assert chosen(nobody, 2)["best"] == []
