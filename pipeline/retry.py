"""`--retry_failed`: failed inputs of a complete dataset, tried again as new ranges.

Owns finding them, and which of them make a new range. Does not own how that is stored
(`pipeline.attempts`) or how a range is processed or committed: to both a retry is a
range like any other. An input counts by its last attempt (`records.RangeRecord`).

Memory: while a retry is begun, some tens of bytes for each input that failed, in
arrays; before and after O(ranges).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.attempts import (
    ATTEMPT_DTYPE,
    PER_RANGE,
    Attempts,
    RetriedRange,
    create_retry,
    list_name,
    read_attempts,
    retried_ranges,
    retry_names,
    write_attempts,
)
from pipeline.dataset import DatasetWriter
from pipeline.manifest import Accounting
from pipeline.plan import MAX_RANGES, Plan, RangePlan
from pipeline.records import RangeRecord
from pipeline.shards import ROW_SCHEMA
from pipeline.staging import RUNNING, TakenOver
from pipeline.storage import Storage
from pipeline.work import Report, Work

# Lies there until the run that was told to retry is at its end; says which retry that
# is. Whoever looks for what a killed driver left finds it with RUNNING.
RETRYING = f"{RUNNING}.retry"
_COLUMNS = ["key", "status", "reason", "retry_of"]
# Lists read or written at once: on an object store they cost mostly waiting, and each
# under way takes memory for its range.
_LISTS = 8


@dataclass(frozen=True, kw_only=True)
class FailedRows:
    """What the tables of one committed range say about failures. Keys are numbers, as
    in `ATTEMPT_DTYPE`.
    """

    keys: np.ndarray
    """Of each failed input (N,), rising: int64."""
    codes: np.ndarray
    """Why it failed (N,): places in `reasons`."""
    reasons: tuple[str, ...]
    superseded: np.ndarray
    """Keys (M,) of earlier attempts that this range tries again: int64."""


def failed_rows(work: Work, record: RangeRecord, report: Report) -> FailedRows:
    """Failures of a committed range, from its tables: a Ray task."""
    del report
    names = [shard.sidecar(".parquet") for shard in record.shards]
    tables = [ROW_SCHEMA.empty_table().select(_COLUMNS)]
    for name in (*names, *record.rejected):
        with work.storage.fetch(name) as path:
            tables.append(pq.read_table(path, columns=_COLUMNS))
    rows = pa.concat_tables(tables).sort_by("key")
    failed = rows.filter(pc.equal(rows["status"], "failed"))
    reasons, codes = np.unique(failed["reason"].to_pylist(), return_inverse=True)
    return FailedRows(
        keys=_numbers(failed["key"]),
        codes=codes.astype(np.uint16),
        reasons=tuple(reasons.tolist()),
        superseded=_numbers(rows["retry_of"].drop_null()),
    )


def pending_ranges(writer: DatasetWriter, plan: Plan) -> list[RangePlan]:
    """Ranges of every retry that was begun, in order."""
    return [
        RangePlan(
            number=number,
            source=given.source,
            start=0,
            stop=0,
            first_row=0,
            inputs=given.inputs,
            retried=given,
        )
        for number, given in enumerate(retried_ranges(writer.storage), plan.n_ranges)
    ]


def without_attempts(
    counts: Accounting, storage: Storage, todo: Iterable[RangePlan]
) -> Accounting:
    """Counts of committed ranges without the inputs that ranges `todo` try again, each
    of which then counts once, by the attempt to come.

    Raises:
        ValueError: a list of what is tried again is gone or damaged.
    """

    def earlier(given: RetriedRange) -> dict[str, int]:
        return read_attempts(storage, given).counts()

    again: Counter[str] = Counter()
    with ThreadPoolExecutor(_LISTS) as pool:
        for found in pool.map(earlier, (one.retried for one in todo if one.retried)):
            again.update(found)
    failed = Counter(counts.failed)
    failed.subtract(again)
    # Where records were lost, so are counts that would be taken away here.
    return dataclasses.replace(
        counts, inputs=max(0, counts.inputs - again.total()), failed=dict(+failed)
    )


def announce_retry(writer: DatasetWriter) -> None:
    """Write down which retry this run is to make, before it looks for failures."""
    generation = len(retry_names(writer.storage)) + 1
    writer.storage.write(RETRYING, str(generation).encode())


def retry_announced(writer: DatasetWriter) -> bool:
    """Is there a retry on storage, begun or finished, that a killed run announced? The
    same command then goes on with it, and tries nothing a second time.
    """
    try:
        generation = int(writer.storage.read(RETRYING))
    except FileNotFoundError:
        return False
    return len(retry_names(writer.storage)) >= generation


def end_retry(writer: DatasetWriter) -> None:
    """Forget what was announced: the run is at its end."""
    writer.storage.remove(RETRYING)


def begin_retry(
    writer: DatasetWriter, plan: Plan, found: Iterable[FailedRows], samples: int
) -> int:
    """Write down which inputs a new retry consists of; returns how many there are.
    What is `found` may come in any order.

    Raises:
        ValueError: its ranges are more than keys can number, or the list of an earlier
            retry's inputs is gone or damaged.
    """
    storage = writer.storage
    generation = len(retry_names(storage)) + 1
    earlier = retried_ranges(storage)
    parts, reasons = _last_attempts(found)
    if not parts:
        return 0
    _find_places(storage, plan, earlier, parts)
    failed = np.concatenate(parts)
    parts.clear()
    order = np.argsort(failed["place"])
    cuts = _cuts(plan, failed["place"], order, samples)
    first = plan.n_ranges + len(earlier)
    if first + len(cuts) > MAX_RANGES:
        raise ValueError(
            f"--retry_failed: {len(cuts)} ranges more than {storage.url} has "
            f"would be over {MAX_RANGES}, which is all that keys can number; make the "
            "dataset anew with a larger --shard.samples"
        )

    def write(number: int, cut: tuple[int, int, int]) -> RetriedRange:
        source, start, stop = cut
        attempts = Attempts(rows=failed[order[start:stop]], reasons=reasons)
        name = list_name(generation, number)
        return write_attempts(storage, name, source, attempts)

    with ThreadPoolExecutor(_LISTS) as pool:
        ranges = list(pool.map(write, count(first), cuts))
    if not create_retry(storage, generation, ranges):
        raise TakenOver(
            f"another driver began a retry in {storage.url}, so this one stops; run "
            "the same command again once it is done"
        )
    return len(failed)


def _last_attempts(
    found: Iterable[FailedRows],
) -> tuple[list[np.ndarray], Sequence[str]]:
    """Failed inputs that no later range tried again, records of `ATTEMPT_DTYPE` for
    each range that has some, as if its keys were places; and the reasons, sorted.
    """
    parts: list[np.ndarray] = []
    again: list[np.ndarray] = []
    codes: dict[str, int] = {}
    for rows in found:
        named = [codes.setdefault(reason, len(codes)) for reason in rows.reasons]
        part = np.empty(len(rows.keys), ATTEMPT_DTYPE)
        part["place"] = part["key"] = rows.keys
        part["reason"] = np.array(named, np.uint16)[rows.codes]
        parts.append(part)
        # A copy, as a view would hold all that came with it.
        again.append(rows.superseded.copy())
    superseded = np.sort(np.concatenate([*again, np.empty(0, np.int64)]))
    again.clear()
    reasons = sorted(codes)
    ranks = np.array([reasons.index(reason) for reason in codes], np.uint16)
    for number, part in enumerate(parts):
        keys = part["key"]
        end = np.searchsorted(superseded, keys, side="right")
        left = part[np.searchsorted(superseded, keys) == end]
        left["reason"] = ranks[left["reason"]]
        parts[number] = left
    return [part for part in parts if len(part)], reasons


def _find_places(
    storage: Storage,
    plan: Plan,
    earlier: Sequence[RetriedRange],
    parts: Sequence[np.ndarray],
) -> None:
    """Put the places of inputs that were tried `earlier` into what failed of them."""

    def find(part: np.ndarray) -> None:
        number = int(part["key"][0]) // PER_RANGE - plan.n_ranges
        rows = read_attempts(storage, earlier[number]).rows
        part["place"] = rows["place"][part["key"] % PER_RANGE]

    planned = plan.n_ranges * PER_RANGE
    with ThreadPoolExecutor(_LISTS) as pool:
        list(pool.map(find, (one for one in parts if one["key"][0] >= planned)))


def _cuts(
    plan: Plan, places: np.ndarray, order: np.ndarray, samples: int
) -> list[tuple[int, int, int]]:
    """Source, start and stop in `order` of every new range: of one source each."""
    sources = plan.table["source"].astype(np.int64)
    begins = np.flatnonzero(np.diff(sources, prepend=-1))
    bounds = np.searchsorted(places, begins * PER_RANGE, sorter=order).tolist()
    bounds.append(len(order))
    return [
        (int(sources[begin]), start, min(start + samples, stop))
        for place, begin in enumerate(begins)
        for stop in [bounds[place + 1]]
        for start in range(bounds[place], stop, samples)
    ]


def _numbers(keys: pa.ChunkedArray) -> np.ndarray:
    return keys.cast(pa.int64()).to_numpy()
