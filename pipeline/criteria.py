"""What makes two candidates of a corpus the same, and which of them was first.

Owns signatures, the one order over all candidates, per criterion its key, what of a
bucket decides, and the verdict; and into how many tasks a comparison is cut. Does not
own how candidates with one key meet (`pipeline.compare`) or the search for hashes that
are merely near (`pipeline.hamming`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.hamming import NONE, blocks

KINDS = ("identity", "split", "exact", "near", "caption_repetition")
"""What a verdict can be, the first that holds first; its `kind` is the place here."""

SIGNATURE_DTYPE = np.dtype(
    [
        ("position", "<u4"),
        ("uid", "<u8"),
        ("split", "u1"),
        ("sha256", "<u8", (2,)),
        ("pixels", "<u8", (2,)),
        ("phash", "<u8"),
        ("caption", "<u8"),
    ]
)
"""A candidate: its position in its range, the rank of its split (held out ones lower
than train), the first bytes of sha256 of source, written pixels and first caption."""

STORED_DTYPE = np.dtype(
    [
        ("order", "<u8"),
        ("uid", "<u8"),
        ("sha256", "<u8", (2,)),
        ("pixels", "<u8", (2,)),
        ("phash", "<u8"),
        ("caption", "<u8"),
    ]
)
"""A signature in the order over all, which tells range, position and split too."""
RECORD_DTYPE = np.dtype([("key", "<u8"), ("order", "<u8")])
"""A candidate in a bucket: equal keys are compared."""

# An order: not committed (1 bit), split (8), range (32), position (23).
_SPLIT_BIT, _RANGE_BIT = 55, 23
_UNCOMMITTED = np.uint64(1 << 63)
_MOST_SPLITS, _MOST_RANGES, _MOST_POSITIONS = 255, 1 << 32, 1 << _RANGE_BIT

# What a task holds at its peak, measured: records, sorting them, copies on the way.
_BYTES_PER_RECORD = 240


def signature(position: int, split: int, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """A record of `SIGNATURE_DTYPE` from the row of a sample."""
    caption = hashlib.sha256(row["caption"].encode()).digest()
    return (
        position,
        int(row["uid"], 16),
        split,
        _words(bytes.fromhex(row["sha256"])),
        _words(bytes.fromhex(row["pixels_sha256"] or "")),
        int(row["phash"], 16),
        int.from_bytes(caption[:8], "little"),
    )


def _words(digest: bytes) -> tuple[int, int]:
    return (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:16], "little"),
    )


def stored(number: int, committed: bool, signatures: np.ndarray) -> np.ndarray:
    """Signatures of a range, with their place in the order instead of position and
    split.

    Raises:
        ValueError: a range, position or split that the order has no room for.
    """
    splits, positions = signatures["split"], signatures["position"]
    if not 0 <= number < _MOST_RANGES or np.any(positions >= _MOST_POSITIONS):
        raise ValueError(
            f"range {number} has positions or a number too large to compare: at most "
            f"{_MOST_POSITIONS} inputs a range, {_MOST_RANGES} ranges"
        )
    if np.any(splits >= _MOST_SPLITS):
        raise ValueError(f"more splits than {_MOST_SPLITS}: name fewer")
    result = np.empty(len(signatures), dtype=STORED_DTYPE)
    for name in (STORED_DTYPE.names or ())[1:]:
        result[name] = signatures[name]
    order = splits.astype(np.uint64) << np.uint64(_SPLIT_BIT)
    order |= np.uint64(number << _RANGE_BIT) | positions.astype(np.uint64)
    result["order"] = order if committed else order | _UNCOMMITTED
    return np.sort(result, order="order")


def ranges(orders: np.ndarray) -> np.ndarray:
    """Ranges that orders speak of: uint32."""
    return (orders >> np.uint64(_RANGE_BIT)).astype(np.uint32)


def positions(orders: np.ndarray) -> np.ndarray:
    """Positions in their range that orders speak of: uint32."""
    return (orders & np.uint64(_MOST_POSITIONS - 1)).astype(np.uint32)


def new(orders: np.ndarray) -> np.ndarray:
    """Which are not committed, so that there is something to decide: bool."""
    return (orders & _UNCOMMITTED) != 0


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way in which a candidate repeats another."""

    kind: str
    """Of `KINDS`."""
    distance: int = 0
    """Bits that near hashes may differ in."""
    block: int = 0
    """The block of bits that near hashes share: a criterion for each."""
    repeats: int = 1
    """Earlier candidates it takes."""

    @property
    def number(self) -> int:
        """The kind, as verdicts have it."""
        return KINDS.index(self.kind)

    def dealt(self, given: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of `parts` each signature belongs to (uint32), and its record."""
        key, even = self._key(given)
        records = np.empty(len(given), dtype=RECORD_DTYPE)
        records["key"], records["order"] = key, given["order"]
        return (_mixed(even) % np.uint64(parts)).astype(np.uint32), records

    def _key(self, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is compared, and what decides where: equal where keys may match."""
        if self.kind in ("split", "exact"):
            words = given["sha256" if self.kind == "split" else "pixels"]
            return words[:, 1], words[:, 0]
        if self.kind == "near":
            key = given["phash"]
            return key, key & np.uint64(blocks(self.distance)[self.block])
        key = given["uid" if self.kind == "identity" else "caption"]
        return key, key

    def reduced(self, records: np.ndarray) -> np.ndarray:
        """The records that decide, by key and order. Reducing what was reduced before
        together with more gives the same as reducing all.
        """
        order = records["order"]
        if self.kind != "split":
            records = records[np.lexsort((order, records["key"]))]
            return records[_rank(records["key"]) < self.repeats]
        split = order >> np.uint64(_SPLIT_BIT)
        records = records[np.lexsort((order, split & np.uint64(255), records["key"]))]
        split = (records["order"] >> np.uint64(_SPLIT_BIT)) & np.uint64(255)
        # Committed or not, the first of each split: it stands before all its others.
        first = _starts(records["key"]) | _starts(split)
        records = records[first]
        return records[np.lexsort((records["order"], records["key"]))]

    def earliest(self, reduced: np.ndarray, records: np.ndarray) -> np.ndarray:
        """The earliest order that each record repeats; not below its own where it
        repeats none.

        Args:
            reduced: what `reduced` gave for a bucket that has all of these keys.
            records: of that bucket, `RECORD_DTYPE` (N,).

        Returns:
            uint64 (N,)
        """
        starts = np.flatnonzero(_starts(reduced["key"]))
        at = starts[np.searchsorted(reduced["key"][starts], records["key"])]
        first = reduced["order"][at]
        if self.kind == "split":
            second = self._later(reduced, at, 1)
            shift = np.uint64(_SPLIT_BIT)
            same = ((first ^ records["order"]) >> shift) & np.uint64(255) == 0
            return np.where(same, second, first)
        if self.repeats == 1:
            return first
        enough = self._later(reduced, at, self.repeats - 1) < records["order"]
        return np.where(enough, first, NONE)

    @staticmethod
    def _later(reduced: np.ndarray, at: np.ndarray, steps: int) -> np.ndarray:
        """Order of the record `steps` after each place, if it has the same key."""
        there = np.minimum(at + steps, len(reduced) - 1)
        fits = (at + steps < len(reduced)) & (
            reduced["key"][there] == reduced["key"][at]
        )
        return np.where(fits, reduced["order"][there], NONE)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how the work is cut. Equal ones give equal files; the
    verdicts depend on neither `inputs` nor `memory`.
    """

    identity: bool = True
    """No two candidates with one uid."""
    splits: bool = False
    """No two with the same source bytes in two splits: where there are several."""
    exact: bool = False
    """No two with the same pixels."""
    near: int | None = None
    """No two whose perceptual hashes differ in at most this many bits."""
    caption_repeats: int | None = None
    """No more than this many with the same first caption."""
    inputs: int
    """Inputs in all ranges, candidates or not."""
    ranges: int
    """Ranges, numbered from 0, committed ones included."""
    memory: int
    """Bytes that a task may take, as `pipeline.compare` counts them."""

    @property
    def needed(self) -> bool:
        """Whether anything is compared at all."""
        return bool(self.criteria and self.ranges)

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """What candidates are compared by."""
        found = []
        if self.identity:
            found.append(Criterion(kind="identity"))
        if self.splits:
            found.append(Criterion(kind="split"))
        if self.exact:
            found.append(Criterion(kind="exact"))
        if (near := self.near) is not None:
            shared = range(len(blocks(near)))
            found += [Criterion(kind="near", distance=near, block=n) for n in shared]
        if (most := self.caption_repeats) is not None:
            found.append(Criterion(kind="caption_repetition", repeats=most))
        return tuple(found)

    @property
    def records(self) -> int:
        """Records that a task holds at a time."""
        return max(1, self.memory // _BYTES_PER_RECORD)

    @property
    def group(self) -> int:
        """Ranges to a group; group g has those from g * group."""
        return max(1, self.records * self.ranges // max(1, self.inputs))

    @property
    def groups(self) -> int:
        """Tasks of `scatter` and of `collect`."""
        return -(-self.ranges // self.group)

    @property
    def parts(self) -> int:
        """Buckets of each criterion."""
        return max(1, -(-2 * self.inputs // self.records))

    @property
    def buckets(self) -> int:
        """Tasks of `match`."""
        return len(self.criteria) * self.parts

    @property
    def folder(self) -> str:
        """Where its files lie: another comparison must not take them for its own."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def group_ranges(self, group: int) -> range:
        """The ranges of a group."""
        return range(group * self.group, min((group + 1) * self.group, self.ranges))


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before: bool."""
    result = np.ones(len(values), dtype=bool)
    result[1:] = values[1:] != values[:-1]
    return result


def _rank(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each, of sorted ones."""
    starts = np.flatnonzero(_starts(values))
    sizes = np.diff(np.append(starts, len(values)))
    return np.arange(len(values)) - np.repeat(starts, sizes)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Values spread evenly over 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
