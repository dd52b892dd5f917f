"""Many simulated runs: what is to be expected, and how often to write a checkpoint.

Owns averages with their confidence, the intervals that are tried, and the formula of
Young and Daly. Does not own one run (`cluster.preemption`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.preemption import Outcome, Spot, Trace, Training, simulate

# Two-sided 95 % of a normal distribution.
_Z = 1.96
_FEWEST = 10
_COARSE, _FINE = 2.0**0.5, 2.0**0.125
# Intervals that cost no more than this beyond the best one are as good.
ALIKE = 0.01


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over runs, and its 95 % confidence interval (normal approximation)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is to be expected of a run. Shares are of the wall time."""

    interval_s: float
    runs: int
    unfinished: int
    """Runs given up, which are in no mean: the true ones are larger then."""
    wall_s: Mean
    wall_90_s: float
    """Nine of ten runs take less."""
    lost_share: Mean
    restart_share: Mean
    checkpoint_share: Mean
    waiting_share: Mean
    node_s: Mean
    preemptions: Mean
    losses: Mean
    starts: Mean


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The same runs with different intervals between checkpoints."""

    points: tuple[Expected, ...]
    """From the shortest interval to the longest."""
    given: Expected
    """With the interval that the training had."""
    best: Expected
    alike_s: tuple[float, float]
    """Intervals tried between which a run takes at most 1 % longer than the best."""
    young_daly_s: float | None
    """What the formula says; None where no preemption loses work."""


def traces(spot: Spot, *, nodes: int, runs: int, seed: int) -> list[Trace]:
    """Nodes that come and go, for so many runs.

    Raises:
        ValueError: too few runs for a confidence interval.
    """
    if runs < _FEWEST:
        raise ValueError(f"{runs} simulated runs say little: take {_FEWEST} or more")
    return [
        Trace(spot, nodes=nodes, seed=seed * 1_000_003 + number)
        for number in range(runs)
    ]


def expected(training: Training, seen: Sequence[Trace]) -> Expected:
    """Averages over one run on each of the traces."""
    outcomes = [simulate(training, trace) for trace in seen]
    ended = [one for one in outcomes if one.finished]

    def mean(figure: Callable[[Outcome], float]) -> Mean:
        return _mean([figure(one) for one in ended])

    walls = sorted(one.wall_s for one in ended)
    return Expected(
        interval_s=training.interval_s,
        runs=len(outcomes),
        unfinished=len(outcomes) - len(ended),
        wall_s=mean(lambda one: one.wall_s),
        wall_90_s=walls[math.ceil(0.9 * len(walls)) - 1] if walls else math.inf,
        lost_share=mean(lambda one: one.lost_s / one.wall_s),
        restart_share=mean(lambda one: one.restart_s / one.wall_s),
        checkpoint_share=mean(lambda one: one.checkpoint_s / one.wall_s),
        waiting_share=mean(lambda one: one.waiting_s / one.wall_s),
        node_s=mean(lambda one: one.node_s),
        preemptions=mean(lambda one: one.preemptions),
        losses=mean(lambda one: one.losses),
        starts=mean(lambda one: one.starts),
    )


def sweep(
    training: Training, seen: Sequence[Trace], *, shortest_s: float, longest_s: float
) -> Sweep:
    """Try the given interval, and others from the shortest to the longest, closer
    together around the best.

    Every interval meets the same nodes, so that even small differences are not chance.
    """
    done: dict[float, Expected] = {}

    def look(intervals: Sequence[float]) -> None:
        for one in intervals:
            if one not in done:
                tried = dataclasses.replace(training, interval_s=one)
                done[one] = expected(tried, seen)

    look([training.interval_s, *_steps(shortest_s, longest_s, _COARSE)])
    best = _best(done)
    around = max(shortest_s, best / _COARSE), min(longest_s, best * _COARSE)
    look(_steps(*around, _FINE))
    best = _best(done)
    most = done[best].wall_s.mean * (1 + ALIKE)
    alike = [one for one, found in done.items() if _wall(found) <= most]
    return Sweep(
        points=tuple(done[one] for one in sorted(done)),
        given=done[training.interval_s],
        best=done[best],
        alike_s=(min(alike, default=best), max(alike, default=best)),
        young_daly_s=young_daly_s(training, seen[0].spot),
    )


def young_daly_s(training: Training, spot: Spot) -> float | None:
    """sqrt(2 x stall x MTBF): the best interval, to first order, where work is only
    lost and never saved in time. What is saved by notice is therefore not counted
    among the failures; None where there are none.
    """
    share = spot.sudden if training.write_s <= spot.notice_s else 1.0
    failures = spot.rate * training.nodes * share
    return math.sqrt(2 * training.stall_s * 3600 / failures) if failures else None


def _best(done: Mapping[float, Expected]) -> float:
    return min(done, key=lambda one: (done[one].unfinished, _wall(done[one])))


def _wall(found: Expected) -> float:
    return found.wall_s.mean


def _steps(low: float, high: float, factor: float) -> list[float]:
    """From low to high, both included, about that factor apart."""
    if high <= low:
        return [low]
    count = math.ceil(math.log(high / low) / math.log(factor))
    inner = [low * (high / low) ** (number / count) for number in range(1, count)]
    return [low, *inner, high]


def _mean(values: Sequence[float]) -> Mean:
    if not values:
        return Mean(mean=math.inf, low=math.inf, high=math.inf)
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else 0.0
    return Mean(mean=mean, low=mean - _Z * spread, high=mean + _Z * spread)
