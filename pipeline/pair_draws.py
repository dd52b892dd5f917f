"""Which samples are paired: matching ones, and negatives for them.

Owns the draws, pure functions of (values, uids, seed): the order of samples in a
dataset changes nothing. Does not own where values come from (`pipeline.pair_table`).

A negative begins with a sample of a matching pair and ends with one that has a match of
its own, so that neither side alone says more than chance.

Shapes: N samples, P pairs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from pipeline.pair_table import NO_VALUE, Table, mixed

# A negative that was drawn before, or of the same image, is drawn again.
_TRIES = 8


class Kind(enum.IntEnum):
    """What a pair is."""

    MATCH = 0
    HARD = 1
    EASY = 2


class _Use(enum.IntEnum):
    """What a draw is for."""

    ORDER = 0
    LIMIT = 1
    SIDES = 2
    HARD = 3
    DEV = 4
    PARTNER = 100
    """And more: one number for each attempt and kind."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P pairs of rows of a table."""

    left: np.ndarray
    """(P,) int64."""
    right: np.ndarray
    kind: np.ndarray
    """(P,) `Kind`."""
    anchor: np.ndarray
    """(P,) int64, the row of the pair that it begins with: either side."""

    def __len__(self) -> int:
        return len(self.left)


def in_dev(values: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """Which values (N,) are of the share that is put aside: bool."""
    return _unit(_draw(values, seed, _Use.DEV)) < share


def matches(
    table: Table, rows: np.ndarray, *, per_value: int, limit: int | None, seed: int
) -> tuple[np.ndarray, int]:
    """Matching pairs (P, 2) among `rows`, and how many were left out because both show
    the same image file.

    The samples of a value lie on a drawn ring; pairs of neighbours come first, then
    those at distance two, and so on, so that all samples occur about as often.
    """
    at, place, size, start = _rings(table, rows, seed)
    parts, distance = [], 1
    while True:
        # At half way round, a pair would come twice.
        far = (2 * distance < size) | ((2 * distance == size) & (2 * place < size))
        taken = np.flatnonzero(far & ((distance - 1) * size + place < per_value))
        if not len(taken):
            break
        other = start[taken] + (place[taken] + distance) % size[taken]
        parts.append(np.stack([at[taken], at[other]], axis=1))
        distance += 1
    pairs = np.concatenate([*parts, np.empty((0, 2), np.int64)])
    different = table.images[pairs[:, 0]] != table.images[pairs[:, 1]]
    kept = pairs[different]
    order = np.argsort(_pair_draw(table, kept, seed, _Use.LIMIT), kind="stable")
    return kept[order[:limit]], int((~different).sum())


def negatives(
    table: Table,
    rows: np.ndarray,
    positive: np.ndarray,
    *,
    ratio: float,
    hard_share: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (P, 2) that do not match, the first of each a sample of `positive` (M, 2),
    the second one of `rows`; and their kinds (P,).
    """
    wanted = round(ratio * len(positive))
    turn, beside = np.divmod(np.arange(wanted), max(len(positive), 1))
    # Drawn by the pair that it stands beside, not by its place in the file.
    salt = _pair_draw(table, positive[beside], seed, _Use.HARD)
    salt = mixed(salt + turn.astype(np.uint64))
    anchors = positive[beside, (salt >> np.uint64(63)).astype(np.int64)]
    hard = (_unit(mixed(salt)) < hard_share) & (table.hard[anchors] != NO_VALUE)
    found, kinds, keys = [], [], np.empty(0, np.uint64)
    left = np.arange(wanted)
    for kind in (Kind.HARD, Kind.EASY):
        pool = _Pool(table, rows, hard=kind is Kind.HARD)
        todo = left[hard[left]] if kind is Kind.HARD else left
        for attempt in range(_TRIES):
            if not len(todo):
                break
            drawn = _draw(mixed(salt[todo]), seed, _Use.PARTNER + 10 * attempt + kind)
            partner = pool.other(anchors[todo], drawn)
            pair = np.stack([anchors[todo], partner], axis=1)
            key = _unordered(pair, len(table))
            fresh = (partner >= 0) & ~_among(key, keys) & _first(key)
            fresh &= table.images[pair[:, 0]] != table.images[pair[:, 1]]
            found.append(pair[fresh])
            kinds.append(np.full(int(fresh.sum()), kind, dtype=np.int64))
            keys = np.sort(np.concatenate([keys, key[fresh]]))
            left = np.setdiff1d(left, todo[fresh], assume_unique=True)
            todo = todo[~fresh]
    none = np.empty((0, 2), np.int64)
    return np.concatenate([none, *found]), np.concatenate([none[:, 0], *kinds])


def sided(table: Table, pairs: np.ndarray, kinds: np.ndarray, *, seed: int) -> Pairs:
    """The pairs with the sides of each drawn, in a drawn order."""
    word = _pair_draw(table, pairs, seed, _Use.SIDES)
    swap = (word >> np.uint64(63)).astype(bool)
    order = np.argsort(mixed(word), kind="stable")
    left = np.where(swap, pairs[:, 1], pairs[:, 0])
    right = np.where(swap, pairs[:, 0], pairs[:, 1])
    return Pairs(
        left=left[order],
        right=right[order],
        kind=kinds[order],
        anchor=pairs[:, 0][order],
    )


class _Pool:
    """Samples sorted so that those of another value are two ranges of places: any of
    them is drawn in one step.
    """

    def __init__(self, table: Table, rows: np.ndarray, *, hard: bool) -> None:
        bucket = table.hard[rows] if hard else np.zeros(len(rows), np.uint64)
        values = table.values[rows]
        order = np.lexsort((table.uids[rows], values, bucket))
        bucket, values = bucket[order], values[order]
        self._rows = rows[order]
        self._place = np.full(len(table), -1, dtype=np.int64)
        self._place[self._rows] = np.arange(len(rows))
        new_bucket = _changes(bucket)
        self._first, self._last = _runs(new_bucket)
        self._start, self._end = _runs(new_bucket | _changes(values))

    def other(self, anchors: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """A row (P,) of the bucket of each anchor (P,), one of the pool, and of another
        value; -1 where there is none.
        """
        at = self._place[anchors]
        own = self._end[at] - self._start[at]
        others = self._last[at] - self._first[at] - own
        number = (drawn % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
        place = self._first[at] + number
        place = np.where(place < self._start[at], place, place + own)
        found: np.ndarray = np.where(
            others > 0, self._rows[np.minimum(place, len(self._rows) - 1)], -1
        )
        return found


def _changes(values: np.ndarray) -> np.ndarray:
    """Which sorted values (N,) differ from the one before: bool."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def _runs(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the run of each place (N,) begins, and where it ends."""
    first = np.flatnonzero(starts)
    sizes = np.diff(np.append(first, len(starts)))
    return np.repeat(first, sizes), np.repeat(first + sizes, sizes)


def _rings(
    table: Table, rows: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by value and draw; and of each its place among those of its value,
    their number, and where they start.
    """
    values, uids = table.values[rows], table.uids[rows]
    order = np.lexsort((uids, _draw(uids, seed, _Use.ORDER), values))
    _, starts, sizes = np.unique(values[order], return_index=True, return_counts=True)
    start = np.repeat(starts, sizes)
    place = np.arange(len(rows)) - start
    return rows[order], place, np.repeat(sizes, sizes), start


def _pair_draw(table: Table, pairs: np.ndarray, seed: int, use: int) -> np.ndarray:
    uids = table.uids[pairs]
    return _draw(mixed(uids[:, 0]) + uids[:, 1], seed, use)


def _draw(values: np.ndarray, seed: int, use: int) -> np.ndarray:
    """A uint64 for each value, of a seed and a use."""
    key = mixed(np.array([seed], np.uint64)) + np.uint64(use)
    return mixed(mixed(key) ^ mixed(values))


def _unit(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _unordered(pairs: np.ndarray, count: int) -> np.ndarray:
    low, high = pairs.min(1), pairs.max(1)
    return low.clip(min=0).astype(np.uint64) * np.uint64(count) + high.astype(np.uint64)


def _among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which keys (P,) are among sorted known ones: bool."""
    if not len(known):
        return np.zeros(len(keys), bool)
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    found: np.ndarray = known[place] == keys
    return found


def _first(keys: np.ndarray) -> np.ndarray:
    """Which keys (P,) stand for the first time: bool."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first
