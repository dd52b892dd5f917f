"""A pretraining run on nodes that are preempted and come back, event by event.

Owns what the market does to nodes, what the run does about it, and where its time went.
Does not own averages over many runs and the choice of an interval
(`cluster.plan_sweep`), or running anything (`cluster.pretrain`). All times in seconds.

A node is preempted as a Poisson process while it is up, is told `notice_s` before it
goes (but for a share that goes at once), and its place is filled again after a delay.
That does not depend on the run, so runs of one seed see the same nodes come and go
whatever they do: differences between them are of what they do alone.

A run takes the largest valid number of nodes, starts, and trains with a checkpoint
every `interval_s`. Training stands still for the first `stall_s` of a checkpoint, which
exists `write_s` after it was begun. When a node is to go and a checkpoint fits into its
notice, the run stops, writes one and starts again without the node; otherwise it goes
on until the node is gone, and loses what no complete checkpoint holds. When enough
nodes have returned it stops, writes one and starts again with more. Every start costs
`restart_s`, the first one too, and a run ends with a checkpoint.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

NOTICE, DEATH, RETURN = 0, 1, 2
Phase = Literal["waiting", "starting", "training", "saving"]
# A run that takes this many times as long as an undisturbed one is given up.
_PATIENCE = 30
_DRAWS = 256


@dataclass(frozen=True, kw_only=True)
class Spot:
    """What happens to nodes."""

    rate: float
    """Preemptions of one node in an hour."""
    notice_s: float
    sudden: float = 0.0
    """Share of preemptions that come without notice."""
    return_s: float
    """Until another node is in its place: the mean, or always."""
    fixed_return: bool = False
    """Always `return_s`, rather than exponentially distributed."""

    def __post_init__(self) -> None:
        _at_least_zero(self, "rate", "notice_s", "return_s")
        if not 0 <= self.sudden <= 1:
            raise ValueError(f"sudden is {self.sudden}: a share, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be done, and what the run does about preemptions."""

    work_s: float
    """Training time on the largest number of nodes."""
    speeds: Mapping[int, float]
    """Valid numbers of nodes, and their speed as a share of the largest one's."""
    interval_s: float
    """Training time between two checkpoints."""
    stall_s: float
    write_s: float
    restart_s: float
    detect_s: float = 0.0
    """From a node's death until the run is stopped."""
    wait_s: float = 0.0
    """How long a start waits for the largest number of nodes before it takes fewer."""
    settle_s: float = 0.0
    """How long a run trains, at least, before it is stopped to take more nodes."""

    def __post_init__(self) -> None:
        if not self.speeds or min(self.speeds.values()) <= 0:
            raise ValueError("no number of nodes is valid, or one has no speed")
        if not (self.work_s > 0 and self.interval_s > 0):
            raise ValueError("work_s and interval_s must be above 0")
        _at_least_zero(self, "stall_s", "restart_s", "detect_s", "wait_s", "settle_s")
        if self.write_s < self.stall_s:
            raise ValueError(
                f"a checkpoint stops training for {self.stall_s:g} s but is written in "
                f"{self.write_s:g} s: the time to write it includes the stall"
            )

    @property
    def nodes(self) -> int:
        """The largest number of nodes."""
        return max(self.speeds)

    @property
    def period_s(self) -> float:
        """From one checkpoint to the next; one is not begun before the last exists."""
        return max(self.interval_s + self.stall_s, self.write_s)

    def undisturbed_s(self) -> float:
        """Wall time without preemptions."""
        checkpoints = _checkpoints_before(self.work_s, self.period_s - self.stall_s)
        stalls = checkpoints * self.stall_s
        return self.restart_s + self.work_s + stalls + self.write_s


class Event(NamedTuple):
    """Something that happens to the node in a place."""

    time: float
    kind: int
    place: int


