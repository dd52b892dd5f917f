"""Mixtures: which source each draw of a lane takes.

Owns blocks of 1,000 draws, as a pure function of (weights, seed, lane, block). Does not
own what a source gives (`trainer.lanes`), its epochs (`trainer.epochs`) or where the
weights come from (`trainer.sources`).

In each lane every block of 1,000 draws holds each source's exact share, by largest
remainder, in a Philox order of its own: so any draw is found in O(1,000), and after any
whole block every lane has taken the same number of samples from each source.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np

from trainer.philox import Use, permutations, place_of

BLOCK = 1_000
# Blocks that are mixed together: their draws stay in a core's cache.
_LANES_AT_ONCE = 8


def shares(weights: Mapping[str, float]) -> np.ndarray:
    """Draws (K,) that each source has of every block: the largest-remainder rounding
    of weight / sum of weights x 1,000; equal remainders in the sources' order.

    Raises:
        ValueError: a source that would never be drawn.
    """
    exact = np.array(list(weights.values()), dtype=np.float64)
    exact = exact / exact.sum() * BLOCK
    whole = np.floor(exact).astype(np.int64)
    missing = BLOCK - int(whole.sum())
    by_remainder = np.argsort(-(exact - whole), kind="stable")
    whole[by_remainder[:missing]] += 1
    for name, share in zip(weights, whole.tolist(), strict=True):
        if not share:
            raise ValueError(
                f"source {name!r} has a share below one in {BLOCK:,} draws and would "
                "never be drawn: give it more weight, or 0 to leave it out"
            )
    return whole


class Mixture:
    """Draws of every lane.

    Args:
        per_block: (K,) draws of a block that each source has; they add up to 1,000.
        epoch_base: tells the blocks of one part of a run from those of another.
        blocks_kept: blocks that stay in memory, 6 bytes a draw.
    """

    def __init__(
        self, per_block: np.ndarray, *, seed: int, epoch_base: int, blocks_kept: int
    ) -> None:
        self.per_block = per_block
        self.blocks_kept = blocks_kept
        self._seed, self._epoch_base = seed, epoch_base
        self._starts = np.cumsum(per_block) - per_block
        self._sources = np.repeat(np.arange(len(per_block), dtype=np.int32), per_block)
        self._blocks: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
        self._blocks = OrderedDict()

    def between(
        self, lane: int, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For draws [start, stop) of a lane: their sources (n,), and how many draws of
        that source the lane made before each (n,).
        """
        found = []
        while start < stop:
            block, first = divmod(start, BLOCK)
            last = min(first + stop - start, BLOCK)
            source, turn = self._block(lane, block)
            chosen = source[first:last]
            turns = turn[first:last] + block * self.per_block[chosen]
            found.append((chosen, turns))
            start += last - first
        if len(found) == 1:
            return found[0]
        sources, turns_of = zip(*found, strict=True)
        return np.concatenate(sources), np.concatenate(turns_of)

    def bounds(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and (K,): of each source at least and at most so many are among the
        first `draws` of any lane.
        """
        block, within = divmod(draws, BLOCK)
        before = block * self.per_block
        fewest = np.maximum(within - (BLOCK - self.per_block), 0)
        return before + fewest, before + np.minimum(within, self.per_block)

    def drawn_before(self, lanes: range, draws: int) -> Iterator[np.ndarray]:
        """(n, K) for some lanes after others: how many of the first `draws` of each are
        of each source. Takes 0.1 ms a lane.
        """
        block, within = divmod(draws, BLOCK)
        sources = len(self.per_block)
        for first in range(0, len(lanes), _LANES_AT_ONCE):
            part = lanes[first : first + _LANES_AT_ONCE]
            n = len(part)
            begun = self._mixed(part, block)[:, :within]
            own = begun + sources * np.arange(n)[:, None]
            counts = np.bincount(own.ravel(), minlength=n * sources)
            yield block * self.per_block + counts.reshape(n, sources)

    def _mixed(self, lanes: range, block: int) -> np.ndarray:
        """Source (n, 1000) of each draw of a block of some lanes."""
        places = [place_of(source=0, lane=lane, window=block) for lane in lanes]
        mixed = permutations(
            BLOCK,
            seed=self._seed,
            use=Use.MIXTURE,
            epoch=self._epoch_base,
            places=np.array(places, dtype=np.int64),
        )
        return self._sources[mixed]

    def _block(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each draw of a block, and its number among its source's in it."""
        key = (lane, block)
        if key not in self._blocks:
            source = self._mixed(range(lane, lane + 1), block)[0]
            turn = np.empty(BLOCK, dtype=np.int64)
            by_source = np.argsort(source, kind="stable")
            turn[by_source] = np.arange(BLOCK) - self._starts[source[by_source]]
            self._blocks[key] = source, turn
            while len(self._blocks) > self.blocks_kept:
                self._blocks.popitem(last=False)
        return self._blocks[key]
