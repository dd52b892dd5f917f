"""Ranks and recall of retrieval between images and their captions.

Owns how a rank is counted, candidates and re-ranking, and what chance would give. Does
not own scores (`trainer.tasks.retrieval`) or intervals (`trainer.tasks.results`).

Karpathy & Fei-Fei 2015, as everybody counts since: an image has several captions. Image
to text: the rank of an image is that of its best own caption among all captions. Text
to image: every caption asks by itself, and one image is right. Ranks count from 0, and
R@k is the share of queries with a rank below k.

Ties count against the model: what is wrong and scores as high as the right one stands
before it. So a caption or an image file that occurs with two samples is a mistake that
no model avoids, as in the published numbers. Of equal scores at the end of a list of
candidates those of lower number are taken.

Shapes: N images, C captions, Q queries, T targets, K candidates of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.tasks.numbers import require_numbers

RECALL_AT = (1, 5, 10)
# Queries that are compared with all targets at once.
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The first targets of every query, by some cheap score."""

    target: np.ndarray
    """(Q, K) int64, best first."""
    right: np.ndarray
    """(Q, K) bool: the target is one of the query's own."""


def image_ranks(scores_nc: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Rank (N,) of each image's best own caption among all captions.

    Args:
        scores_nc: (N, C), higher is better.
        owner: (C,) image of each caption, ascending, none left out.

    Raises:
        ValueError: a score that is no number.
    """
    require_numbers(scores_nc)
    starts = np.searchsorted(owner, np.arange(len(scores_nc) + 1))
    ranks = np.empty(len(scores_nc), dtype=np.int64)
    for first in range(0, len(scores_nc), _BLOCK):
        rows = range(first, min(first + _BLOCK, len(scores_nc)))
        own = [scores_nc[row, starts[row] : starts[row + 1]] for row in rows]
        best = np.array([one.max() for one in own])
        block = scores_nc[first : first + _BLOCK]
        ahead = np.count_nonzero(block >= best[:, None], axis=1)
        # Own captions are no mistakes.
        equal = [
            np.count_nonzero(one == top) for one, top in zip(own, best, strict=True)
        ]
        ranks[first : first + _BLOCK] = ahead - equal
    return ranks


def text_ranks(scores_nc: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Rank (C,) of each caption's own image among all images; arguments as above."""
    require_numbers(scores_nc)
    own = scores_nc[owner, np.arange(len(owner))]
    ranks = np.zeros(len(owner), dtype=np.int64)
    for first in range(0, len(scores_nc), _BLOCK):
        ranks += np.count_nonzero(scores_nc[first : first + _BLOCK] >= own, axis=0)
    return ranks - 1


def candidates(
    scores_qt: np.ndarray, own: np.ndarray, target_own: np.ndarray, *, k: int
) -> Candidates:
    """The `k` highest targets of every query, or all if there are fewer.

    Args:
        own: (Q,) what a query belongs to.
        target_own: (T,) what a target belongs to; where equal, the target is right.
    """
    k = min(k, scores_qt.shape[1])
    target = np.empty((len(scores_qt), k), dtype=np.int64)
    for first in range(0, len(scores_qt), _BLOCK):
        block = scores_qt[first : first + _BLOCK]
        order = np.argsort(-block, axis=1, kind="stable")
        target[first : first + _BLOCK] = order[:, :k]
    return Candidates(target=target, right=target_own[target] == own[:, None])


def reranked(
    first_ranks: np.ndarray, found: Candidates, scores_qk: np.ndarray
) -> np.ndarray:
    """Ranks (Q,) when the candidates are ordered by `scores_qk`, the others behind them
    as they were.

    Args:
        first_ranks: (Q,) ranks by the score that chose the candidates. A query none of
            whose own targets is among them keeps its rank: all of them were ahead.
    """
    require_numbers(scores_qk)
    best = np.where(found.right, scores_qk, -np.inf).max(1)
    ahead = np.count_nonzero((scores_qk >= best[:, None]) & ~found.right, axis=1)
    return np.where(found.right.any(1), ahead, first_ranks)


def chance_recall(n_right: np.ndarray, n_targets: int, k: int) -> float:
    """Expected R@k of an order drawn at random, with `n_right` (Q,) targets of each
    query right.
    """
    wrong = np.ones(len(n_right))
    for place in range(min(k, n_targets)):
        left = np.maximum(n_targets - n_right - place, 0)
        wrong *= left / (n_targets - place)
    return float(1 - wrong.mean())
