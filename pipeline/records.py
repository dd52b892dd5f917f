"""Commit records: what makes the shards of a range exist.

Owns the record, its file's text, and the manifest's entries of a placed range. Does not
own when a record is written or where it lies (`pipeline.dataset`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.manifest import Accounting, Shard, canonical_json
from pipeline.settle import Placement
from pipeline.shards import StagedShard


@dataclass(frozen=True, kw_only=True)
class RangeRecord:
    """A committed range. A shard exists when the record that names it does."""

    range: int
    rows: int
    accounting: Accounting
    shards: tuple[Shard, ...]
    rejected: Mapping[str, str]
    """Tables of rejected inputs that lie beside no shard, and their sha256."""
    retried: Mapping[str, int]
    """How the inputs of a retry had failed before: counts that no longer hold."""
    verdicts: str
    """sha256 of what the comparison said, empty where nothing was compared."""

    def net(self) -> Accounting:
        """What the range adds to the totals: an input counts by its last attempt."""
        again = sum(self.retried.values())
        earlier = {reason: -count for reason, count in self.retried.items()}
        total = self.accounting + Accounting(inputs=-again, failed=earlier)
        failed = {reason: n for reason, n in total.failed.items() if n}
        return dataclasses.replace(total, failed=failed)


def shards_of(placement: Placement, source: str) -> tuple[Shard, ...]:
    """The manifest's entries of a placed range."""
    return tuple(_entry(placement, shard, source) for shard in placement.staged.shards)


def _entry(placement: Placement, shard: StagedShard, source: str) -> Shard:
    return Shard(
        name=placement.names[shard.split],
        source=source,
        range=placement.number,
        **dataclasses.asdict(shard),
    )


def record_text(record: RangeRecord) -> bytes:
    """The bytes of a record's file."""
    return canonical_json(dataclasses.asdict(record)).encode()


def read_record(text: bytes) -> RangeRecord:
    """The record of a file's bytes."""
    value = json.loads(text)
    return RangeRecord(
        **{
            **value,
            "accounting": Accounting(**value["accounting"]),
            "shards": tuple(Shard(**shard) for shard in value["shards"]),
        }
    )
