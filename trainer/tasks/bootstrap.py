"""Percentile bootstrap: how far a number would move on other data of the same kind.

Owns resampling, of groups as a whole (pairs of one item are no independent evidence).
Does not own what is measured (each task).

Efron & Tibshirani, "An introduction to the bootstrap", 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class OneGroup(NamedTuple):
    """There is no interval: one of no width would say that all is certain."""

    why: str = "all examples are of one group, which says nothing of others"


Interval = list[float] | OneGroup


def interval(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """[low, high], the 95 % percentile interval; `OneGroup` where there is one group,
    of which every resample is the same.

    Args:
        statistic: of weights (N,), how often each of N rows was taken; nan where a
            resample has none, which is left out.
        groups: (N,) rows with equal values are taken together.
    """
    if len(np.unique(groups)) < 2:
        return OneGroup()
    values = np.array([statistic(taken) for taken in weights(groups, seed, resamples)])
    return percentiles(values)


def mean_interval(
    values: np.ndarray, groups: np.ndarray, *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """The same of the mean of `values` (N,)."""
    values = np.asarray(values, dtype=np.float64)
    return interval(
        lambda taken: float(taken @ values / taken.sum()),
        groups,
        seed=seed,
        resamples=resamples,
    )


def weights(groups: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row (N,) is taken, of every resample: the same for the same
    groups and seed, so that two models are compared on the same resamples.
    """
    _, group = np.unique(groups, return_inverse=True)
    n_groups = int(group.max()) + 1
    generator = np.random.Generator(np.random.Philox(key=seed))
    even = np.full(n_groups, 1 / n_groups)
    for _ in range(resamples):
        yield generator.multinomial(n_groups, even).astype(np.float64)[group]


def percentiles(values: np.ndarray) -> list[float]:
    """[low, high] of the values of all resamples."""
    known = values[~np.isnan(values)]
    if not len(known):
        return [float("nan"), float("nan")]
    low, high = np.percentile(known, [2.5, 97.5])
    return [float(low), float(high)]
