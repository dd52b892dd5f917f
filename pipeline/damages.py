"""What a check found: one damage, and all that one shard or table told.

Owns these two shapes, which every check of a dataset shares. Does not own any check
(`pipeline.audit_shard`, `pipeline.audit_deep`, `pipeline.audit_files`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that is not as it was written."""

    path: str
    """File below the dataset."""
    offset: int | None
    """Byte in that file, where one place is to blame."""
    message: str

    def __str__(self) -> str:
        where = (
            self.path if self.offset is None else f"{self.path} offset {self.offset}"
        )
        return f"{where}: {self.message}"


@dataclass(kw_only=True)
class Findings:
    """What the check of one shard, or of one table of rejected inputs, gives."""

    damages: list[Damage] = field(default_factory=list)
    range: int | None = None
    """The range that its rows belong to; None where tables are not of ranges."""
    uids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Identities (samples,) of the index."""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """64-bit hashes (rows,) of the keys of the table."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by (status, reason)."""
    retried: list[str] = field(default_factory=list)
    """Keys of earlier inputs that rows of this table try again."""
    whole: bool = True
    """False where the table could not be read, so that totals say nothing."""


def first_difference(found: bytes, right: bytes) -> int | None:
    """First byte at which two files differ; None where they are equal."""
    if found == right:
        return None
    length = min(len(found), len(right))
    a = np.frombuffer(found, np.uint8, length)
    b = np.frombuffer(right, np.uint8, length)
    places = np.flatnonzero(a != b)
    return int(places[0]) if len(places) else length
