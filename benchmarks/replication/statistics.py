"""Paired comparisons of two rows of a table: over seeds, and over test items.

Owns Student's t, the paired t test, the paired bootstrap, how many seeds a difference
would take, and what of a claim a comparison says. Does not own which rows are compared
(`benchmarks.replication.matrix`). Needs only numpy: scipy is no requirement.

Shapes: N test items, R resamples, S seeds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Predictions of the items (N, ...) and how often each counts (R, N) -> values (R,)."""
Says = Literal["higher", "lower", "same"]
_RESAMPLES = 2000
# Memory: items times resamples that are worked on at once.
_AT_ONCE = 4_000_000
_MOST_SEEDS = 100


class Difference(NamedTuple):
    """How much a row has above another one, and what chance could have done."""

    mean: float
    ci95: tuple[float, float]
    p: float
    """Two-sided, of no difference."""
    n: int
    """Seeds, or test items."""


def student_p(t: float, dof: int) -> float:
    """Two-sided p value of Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4, which are exact.

    Raises:
        ValueError: no degree of freedom.
    """
    if dof < 1:
        raise ValueError(
            "Student's t needs a degree of freedom: give two seeds or more"
        )
    if math.isinf(t):
        return 0.0
    angle = math.atan2(abs(t), math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, dof - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        rest = sine * total if dof > 1 else 0.0
        inside = 2 / math.pi * (angle + rest)
    else:
        inside = sine * total
    return min(max(1.0 - inside, 0.0), 1.0)


def student_t(p: float, dof: int) -> float:
    """The t whose two-sided p value is `p`."""
    low, high = 0.0, 1.0
    while student_p(high, dof) > p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, dof) > p else (low, middle)
    return high


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The paired t test of values (S,) of the same seeds.

    Raises:
        ValueError: other numbers of seeds, or fewer than two.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            f"a paired t test needs two seeds or more, the same of both rows: there "
            f"are {len(ours)} and {len(theirs)}"
        )
    differences = np.subtract(ours, theirs)
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    # Equal to the last digit, or by chance.
    if error <= 1e-12 * max(1.0, abs(mean)):
        certain = 0.0 if abs(mean) > 1e-12 else 1.0
        return Difference(mean, (mean, mean), certain, n)
    reach = student_t(0.05, n - 1) * error
    p = student_p(mean / error, n - 1)
    return Difference(mean, (mean - reach, mean + reach), p, n)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means (R,) of values (N,)."""
    return weights @ values / weights.sum(1)


def average_precision(scored: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """PR AUC (R,) of items with a score and a label, (N, 2); items of one score enter
    together. 0 where no item is positive.
    """
    order = np.argsort(-scored[:, 0], kind="stable")
    scores, labels = scored[order].T
    weights = weights[:, order]
    last = np.append(scores[1:] != scores[:-1], True)
    true = np.cumsum(weights * labels, 1)[:, last]
    precision = true / np.maximum(np.cumsum(weights, 1)[:, last], 1e-12)
    gained = np.diff(true, axis=1, prepend=0)
    return (gained * precision).sum(1) / np.maximum(true[:, -1], 1e-12)


def paired_bootstrap(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    statistic: Statistic,
    *,
    groups: np.ndarray,
    seed: int = 0,
) -> Difference:
    """How much `statistic` of one row is above that of another, mean over seeds, when
    the test items are drawn again; both rows of all seeds see the same items.

    Args:
        ours: predictions (N, ...) of each seed, the items in one order.
        theirs: likewise.
        groups: (N,); items of one value are drawn together.

    Raises:
        ValueError: the predictions are not of the same items.
    """
    if len({len(one) for one in (*ours, *theirs, groups)}) != 1:
        raise ValueError("rows are compared over the same test items: theirs differ")
    _, group = np.unique(groups, return_inverse=True)
    n_groups, n = int(group.max()) + 1, len(group)
    generator = np.random.Generator(np.random.Philox(key=seed))
    even = np.full(n_groups, 1 / n_groups)

    def difference(weights: np.ndarray) -> np.ndarray:
        return sum(statistic(one, weights) for one in ours) / len(ours) - sum(
            statistic(one, weights) for one in theirs
        ) / len(theirs)

    drawn = []
    at_once = max(_AT_ONCE // n, 1)
    for first in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - first)
        taken = generator.multinomial(n_groups, even, size=count)
        drawn.append(difference(taken[:, group].astype(np.float64)))
    found = np.concatenate(drawn)
    low, high = np.percentile(found, [2.5, 97.5])
    tail = min(float(np.mean(found <= 0)), float(np.mean(found >= 0)))
    return Difference(
        float(difference(np.ones((1, n)))[0]),
        (float(low), float(high)),
        min(max(2 * tail, 1 / _RESAMPLES), 1.0),
        n,
    )


def seeds_needed(ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """About how many seeds would tell a difference of the size and spread seen, in four
    of five replications; None: more than a hundred.
    """
    differences = np.subtract(ours, theirs)
    mean, spread = abs(float(differences.mean())), float(differences.std(ddof=1))

    def enough(n: int) -> bool:
        reach = student_t(0.05, n - 1) + student_t(0.4, n - 1)
        return reach * spread / math.sqrt(n) <= mean

    found = bisect.bisect_left(range(2, _MOST_SEEDS + 1), True, key=enough)
    return found + 2 if found + 2 <= _MOST_SEEDS else None


def verdict(
    says: Says,
    *,
    margin: float,
    seeds: Difference | None,
    items: Difference | None,
    needed: int | None = None,
) -> str:
    """What a comparison says of the claim that a row is higher than another one, lower,
    or within `margin` of it. Both intervals, over seeds and, where there is one, over
    test items, must agree for an answer.
    """
    if seeds is None:
        return "not enough seeds to tell: a spread takes two or more"
    if says == "same":
        return _same(margin, seeds, items)
    if _holds_zero(seeds):
        more = f" (about {needed} would, if this difference is real)" if needed else ""
        return f"not enough seeds to tell{more}"
    if items is not None and (_holds_zero(items) or items.mean * seeds.mean < 0):
        return "not enough test items to tell"
    return "agrees" if (seeds.mean > 0) == (says == "higher") else "disagrees"


def _same(margin: float, seeds: Difference, items: Difference | None) -> str:
    if all(-margin <= edge <= margin for edge in seeds.ci95):
        return f"agrees: within {margin:g}"
    apart = abs(seeds.mean) > margin and not _holds_zero(seeds)
    if apart and (items is None or not _holds_zero(items)):
        return "disagrees: they differ"
    return f"not enough seeds to tell whether it is within {margin:g}"


def _holds_zero(difference: Difference) -> bool:
    low, high = difference.ci95
    return low <= 0 <= high
