"""Paired comparisons of two rows of a table: over seeds, and over test items.

Owns Student's t, the paired t test, the paired bootstrap, how many seeds a difference
would take, and what of a claim a comparison says. Does not own which rows are compared
(`benchmarks.replication.matrix`) or drawing items again (`trainer.tasks.bootstrap`).

Shapes: N test items, S seeds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from trainer.tasks.bootstrap import RESAMPLES, percentiles, weights

Measure = Callable[[np.ndarray], float]
"""Weights of test items (N,) -> a value: what a model is worth on them."""
Says = Literal["higher", "lower", "same"]
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


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """The paired t test of values (S,) of the same seeds; None where all of them differ
    by the same, as coarse values do by chance: nothing is known of the spread.

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
    if error <= 1e-12 * max(1.0, abs(mean)):
        return None
    reach = student_t(0.05, n - 1) * error
    p = student_p(mean / error, n - 1)
    return Difference(mean, (mean - reach, mean + reach), p, n)


def paired_bootstrap(
    ours: Sequence[Measure],
    theirs: Sequence[Measure],
    groups: np.ndarray,
    *,
    seed: int = 0,
) -> Difference:
    """How much a row is above another one, mean over seeds, when the test items are
    drawn again: all seeds of both rows see the same draw.

    Args:
        ours: of each seed, the value for weights (N,): how often each item was drawn.
        theirs: likewise.
        groups: (N,); items of one value are drawn together.
    """

    def difference(taken: np.ndarray) -> float:
        mine, other = (
            float(np.mean([measure(taken) for measure in row]))
            for row in (ours, theirs)
        )
        return mine - other

    drawn = weights(groups, seed, RESAMPLES)
    found = np.array([difference(taken) for taken in drawn])
    # A draw without any positive item says nothing.
    found = found[~np.isnan(found)]
    low, high = percentiles(found)
    tail = min(np.mean(found <= 0), np.mean(found >= 0))
    return Difference(
        difference(np.ones(len(groups))),
        (low, high),
        float(min(max(2 * tail, 1 / RESAMPLES), 1.0)),
        len(groups),
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
        return "not enough seeds to tell: there is no spread to judge by"
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
