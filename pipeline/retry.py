"""`--retry_failed`: failed inputs of a complete dataset, tried again as new ranges.

Owns finding them, and the files in `.palimpsest/retries/` that say which input each new
range tries again. Does not own how a range is processed or committed: to both a retry
is a range like any other. An input counts by its last attempt (`dataset.RangeRecord`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq

from pipeline.dataset import RETRIES, DatasetWriter
from pipeline.manifest import canonical_json, sample_key
from pipeline.plan import MAX_RANGES, Plan, RangePlan, RetriedInputs
from pipeline.records import RangeRecord
from pipeline.shards import position
from pipeline.staging import RUNNING
from pipeline.work import Report, Work

# Lies there until the run that was told to retry is at its end; says which retry that
# is. Whoever looks for what a killed driver left finds it with RUNNING.
RETRYING = f"{RUNNING}.retry"
_COLUMNS = ["key", "status", "reason", "retry_of"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A failed input: where it stands in the corpus, and its last attempt."""

    range: int
    """Range of the corpus; its source decides the source of the retry."""
    position: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FailedRows:
    """What the tables of one committed range say about failures."""

    failed: tuple[tuple[str, str], ...]
    """Key and reason of each failed input, in order."""
    superseded: tuple[str, ...]
    """Keys of earlier attempts that this range tries again."""


def failed_rows(work: Work, record: RangeRecord, report: Report) -> FailedRows:
    """Failures of a committed range, from its tables: a Ray task."""
    del report
    names = [shard.sidecar(".parquet") for shard in record.shards]
    rows: list[dict[str, Any]] = []
    for name in (*names, *record.rejected):
        with work.storage.fetch(name) as path:
            rows += pq.read_table(path, columns=_COLUMNS).to_pylist()
    rows.sort(key=lambda row: row["key"])
    return FailedRows(
        failed=tuple(
            (row["key"], row["reason"]) for row in rows if row["status"] == "failed"
        ),
        superseded=tuple(row["retry_of"] for row in rows if row["retry_of"]),
    )


def pending_ranges(writer: DatasetWriter, plan: Plan) -> list[RangePlan]:
    """Ranges of every retry that was begun, in order."""
    return [
        _range_plan(plan, number, stored)
        for number, stored in enumerate(_stored(writer), plan.n_ranges)
    ]


def announce_retry(writer: DatasetWriter) -> None:
    """Write down which retry this run is to make, before it looks for failures."""
    generation = len(writer.storage.names(RETRIES)) + 1
    writer.storage.write(RETRYING, str(generation).encode())


def retry_announced(writer: DatasetWriter) -> bool:
    """Is there a retry on storage, begun or finished, that a killed run announced? The
    same command then goes on with it, and tries nothing a second time.
    """
    try:
        generation = int(writer.storage.read(RETRYING))
    except FileNotFoundError:
        return False
    return len(writer.storage.names(RETRIES)) >= generation


def end_retry(writer: DatasetWriter) -> None:
    """Forget what was announced: the run is at its end."""
    writer.storage.remove(RETRYING)


def begin_retry(
    writer: DatasetWriter, plan: Plan, found: Iterable[FailedRows], samples: int
) -> int:
    """Write down which inputs a new retry consists of; returns how many there are.

    Raises:
        ValueError: its ranges are more than keys can number.
    """
    failed: dict[str, str] = {}
    for rows in found:
        failed.update(rows.failed)
        for key in rows.superseded:
            failed.pop(key, None)
    origins = _origins(writer, plan)
    attempts = [
        Attempt(range=origin[0], position=origin[1], key=key, reason=reason)
        for key, reason in failed.items()
        for origin in [origins.get(key) or _place(key)]
    ]
    if not attempts:
        return 0
    attempts.sort(key=lambda one: (one.range, one.position))
    ranges = []
    for source, group in groupby(attempts, key=lambda one: _source(plan, one.range)):
        together = list(group)
        for start in range(0, len(together), samples):
            ranges.append(_stored_range(source, together[start : start + samples]))
    if plan.n_ranges + len(_stored(writer)) + len(ranges) > MAX_RANGES:
        raise ValueError(
            f"--retry_failed: {len(ranges)} ranges more than {writer.storage.url} has "
            f"would be over {MAX_RANGES}, which is all that keys can number; make the "
            "dataset anew with a larger --shard.samples"
        )
    generation = len(writer.storage.names(RETRIES)) + 1
    name = f"{RETRIES}/{generation:06d}.json"
    writer.storage.create(name, canonical_json({"ranges": ranges}).encode())
    return len(attempts)


def _stored(writer: DatasetWriter) -> list[dict[str, Any]]:
    names = writer.storage.names(RETRIES)
    return [
        stored
        for name in names
        for stored in json.loads(writer.storage.read(name))["ranges"]
    ]


def _stored_range(source: int, attempts: Sequence[Attempt]) -> dict[str, Any]:
    parts = [
        {
            "range": number,
            "positions": [one.position for one in group],
            "keys": [one.key for one in group],
            "reasons": [one.reason for one in group],
        }
        for number, members in groupby(attempts, key=lambda one: one.range)
        for group in [list(members)]
    ]
    return {"source": source, "parts": parts}


def _range_plan(plan: Plan, number: int, stored: dict[str, Any]) -> RangePlan:
    parts = tuple(
        RetriedInputs(
            range=plan.range(part["range"]),
            positions=tuple(part["positions"]),
            keys=tuple(part["keys"]),
            reasons=tuple(part["reasons"]),
        )
        for part in stored["parts"]
    )
    return RangePlan(
        number=number,
        source=stored["source"],
        start=0,
        stop=0,
        first_row=0,
        inputs=sum(len(part.positions) for part in parts),
        retried=parts,
    )


def _origins(writer: DatasetWriter, plan: Plan) -> dict[str, tuple[int, int]]:
    """Place in the corpus of every input that was tried again, by the key it got."""
    origins = {}
    for retry in pending_ranges(writer, plan):
        places = [
            (part.range.number, place)
            for part in retry.retried
            for place in part.positions
        ]
        for number, place in enumerate(places):
            origins[sample_key(retry.number, number)] = place
    return origins


def _place(key: str) -> tuple[int, int]:
    return int(key[: len(key) // 2]), position(key)


def _source(plan: Plan, number: int) -> int:
    return int(plan.table[number]["source"])
