"""Epochs of one source: how many of its shards each covers, and where each begins.

Owns the table of frozen prefixes. A dataset may grow while a run trains on it: an epoch
covers the shards that were committed when it was frozen, so the run is a pure function
of this table. Does not own when an epoch is frozen (`trainer.order`) or what a prefix
is checked by (`trainer.data_state`).

A turn is what a source gives at once: a step of a run with one source, a draw of each
lane in a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """From turn `first` on, epochs cover the first `shards` shards of the source."""

    first: int
    shards: int
    records: str
    """Hash of their records in the manifest."""


class Epochs:
    """The table, in order of turns.

    Args:
        frozen: at least one entry, the first of turn 0, each at the end of an epoch.
        turns: turns of an epoch that covers so many shards.
    """

    def __init__(self, frozen: Sequence[Frozen], turns: Callable[[int], int]) -> None:
        self.frozen = tuple(frozen)
        self._turns_of = turns
        self._firsts = np.array([entry.first for entry in frozen], dtype=np.int64)
        lengths = [turns(entry.shards) for entry in frozen]
        self._lengths = np.array(lengths, dtype=np.int64)
        whole = -(-np.diff(self._firsts) // self._lengths[:-1])
        self._bases = np.concatenate([[0], np.cumsum(whole)]).astype(np.int64)

    def locate(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and turn within it (n,) of turns (n,)."""
        entry = np.searchsorted(self._firsts, turns, side="right") - 1
        epochs, within = np.divmod(turns - self._firsts[entry], self._lengths[entry])
        return epochs + self._bases[entry], within

    def at(self, turn: int) -> tuple[int, int]:
        """Epoch and turn within it of one turn."""
        epochs, within = self.locate(np.array([turn]))
        return int(epochs[0]), int(within[0])

    def shards(self, epoch: int) -> int:
        """Shards that an epoch covers."""
        entry = int(np.searchsorted(self._bases, epoch, side="right")) - 1
        return self.frozen[entry].shards

    def first_turn(self, epoch: int) -> int:
        """Turn at which an epoch begins."""
        entry = int(np.searchsorted(self._bases, epoch, side="right")) - 1
        beyond = epoch - int(self._bases[entry])
        return int(self._firsts[entry]) + beyond * int(self._lengths[entry])

    def turns(self, epoch: int) -> int:
        """Turns of an epoch."""
        return self._turns_of(self.shards(epoch))

    def grown(self, epoch: int, *, shards: int, records: str) -> list[Frozen]:
        """The entries of the table in which epochs from `epoch` on, none of them begun,
        cover more.
        """
        first = self.first_turn(epoch)
        kept = [entry for entry in self.frozen if entry.first < first]
        return [*kept, Frozen(first=first, shards=shards, records=records)]
