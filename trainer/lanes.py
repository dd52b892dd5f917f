"""Lanes and windows of one source in one epoch.

Owns which sample stands at which position of which lane, as a pure function of (counts
of the epoch's shards, seed, source, epoch, lanes, window). Does not own which epoch a
step belongs to (`trainer.epochs`), which source a draw takes (`trainer.mixture`) or
what a step is (`trainer.order`).

An epoch lays the shards end to end in a Philox permutation, rotates that line, cuts it
into L segments equal to within one sample, and shuffles every `shuffle_shards`
consecutive shard pieces of a segment as one window.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from trainer.philox import Use, draw, permutation, place_of


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Consecutive samples [start, stop) of each of P shards, in line order, and where
    the windows made of them end (W,), counted in samples of the lane.
    """

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    window_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


class EpochLanes:
    """All lanes of an epoch; what was worked out last is kept.

    Args:
        counts: (S,) samples of each shard that the epoch covers.
        source: number of the source in the run.
        windows_kept: shuffled windows that stay in memory, 8 bytes a sample.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        seed: int,
        source: int,
        epoch: int,
        lanes: int,
        shuffle_shards: int,
        windows_kept: int,
    ) -> None:
        self._counts = counts
        self._seed, self._source, self._epoch = seed, source, epoch
        self._lanes, self._shuffle_shards = lanes, shuffle_shards
        self.windows_kept = windows_kept
        self._order = permutation(
            len(counts),
            seed=seed,
            use=Use.SHARD_ORDER,
            epoch=epoch,
            place=place_of(source=source),
        )
        self._ends = np.cumsum(counts[self._order])
        self.samples = int(self._ends[-1])
        self._rotation = self._drawn_rotation()
        self._pieces: OrderedDict[int, Pieces] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def length(self, lane: int) -> int:
        """Samples of a lane, those that no step takes included."""
        first, last = lane * self.samples, (lane + 1) * self.samples
        return last // self._lanes - first // self._lanes

    def between(self, lane: int, start: int, stop: int) -> np.ndarray:
        """(shard, sample) at positions [start, stop) of a lane: (stop - start, 2)."""
        ends = self.pieces(lane).window_ends
        window = int(np.searchsorted(ends, start, side="right"))
        found = []
        while start < stop:
            begin = int(ends[window - 1]) if window else 0
            last = min(stop, int(ends[window]))
            found.append(self._window(lane, window)[start - begin : last - begin])
            start, window = last, window + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def shards_ahead(self, lane: int, start: int, windows: int) -> list[int]:
        """Shards of the window at position `start` of a lane and of those after it,
        `windows` in all, in the order in which they are needed.
        """
        pieces = self.pieces(lane)
        window = int(np.searchsorted(pieces.window_ends, start, side="right"))
        first = window * self._shuffle_shards
        return pieces.shard[first : first + windows * self._shuffle_shards].tolist()

    def pieces(self, lane: int) -> Pieces:
        """The shard pieces of a lane's segment, in line order."""
        if lane not in self._pieces:
            self._pieces[lane] = self._cut(lane)
            while len(self._pieces) > self.windows_kept:
                self._pieces.popitem(last=False)
        return self._pieces[lane]

    def _cut(self, lane: int) -> Pieces:
        length = self.length(lane)
        begin = (lane * self.samples // self._lanes + self._rotation) % self.samples
        beyond = begin + length - self.samples
        first = int(np.searchsorted(self._ends, begin, side="right"))
        if beyond <= 0:
            last = self._slot(begin + length - 1)
            slots = np.arange(first, last + 1)
        else:
            slots = np.concatenate(
                [
                    np.arange(first, len(self._ends)),
                    np.arange(self._slot(beyond - 1) + 1),
                ]
            )
        shard = self._order[slots]
        start, stop = np.zeros_like(shard), self._counts[shard].copy()
        start[0] = begin - (int(self._ends[first]) - stop[0])
        stop[-1] -= int((stop - start).sum()) - length
        kept = stop > start
        shard, start, stop = shard[kept], start[kept], stop[kept]
        ends = np.cumsum(stop - start)
        every = self._shuffle_shards
        last_of_window = np.arange(every - 1, len(ends) + every - 1, every)
        window_ends = ends[np.minimum(last_of_window, len(ends) - 1)]
        return Pieces(shard=shard, start=start, stop=stop, window_ends=window_ends)

    def _slot(self, position: int) -> int:
        return int(np.searchsorted(self._ends, position, side="right"))

    def _window(self, lane: int, number: int) -> np.ndarray:
        """Shuffled (shard, sample) of a window, int32."""
        key = (lane, number)
        if key in self._windows:
            return self._windows[key]
        pieces = self.pieces(lane)
        first = number * self._shuffle_shards
        rows = slice(first, first + self._shuffle_shards)
        start, sizes = pieces.start[rows], (pieces.stop - pieces.start)[rows]
        places = np.empty((int(sizes.sum()), 2), dtype=np.int32)
        places[:, 0] = np.repeat(pieces.shard[rows], sizes)
        begins = np.cumsum(sizes) - sizes
        places[:, 1] = np.arange(len(places)) + np.repeat(start - begins, sizes)
        mixed = permutation(
            len(places),
            seed=self._seed,
            use=Use.WINDOW,
            epoch=self._epoch,
            place=place_of(source=self._source, lane=lane, window=number),
        )
        self._windows[key] = places[mixed]
        while len(self._windows) > self.windows_kept:
            self._windows.popitem(last=False)
        return self._windows[key]

    def _drawn_rotation(self) -> int:
        zero = np.zeros(1, dtype=np.int64)
        uid = zero + place_of(source=self._source)
        words = draw(
            seed=self._seed, use=Use.ROTATION, epoch=self._epoch, uid=uid, index=zero
        )
        # 63 bits, because a dataset may hold more than 2^31 samples.
        return ((int(words[0][0]) << 31) | (int(words[1][0]) >> 1)) % self.samples
