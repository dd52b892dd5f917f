"""Sample order: which samples every step of a run takes, for any step, in any order.

Owns steps: what they take of each lane, from one source or a mixture of several, and
how far ahead epochs are frozen. World size only says who reads which lanes. Does not
own lanes and windows (`trainer.lanes`), the draws of a mixture (`trainer.mixture`),
which shards an epoch covers (`trainer.epochs`), reading (`trainer.loader`) or valid
world sizes (`trainer.contract`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.epochs import Epochs, Frozen
from trainer.lanes import EpochLanes
from trainer.mixture import BLOCK, Mixture, shares
from trainer.philox import MAX_EPOCH, WINDOWS

# Epochs of a source in memory: the one that a lane is in and the next.
_EPOCHS_KEPT = 2
_WINDOWS_KEPT_PER_LANE = 2
# Samples after a damaged one that are looked at together, at most.
_LOOKED_AT = 256


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run draws from: shards of a dataset, in the order they were committed."""

    name: str
    shards: np.ndarray
    """(S,) what places call them."""
    counts: np.ndarray
    """(S,) samples of each."""
    weight: float = 1.0

    @classmethod
    def of(
        cls, counts: Sequence[int], *, name: str = "", weight: float = 1.0
    ) -> Source:
        """Shards 0..S-1 with these counts."""
        array = np.asarray(counts, dtype=np.int64)
        return cls(name=name, shards=np.arange(len(array)), counts=array, weight=weight)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """n samples of a step, lane by lane."""

    places: np.ndarray
    """(n, 2) int64 of (shard, sample)."""
    sources: np.ndarray
    """(n,) number of the source of each."""
    epochs: np.ndarray
    """(n,) epoch of its source."""
    positions: np.ndarray
    """(n,) position in its lane of that epoch."""
    lanes: np.ndarray
    """(n,) its lane."""

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, rows: slice) -> Drawn:
        """Some of them."""
        return Drawn(
            places=self.places[rows],
            sources=self.sources[rows],
            epochs=self.epochs[rows],
            positions=self.positions[rows],
            lanes=self.lanes[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Began:
    """Where the order starts to count: at another step than 0 after a change of data
    that the user allowed, with epochs that no earlier step has had.
    """

    step: int = 0
    epoch: int = 0


class SampleOrder:
    """Places of all samples of a run, for several threads at once.

    Args:
        sources: what to draw from; one, or a mixture by their weights.
        seed: of the run.
        lanes: L, segments an epoch of a source is cut into.
        global_batch: G, samples of a step over all ranks; L must divide it.
        shuffle_shards: shard pieces of a window.
        frozen: of each source, which shards its epochs cover; by default all of them.
        began: where to start to count.

    Raises:
        ValueError: L does not divide G, a source with fewer samples than an epoch needs
            or too little weight.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        lanes: int,
        global_batch: int,
        shuffle_shards: int,
        frozen: Sequence[Sequence[Frozen]] | None = None,
        began: Began | None = None,
    ) -> None:
        if lanes < 1 or global_batch < 1 or global_batch % lanes:
            raise ValueError(
                f"lanes {lanes} does not divide global_batch {global_batch}: choose "
                f"a multiple of {max(lanes, 1)} for global_batch"
            )
        self.sources = list(sources)
        self.seed, self.lanes, self.shuffle_shards = seed, lanes, shuffle_shards
        self.per_lane = global_batch // lanes
        self.began = began or Began()
        self.mixture = self._mixture()
        # Samples that a turn takes of every lane: the turns of an epoch are whole.
        self._turn = 1 if self.mixture else self.per_lane
        self.epochs = [
            self._table(number, frozen[number] if frozen else None)
            for number in range(len(self.sources))
        ]
        self._decided = [0] * len(self.sources)
        self._built: list[OrderedDict[int, EpochLanes]] = [
            OrderedDict() for _ in self.sources
        ]
        self._lanes_asked = 1
        self._lock = threading.RLock()

    def epoch_of(self, step: int) -> int:
        """Epoch that a step belongs to; of a mixture, that of the source which has had
        the fewest, where every lane has drawn each as often as its share says.
        """
        first = (step - self.began.step) * self.per_lane
        turns = [first // self._turn]
        if self.mixture:
            turns = [first * int(share) // BLOCK for share in self.mixture.per_block]
        each = zip(self.epochs, turns, strict=True)
        return min(table.at(turn)[0] for table, turn in each) + self.began.epoch

    def epoch_steps(self, step: int) -> tuple[int, int] | None:
        """(step within its epoch, steps of that epoch); None in a mixture, whose
        sources have epochs of their own.
        """
        if self.mixture:
            return None
        table = self.epochs[0]
        epoch, within = table.at(step - self.began.step)
        return within, table.turns(epoch)

    def samples_of(self, step: int, lanes: range) -> Drawn:
        """What `lanes` give to a step, lane by lane, `per_lane` samples each.

        Raises:
            ValueError: a step before the data was changed.
        """
        self._require_placed(step)
        first = (step - self.began.step) * self.per_lane
        with self._lock:
            self._lanes_asked = max(self._lanes_asked, len(lanes))
            if self.mixture is None:
                return self._of_one(first, lanes, 1)
            return self._of_mixture(self.mixture, first, lanes)

    def samples_ahead(self, step: int, lanes: range, *, most: int) -> Drawn:
        """What `lanes` give to the steps from `step` on, step by step: up to `most` of
        them, as many as lie in its epoch and are frozen, and at least that one.
        """
        most = max(min(most, self.undecided - step), 1)
        if self.mixture or most == 1:
            steps = range(step, step + most)
            return _joined([self.samples_of(one, lanes) for one in steps])
        self._require_placed(step)
        with self._lock:
            self._lanes_asked = max(self._lanes_asked, len(lanes))
            return self._of_one((step - self.began.step) * self.per_lane, lanes, most)

    def following(self, drawn: Drawn, row: int) -> Iterator[np.ndarray]:
        """Places (n, 2), some at a time, of the samples after a drawn one in its lane
        and epoch, cyclically, all but itself; then those of the lanes after it, each
        from half a lane further on: what stands for the samples of a lost lane is as
        many, and none that its own lane gives to the same step.
        """
        source, epoch = int(drawn.sources[row]), int(drawn.epochs[row])
        own, position = int(drawn.lanes[row]), int(drawn.positions[row])
        with self._lock:
            built = self.lanes_of(source, epoch)
        shards = self.sources[source].shards
        some = 1
        for number in range(self.lanes):
            lane = (own + number) % self.lanes
            length = built.length(lane)
            start, left = (position + 1, length - 1)
            if lane != own:
                start, left = position + length // 2, length
            while left:
                at = start % length
                count = min(some, left, length - at)
                with self._lock:
                    places = built.between(lane, at, at + count).astype(np.int64)
                places[:, 0] = shards[places[:, 0]]
                yield places
                start, left = start + count, left - count
                # The next is nearly always a sound one.
                some = min(2 * some, _LOOKED_AT)

    def shards_ahead(self, step: int, lanes: range, *, windows: int) -> list[int]:
        """Shards that `lanes` need from a step on, the first needed first: those of the
        windows that they are in, and of the next, `windows` of each source in all.
        """
        with self._lock:
            rounds = self._rounds_ahead(step, lanes, windows)
        longest = max(map(len, rounds))
        in_turn = (one[at] for at in range(longest) for one in rounds if at < len(one))
        return list(dict.fromkeys(in_turn))

    def _rounds_ahead(self, step: int, lanes: range, windows: int) -> list[list[int]]:
        """`shards_ahead` of every source and lane."""
        turns = self._turns_begun(step)
        rounds: list[list[int]] = []
        for number, table in enumerate(self.epochs):
            epoch, within = table.at(turns[number])
            built = self.lanes_of(number, epoch + self.began.epoch)
            start = within * self._turn
            ahead = [built.shards_ahead(lane, start, windows) for lane in lanes]
            if epoch < self._decided[number]:
                after = self.lanes_of(number, epoch + 1 + self.began.epoch)
                wanted = windows * self.shuffle_shards
                ahead = [
                    (found + after.shards_ahead(lane, 0, windows))[:wanted]
                    for lane, found in zip(lanes, ahead, strict=True)
                ]
            shards = self.sources[number].shards
            rounds += [shards[found].tolist() for found in ahead]
        return rounds

    @property
    def undecided(self) -> int:
        """First step that may need an epoch which is not frozen yet."""
        return min(map(self._undecided_step, range(len(self.sources))))

    def decide(self, sources: Mapping[int, tuple[Source, str]]) -> list[int]:
        """Freeze the next epoch of the sources that need it first: over all shards of a
        grown source in `sources`, which come with the hash of their records, else over
        as many as the epoch before. The sources that have grown.
        """
        step, larger = self.undecided, []
        for number, table in enumerate(self.epochs):
            if self._undecided_step(number) > step:
                continue
            epoch = self._decided[number] + 1
            grown = sources.get(number)
            if grown and len(grown[0].shards) > table.shards(epoch):
                source, records = grown
                self.sources[number] = source
                entries = table.grown(epoch, shards=len(source.shards), records=records)
                with self._lock:
                    self.epochs[number] = self._table(number, entries)
                    # Whoever has looked ahead has seen the epoch as it was.
                    first = epoch + self.began.epoch
                    built = self._built[number]
                    for stale in [key for key in built if key >= first]:
                        del built[stale]
                larger.append(number)
            self._decided[number] = epoch
        return larger

    def decided_before(self, step: int) -> None:
        """Take as frozen what a run that has taken `step` steps had frozen."""
        for number, table in enumerate(self.epochs):
            turn = max(table.frozen[-1].first, self._last_turn(number, step))
            self._decided[number] = table.at(turn)[0]

    def last_epoch(self, step: int) -> int:
        """The highest epoch of any source in the steps before `step`, in any lane."""
        if self.mixture is None:
            return self._highest_epoch(np.array([self._last_turn(0, step) + 1]))
        draws = (step - self.began.step) * self.per_lane
        drawn, most = self.mixture.bounds(draws)
        found, bound = self._highest_epoch(drawn), self._highest_epoch(most)
        if found == bound:
            return found
        # An epoch may begin between what every lane has drawn and what none can exceed:
        # look at one lane after another, until one has come to it.
        for of_lanes in self.mixture.drawn_before(range(self.lanes), draws):
            before, drawn = drawn, np.maximum(drawn, of_lanes.max(axis=0))
            if (drawn > before).any():
                found = self._highest_epoch(drawn)
                if found == bound:
                    break
        return found

    def decided(self, number: int) -> int:
        """Last epoch of a source that is frozen."""
        return self._decided[number]

    def share_of(self, number: int) -> float:
        """Share of a source in the run's draws."""
        return float(self.mixture.per_block[number]) / BLOCK if self.mixture else 1.0

    @property
    def beyond(self) -> int:
        """First step that may need a draw which the generator does not count up to."""
        first = min(
            self._step_of_epoch(number, MAX_EPOCH + 1 - self.began.epoch)
            for number in range(len(self.sources))
        )
        if self.mixture is None:
            return first
        return min(first, self.began.step + WINDOWS * BLOCK // self.per_lane)

    def _require_placed(self, step: int) -> None:
        if step < self.began.step:
            raise ValueError(
                f"step {step + 1} is one of the {self.began.step} that were taken "
                "before the run was told to go on with other data: only later ones "
                "can be worked out"
            )

    def _of_one(self, first: int, lanes: range, most: int) -> Drawn:
        """Of a single source: up to `most` steps, as many as its epoch has."""
        table = self.epochs[0]
        epoch, within = table.at(first // self.per_lane)
        number = epoch + self.began.epoch
        steps = min(most, table.turns(epoch) - within)
        start, per_lane = within * self.per_lane, self.per_lane
        stop = start + steps * per_lane
        built = self.lanes_of(0, number)
        found = np.concatenate([built.between(lane, start, stop) for lane in lanes])
        # Of every lane all steps; wanted is of every step all lanes.
        by_lane = found.reshape(len(lanes), steps, per_lane, 2)
        places = by_lane.swapaxes(0, 1).reshape(-1, 2).astype(np.int64)
        places[:, 0] = self.sources[0].shards[places[:, 0]]
        n = len(places)
        positions = np.arange(start, stop).reshape(steps, 1, per_lane)
        lane_of = np.repeat(np.arange(lanes.start, lanes.stop), per_lane)
        return Drawn(
            places=places,
            sources=np.zeros(n, dtype=np.int64),
            epochs=np.full(n, number, dtype=np.int64),
            positions=positions.repeat(len(lanes), axis=1).ravel(),
            lanes=np.tile(lane_of, steps),
        )

    def _of_mixture(self, mixture: Mixture, first: int, lanes: range) -> Drawn:
        mixture.blocks_kept = max(mixture.blocks_kept, 2 * len(lanes))
        drawn = [mixture.between(lane, first, first + self.per_lane) for lane in lanes]
        sources = np.concatenate([source for source, _ in drawn]).astype(np.int64)
        turns = np.concatenate([turn for _, turn in drawn])
        lane_of = np.repeat(np.arange(lanes.start, lanes.stop), self.per_lane)
        n = len(sources)
        places = np.empty((n, 2), dtype=np.int64)
        epochs, positions = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        for number in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == number)
            epoch, within = self.epochs[number].locate(turns[rows])
            epochs[rows], positions[rows] = epoch + self.began.epoch, within
        for row in range(n):
            built = self.lanes_of(int(sources[row]), int(epochs[row]))
            at = int(positions[row])
            places[row] = built.between(int(lane_of[row]), at, at + 1)[0]
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(sources == number)
            places[rows, 0] = source.shards[places[rows, 0]]
        return Drawn(
            places=places,
            sources=sources,
            epochs=epochs,
            positions=positions,
            lanes=lane_of,
        )

    def lanes_of(self, source: int, epoch: int) -> EpochLanes:
        """The lanes of a source in an epoch."""
        kept = self._built[source]
        windows = self._lanes_asked * _WINDOWS_KEPT_PER_LANE
        if epoch not in kept:
            shards = self.epochs[source].shards(epoch - self.began.epoch)
            kept[epoch] = EpochLanes(
                self.sources[source].counts[:shards],
                seed=self.seed,
                source=source,
                epoch=epoch,
                lanes=self.lanes,
                shuffle_shards=self.shuffle_shards,
                windows_kept=windows,
            )
            while len(kept) > self._epochs_kept(source, epoch):
                kept.popitem(last=False)
        kept.move_to_end(epoch)
        built = kept[epoch]
        built.windows_kept = max(built.windows_kept, windows)
        return built

    def _epochs_kept(self, source: int, epoch: int) -> int:
        """How many epochs of a source lanes may be in at once: within a block of a
        mixture one lane may be ahead of another by all draws of a small source. They
        hold no more samples than all lanes draw of it in a block, and take about 1 KB
        for each of their lanes: 100 MB where half of the draws of 192 lanes are of 192
        samples.
        """
        if self.mixture is None:
            return _EPOCHS_KEPT
        turns = self.epochs[source].turns(epoch - self.began.epoch)
        return _EPOCHS_KEPT + -(-int(self.mixture.per_block[source]) // turns)

    def _mixture(self) -> Mixture | None:
        if len(self.sources) == 1:
            return None
        weights = {source.name: source.weight for source in self.sources}
        return Mixture(
            shares(weights),
            seed=self.seed,
            epoch_base=self.began.epoch,
            blocks_kept=2,
        )

    def _table(self, number: int, frozen: Sequence[Frozen] | None) -> Epochs:
        source = self.sources[number]
        ends = np.cumsum(source.counts)

        def turns(shards: int) -> int:
            samples = int(ends[shards - 1]) if shards else 0
            return samples // (self._turn * self.lanes)

        whole = Frozen(first=0, shards=len(source.shards), records="")
        entries = list(frozen) if frozen else [whole]
        if not turns(entries[0].shards):
            raise ValueError(self._too_few(number, int(ends[-1]) if len(ends) else 0))
        return Epochs(entries, turns)

    def _too_few(self, number: int, samples: int) -> str:
        needed = self.lanes * self._turn
        if self.mixture:
            return (
                f"{samples} samples of source {self.sources[number].name!r} are fewer "
                f"than the {needed} lanes: lower lanes, or add data"
            )
        return (
            f"{samples} samples are fewer than one global batch of {needed}: lower "
            "global_batch (and lanes), or add data"
        )

    def _turns_begun(self, step: int) -> list[int]:
        """Of each source, a turn that every lane has reached at a step and none has
        passed by more than a block's share.
        """
        first = (step - self.began.step) * self.per_lane
        if self.mixture is None:
            return [first // self._turn]
        return [first // BLOCK * int(share) for share in self.mixture.per_block]

    def _last_turn(self, number: int, step: int) -> int:
        """Last turn of a source that the steps before `step` may have taken; below 0
        for none.
        """
        draws = (step - self.began.step) * self.per_lane
        if self.mixture is None:
            return draws // self._turn - 1
        return -(-draws // BLOCK) * int(self.mixture.per_block[number]) - 1

    def _highest_epoch(self, turns: np.ndarray) -> int:
        """The highest epoch of all sources, of which each has given so many turns."""
        last = np.maximum(turns - 1, 0).tolist()
        each = zip(self.epochs, last, strict=True)
        return max(table.at(turn)[0] for table, turn in each) + self.began.epoch

    def _undecided_step(self, number: int) -> int:
        """First step in which some lane may take a turn of the source's first epoch
        that is not frozen.
        """
        return self._step_of_epoch(number, self._decided[number] + 1)

    def _step_of_epoch(self, number: int, epoch: int) -> int:
        """First step in which some lane may take a turn of an epoch of a source."""
        turn = self.epochs[number].first_turn(epoch)
        if self.mixture is None:
            return self.began.step + turn
        block = turn // int(self.mixture.per_block[number])
        return self.began.step + block * BLOCK // self.per_lane


def _joined(parts: Sequence[Drawn]) -> Drawn:
    names = Drawn.__dataclass_fields__
    return Drawn(
        **{n: np.concatenate([getattr(part, n) for part in parts]) for n in names}
    )
