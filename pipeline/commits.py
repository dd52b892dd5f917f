"""Staged ranges on their way into the dataset, one after the other in range order.

Owns whose turn it is, and the manifest of what is committed so far, rewritten at
intervals. Does not own how files are placed (`pipeline.settle`), names and records
(`pipeline.dataset`) or the tasks (`pipeline.phases`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pipeline.dataset import DatasetWriter
from pipeline.records import shards_of
from pipeline.settle import Placement
from pipeline.staging import StagedRange

_MANIFEST_SECONDS = 10.0


class Commits:
    """The ranges that are still to be committed, from the first that is not.

    Args:
        writer: the dataset, with the records of what is committed.
        source_of: name of the source of a range.
        check: raises ValueError where another driver has taken over.
        write_manifest: writes the manifest of what is committed so far: soon after the
            first commit, then at intervals. None where readers must not see it yet.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        *,
        source_of: Callable[[int], str],
        check: Callable[[], None],
        write_manifest: Callable[[], object] | None,
    ) -> None:
        self._writer, self._source_of, self._check = writer, source_of, check
        self._write_manifest, self._due = write_manifest, 0.0
        self._taken, self._turn = writer.taken(), len(writer.records)
        self._waiting: dict[int, StagedRange] = {}
        self._named: dict[int, Placement] = {}
        self._placed: set[int] = set()

    def add(self, staged: StagedRange) -> None:
        """Take a range that is finished, in any order."""
        self._waiting[staged.number] = staged

    def ready(self) -> Iterator[Placement]:
        """Ranges whose turn has come, each once: all before them are finished too, so
        that their shards have names.
        """
        while (staged := self._waiting.pop(self._turn, None)) is not None:
            placement = self._writer.names_for(staged, self._taken)
            self._named[self._turn] = placement
            self._turn += 1
            yield placement

    def placed(self, number: int) -> None:
        """Commit a range whose files have their names, once all before it are; those
        that only waited for it too.

        Raises:
            ValueError: another driver has taken over, or counts do not add up.
        """
        self._placed.add(number)
        while (number := len(self._writer.records)) in self._placed:
            self._check()
            placement = self._named.pop(number)
            shards = shards_of(placement, self._source_of(number))
            self._writer.commit(placement.staged, shards, placement.staged.verdicts)
            self._placed.remove(number)
            self._rewrite_manifest()

    def _rewrite_manifest(self) -> None:
        begun = time.monotonic()
        if self._write_manifest is None or begun < self._due:
            return
        self._write_manifest()
        # It grows with the dataset, and must not take its time.
        took = time.monotonic() - begun
        self._due = time.monotonic() + max(_MANIFEST_SECONDS, 20 * took)
