"""Sample order: which sample stands where in which step, for any step of any epoch.

Owns lanes, windows and the steps of an epoch, as a pure function of (per-shard counts,
seed, lanes, window). World size only says who reads which lanes. Does not own reading
(`trainer.loader`) or valid world sizes (`trainer.contract`).

An epoch lays the shards end to end in a Philox permutation, rotates that line, cuts it
into L segments equal to within one sample, and shuffles every `shuffle_shards`
consecutive shard pieces of a segment as one window.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.philox import Use, draw, permutation

_WINDOWS_KEPT_PER_LANE = 2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive samples [start, stop) of one shard."""

    shard: int
    start: int
    stop: int


class SampleOrder:
    """Places of all samples of a dataset, epoch by epoch.

    Args:
        counts: samples of each shard.
        seed: of the run.
        lanes: L, segments an epoch is cut into.
        global_batch: G, samples of a step over all ranks; L must divide it.
        shuffle_shards: shard pieces of a window.

    Raises:
        ValueError: fewer samples than one global batch, or L does not divide G.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        seed: int,
        lanes: int,
        global_batch: int,
        shuffle_shards: int,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        if lanes < 1 or global_batch < 1 or global_batch % lanes:
            raise ValueError(
                f"lanes {lanes} does not divide global_batch {global_batch}: choose "
                f"a multiple of {max(lanes, 1)} for global_batch"
            )
        if self.samples < global_batch:
            raise ValueError(
                f"{self.samples} samples are fewer than one global batch of "
                f"{global_batch}: lower global_batch (and lanes), or add data"
            )
        self.seed = seed
        self.lanes = lanes
        self.per_lane = global_batch // lanes
        self.shuffle_shards = shuffle_shards
        self.steps_per_epoch = self.samples // global_batch
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray, int]]
        self._epochs = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def samples_of(self, step: int, lanes: range) -> np.ndarray:
        """Places (len(lanes) * per_lane, 2) of (shard, sample) that `lanes` give to a
        step of the run, lane by lane.
        """
        epoch, within = self.epoch_of(step)
        first = within * self.per_lane
        places = [
            self.lane_samples(epoch, lane, first, first + self.per_lane)
            for lane in lanes
        ]
        return np.concatenate(places)

    def lane_samples(self, epoch: int, lane: int, start: int, stop: int) -> np.ndarray:
        """Places (stop - start, 2) of a lane's samples [start, stop) of an epoch."""
        found, begin = [], 0
        for number, window in enumerate(self._lane_windows(epoch, lane)):
            size = sum(piece.stop - piece.start for piece in window)
            lo, hi = max(start, begin) - begin, min(stop, begin + size) - begin
            if lo < hi:
                found.append(self._window(epoch, lane, number, window)[lo:hi])
            begin += size
            if begin >= stop:
                break
        return np.concatenate(found)

    def lane_length(self, lane: int) -> int:
        """Samples of a lane in every epoch, those that no step takes included."""
        first, last = lane * self.samples, (lane + 1) * self.samples
        return last // self.lanes - first // self.lanes

    def lane_pieces(self, epoch: int, lane: int) -> list[Piece]:
        """The shard pieces of a lane's segment, in line order."""
        order, ends, rotation = self._line(epoch)
        begin = lane * self.samples // self.lanes + rotation
        length = self.lane_length(lane)
        position = begin % self.samples
        pieces = []
        while length:
            slot = bisect.bisect_right(ends, position)
            shard = int(order[slot])
            first = position - int(ends[slot] - self.counts[shard])
            size = min(length, int(self.counts[shard]) - first)
            pieces.append(Piece(shard=shard, start=first, stop=first + size))
            position = (position + size) % self.samples
            length -= size
        return pieces

    def _lane_windows(self, epoch: int, lane: int) -> list[list[Piece]]:
        pieces = self.lane_pieces(epoch, lane)
        step = self.shuffle_shards
        return [pieces[i : i + step] for i in range(0, len(pieces), step)]

    def _window(
        self, epoch: int, lane: int, number: int, pieces: list[Piece]
    ) -> np.ndarray:
        key = (epoch, lane, number)
        if key not in self._windows:
            places = np.concatenate(
                [
                    np.stack(
                        [
                            np.full(piece.stop - piece.start, piece.shard),
                            np.arange(piece.start, piece.stop),
                        ],
                        axis=1,
                    )
                    for piece in pieces
                ]
            )
            mixed = permutation(
                len(places),
                seed=self.seed,
                use=Use.WINDOW,
                epoch=epoch,
                place=(lane << 32) | number,
            )
            self._windows[key] = places[mixed]
            while len(self._windows) > self.lanes * _WINDOWS_KEPT_PER_LANE:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Shard permutation, its prefix sums and the rotation of an epoch."""
        if epoch not in self._epochs:
            order = permutation(
                len(self.counts),
                seed=self.seed,
                use=Use.SHARD_ORDER,
                epoch=epoch,
                place=0,
            )
            zero = np.zeros(1, dtype=np.int64)
            words = draw(
                seed=self.seed, use=Use.ROTATION, epoch=epoch, uid=zero, index=zero
            )
            # 63 bits, because a dataset may hold more than 2^31 samples.
            rotation = (
                (int(words[0][0]) << 31) | (int(words[1][0]) >> 1)
            ) % self.samples
            self._epochs[epoch] = (order, np.cumsum(self.counts[order]), rotation)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