class Trace:
    """Nodes of a seed coming and going: drawn as far as it is asked for, and kept."""

    def __init__(self, spot: Spot, *, nodes: int, seed: int) -> None:
        self.spot = spot
        self._drawn: list[Event] = []
        self._draws = [
            _exponentials(np.random.default_rng([seed, place]))
            for place in range(nodes)
        ]
        self._sudden = np.random.default_rng([seed, nodes, 1])
        self._next: list[Event] = []
        if spot.rate > 0:
            self._next = [self._preemption(place, 0.0) for place in range(nodes)]
        heapq.heapify(self._next)

    def event(self, number: int) -> Event:
        """The event of that number; events are in the order of time."""
        while len(self._drawn) <= number:
            if not self._next:
                return Event(math.inf, RETURN, 0)
            event = self._next[0]
            heapq.heapreplace(self._next, self._after(event))
            self._drawn.append(event)
        return self._drawn[number]

    def _preemption(self, place: int, up: float) -> Event:
        hours = next(self._draws[place]) / self.spot.rate
        return Event(up + 3600 * hours, NOTICE, place)

    def _after(self, event: Event) -> Event:
        time, kind, place = event
        if kind == RETURN:
            return self._preemption(place, time)
        if kind == DEATH:
            share = 1.0 if self.spot.fixed_return else next(self._draws[place])
            return Event(time + self.spot.return_s * share, RETURN, place)
        sudden = self.spot.sudden and self._sudden.random() < self.spot.sudden
        # Without notice a death follows at the same moment.
        return Event(time + (0 if sudden else self.spot.notice_s), DEATH, place)


class Span(NamedTuple):
    """A stretch of a run's time."""

    start_s: float
    end_s: float
    phase: Phase
    nodes: int
    """In use; 0 while it waits for nodes."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A run for those who want to look at it."""

    spans: list[Span] = field(default_factory=list)
    lost: list[tuple[float, float]] = field(default_factory=list)
    """From the last complete checkpoint to the death, of each loss of work."""
    alive: list[tuple[float, int]] = field(default_factory=list)
    """Nodes that are up, from that time on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the time of a run went; the parts add up to `wall_s`."""

    finished: bool
    """False: given up, after thirty times the undisturbed time."""
    wall_s: float
    useful_s: float
    """Training that was not lost."""
    lost_s: float
    """Training that was lost, and done again."""
    checkpoint_s: float
    """Training stood still for checkpoints, or stopped to write one."""
    restart_s: float
    """Starts, and deaths that had not been noticed yet."""
    waiting_s: float
    """For enough nodes."""
    node_s: float
    """Nodes that were up, whether in use or not, times seconds: what is paid for."""
    preemptions: int
    """Of all nodes."""
    losses: int
    """Deaths that cost work."""
    starts: int


def simulate(
    training: Training, trace: Trace, *, timeline: Timeline | None = None
) -> Outcome:
    """One run on nodes that come and go like those of `trace`, which must have at least
    `training.nodes` places; all nodes are there at first.
    """
    return _Run(training, trace, timeline).outcome()


class _GivenUp(Exception):
    """The run does not end."""


