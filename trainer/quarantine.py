"""Samples that cannot be read any more, and from which step on.

Owns the list that a checkpoint carries beside its data state, and how much of a dataset
may be on it. Does not own how damage is found (`trainer.dataset`) or which sample takes
the place of a damaged one (`trainer.loader`): that is a pure function of this list.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

_SHARDS_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One damaged sample."""

    uid: str
    """16 hex digits."""
    epoch: int
    step: int
    """Of the run, from 0: the first whose batch had needed it."""
    reason: str
    """missing, truncated, crc, captions or undecodable."""
    shard: str
    """Name of its tar."""


class Quarantine:
    """The list, for several threads at once.

    Args:
        samples: of the dataset.
        max_share: of them that may be quarantined.
        entries: those of an earlier part of the run.
        what: they are called where there are too many.
    """

    def __init__(
        self,
        samples: int,
        *,
        max_share: float,
        entries: Iterable[Quarantined] = (),
        what: str = "samples",
    ) -> None:
        self._max_share, self._what = max_share, what
        self.resize(samples)
        self._entries = {int(entry.uid, 16): entry for entry in entries}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def resize(self, samples: int) -> None:
        """The dataset has so many samples by now."""
        # As the share is written: 100 x 0.29 is below 29 in binary.
        self._samples = samples
        self._most = int(samples * Fraction(str(self._max_share)))

    def holds(self, uid: int, step: int) -> bool:
        """Is a sample quarantined in a step?"""
        entry = self._entries.get(uid)
        return entry is not None and entry.step <= step

    def add(self, entries: Iterable[Quarantined]) -> None:
        """Put samples on the list; of two entries of one sample the earlier stays."""
        with self._lock:
            for entry in entries:
                uid = int(entry.uid, 16)
                known = self._entries.get(uid)
                if known is None or entry.step < known.step:
                    self._entries[uid] = entry

    def check(self, step: int) -> None:
        """Whether the run bears what is damaged in the steps up to `step`. Those after
        it do not count: ranks that have shared their lists come to the same answer,
        however far ahead each has read.

        Raises:
            ValueError: more of the dataset is damaged than the run was told to bear.
                The message names the shards.
        """
        damaged = self.until(step + 1)
        if len(damaged) > self._most:
            raise ValueError(self._too_many(damaged))

    def until(self, step: int) -> list[Quarantined]:
        """Entries of the steps before `step`, oldest first."""
        with self._lock:
            entries = [one for one in self._entries.values() if one.step < step]
        return sorted(entries, key=lambda one: (one.step, one.uid))

    def where(self) -> str:
        """Shards with damage, the most damaged first, and what it is."""
        with self._lock:
            damaged = list(self._entries.values())
        return _where(damaged)

    def _too_many(self, damaged: Sequence[Quarantined]) -> str:
        return (
            f"{len(damaged)} of {self._samples} {self._what} are damaged, more than "
            f"the {self._most} that damage.max_share bears: {_where(damaged)}"
        )


def _where(damaged: Sequence[Quarantined]) -> str:
    shards = Counter(entry.shard for entry in damaged).most_common()
    named = ", ".join(f"{name} ({count})" for name, count in shards[:_SHARDS_NAMED])
    if len(shards) > _SHARDS_NAMED:
        named += f" and {len(shards) - _SHARDS_NAMED} more"
    return f"{', '.join(sorted({entry.reason for entry in damaged}))} in {named}"


def to_plain(entries: Iterable[Quarantined]) -> list[dict[str, Any]]:
    """Entries as JSON holds them."""
    return [asdict(entry) for entry in entries]


def from_plain(values: Iterable[dict[str, Any]]) -> list[Quarantined]:
    """The entries of `to_plain`."""
    return [Quarantined(**value) for value in values]