class _Run:
    """State of a simulated run: the clock, nodes, and work in the last checkpoint."""

    def __init__(
        self, training: Training, trace: Trace, timeline: Timeline | None
    ) -> None:
        self.training, self.trace, self.timeline = training, trace, timeline
        self.fits = training.write_s <= trace.spot.notice_s
        self.limit = _PATIENCE * training.undisturbed_s()
        self.now = 0.0
        self.seen = 0
        # Without those that have been told to go.
        self.available = set(range(training.nodes))
        self.alive = training.nodes
        self.largest = [
            max((n for n in training.speeds if n <= there), default=0)
            for there in range(training.nodes + 1)
        ]
        self.saved = 0.0
        self.spent = dict.fromkeys(("waiting", "starting", "training", "saving"), 0.0)
        self.stalled = self.lost = self.node_s = 0.0
        self.preemptions = self.losses = self.starts = 0
        self._note_alive()

    def outcome(self) -> Outcome:
        finished = True
        try:
            while self.saved < self.training.work_s:
                used = self._gather()
                if self._start(used):
                    self._train(used)
        except _GivenUp:
            finished = False
        trained = self.spent["training"] - self.stalled
        return Outcome(
            finished=finished,
            wall_s=self.now,
            useful_s=trained - self.lost,
            lost_s=self.lost,
            checkpoint_s=self.stalled + self.spent["saving"],
            restart_s=self.spent["starting"],
            waiting_s=self.spent["waiting"],
            node_s=self.node_s,
            preemptions=self.preemptions,
            losses=self.losses,
            starts=self.starts,
        )

    def _gather(self) -> frozenset[int]:
        """Wait for nodes; those to start on."""
        began, patience = self.now, self.now + self.training.wait_s
        while True:
            while self.trace.event(self.seen).time <= self.now:
                self._advance(math.inf, "waiting")
            nodes = self._valid()
            if nodes == self.training.nodes or (nodes and self.now >= patience):
                self._note(began, "waiting", 0)
                return frozenset(sorted(self.available)[:nodes])
            until = patience if self.now < patience else math.inf
            self._advance(until, "waiting")

    def _start(self, used: frozenset[int]) -> bool:
        """False: one of the nodes is to go, so that it was in vain."""
        self.starts += 1
        began, end = self.now, self.now + self.training.restart_s
        sound = True
        while sound and (event := self._advance(end, "starting")):
            sound = event.kind == RETURN or event.place not in used
        self._note(began, "starting", len(used))
        return sound

    def _train(self, used: frozenset[int]) -> None:
        """Train until the end, a preemption, or more nodes are there."""
        began, nodes = self.now, len(used)
        end = began + self._time_to_finish(nodes)
        gone = False
        while True:
            grows = self._valid() > nodes
            grow = max(self.now, began + self.training.settle_s) if grows else math.inf
            event = self._advance(min(end, grow), "training")
            if event is None:
                break
            if event.place in used and event.kind != RETURN:
                gone = event.kind == DEATH
                # Without notice the node is gone before a checkpoint is begun.
                if gone or self.fits:
                    break
        stopped = self.now
        self._note(began, "training", nodes)
        if gone or not self._save(used):
            self._lose(began, stopped, nodes)
            return
        trained, stalled = self._split(stopped - began)
        self.stalled += stalled
        self.saved += trained * self.training.speeds[nodes]
        if stopped >= end:
            self.saved = self.training.work_s

    def _save(self, used: frozenset[int]) -> bool:
        """Write a checkpoint. False: a node was gone before it existed."""
        began, end = self.now, self.now + self.training.write_s
        whole = True
        while whole and (event := self._advance(end, "saving")):
            whole = event.kind != DEATH or event.place not in used
        self._note(began, "saving", len(used))
        return whole

    def _lose(self, began: float, stopped: float, nodes: int) -> None:
        """Fall back to the last checkpoint that existed when the node was gone."""
        training, died = self.training, self.now
        period, stall = training.period_s, training.stall_s
        # Begun in time: a death after the stop comes before another would be written.
        written = math.floor((died - began + stall - training.write_s) / period)
        kept = max(0, written) * (period - stall)
        trained, stalled = self._split(stopped - began)
        self.stalled += stalled
        self.lost += trained - kept
        self.losses += trained > kept
        self.saved += kept * training.speeds[nodes]
        if self.timeline is not None and trained > kept:
            back = began + kept + math.floor(kept / (period - stall)) * stall
            self.timeline.lost.append((back, stopped))
        noticed = self.now + training.detect_s
        while self._advance(noticed, "starting"):
            pass
        self._note(died, "starting", nodes)

    def _split(self, elapsed: float) -> tuple[float, float]:
        """Seconds that an attempt trained, and that it stood still for checkpoints."""
        period, stall = self.training.period_s, self.training.stall_s
        whole, rest = divmod(elapsed, period)
        stalled = whole * stall + max(0.0, rest - (period - stall))
        return elapsed - stalled, stalled

    def _time_to_finish(self, nodes: int) -> float:
        left = (self.training.work_s - self.saved) / self.training.speeds[nodes]
        stall = self.training.stall_s
        return left + stall * _checkpoints_before(left, self.training.period_s - stall)

    def _valid(self) -> int:
        """The largest valid number of nodes that are there to stay; 0: none is."""
        return self.largest[len(self.available)]

    def _advance(self, until: float, phase: Phase) -> Event | None:
        """Let time pass until then, or until something happens to a node before it."""
        event = self.trace.event(self.seen)
        happens = event.time < until
        time = event.time if happens else until
        if time > self.limit:
            raise _GivenUp
        self.spent[phase] += time - self.now
        self.node_s += self.alive * (time - self.now)
        self.now = time
        if not happens:
            return None
        self.seen += 1
        if event.kind == NOTICE:
            self.available.discard(event.place)
            self.preemptions += 1
        elif event.kind == DEATH:
            self.alive -= 1
        else:
            self.available.add(event.place)
            self.alive += 1
        self._note_alive()
        return event

    def _note(self, began: float, phase: Phase, nodes: int) -> None:
        if self.timeline is not None and self.now > began:
            self.timeline.spans.append(Span(began, self.now, phase, nodes))

    def _note_alive(self) -> None:
        if self.timeline is not None:
            self.timeline.alive.append((self.now, self.alive))


def _checkpoints_before(trained: float, every: float) -> int:
    """Checkpoints on the way to that much training; the one at its end is another."""
    return max(0, math.ceil(trained / every - 1e-9) - 1)


def _exponentials(generator: np.random.Generator) -> Iterator[float]:
    """Draws of mean 1, the same ones however many are taken."""
    while True:
        yield from generator.exponential(size=_DRAWS).tolist()


def _at_least_zero(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be 0 or more")
