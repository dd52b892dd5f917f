"""Failed inputs that are tried again, as they lie in `.palimpsest/retries/`.

Owns the array of attempts, the file that lists the inputs of one new range, and the
record that makes a retry exist. Does not own which inputs those are (`pipeline.retry`)
or how they are tried (`pipeline.ranges`).

A retry's lists are written first, its record last, and a list without that record does
not count. Whoever begins the same retry writes the same bytes under the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.manifest import canonical_json, sample_key
from pipeline.manifest_checks import is_inside, read_json, understood
from pipeline.staging import STATE
from pipeline.storage import Storage

RETRIES = f"{STATE}/retries"
# A key is a number here, `{range:06d}{position:06d}` read as one.
PER_RANGE = 10 ** (len(sample_key(0, 0)) // 2)

ATTEMPT_DTYPE = np.dtype([("place", "<i8"), ("key", "<i8"), ("reason", "<u2")])
"""A failed input: its place in the corpus, which is the key that it was planned with;
the key of its last attempt; the place in a table of reasons of why that failed."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The inputs of a range of a retry."""

    rows: np.ndarray
    """Records (inputs,) of `ATTEMPT_DTYPE`, in order of their places."""
    reasons: Sequence[str]
    """What `reason` points into."""

    def counts(self) -> dict[str, int]:
        """How many of the last attempts failed for each reason."""
        counts = np.bincount(self.rows["reason"], minlength=len(self.reasons))
        found = zip(self.reasons, counts.tolist(), strict=True)
        return {reason: count for reason, count in found if count}

    def by_range(self) -> Iterator[tuple[int, dict[int, str]]]:
        """Every range of the corpus that has some of the inputs, in order: its number,
        and by position in it, rising, the key of the last attempt.
        """
        numbers, positions = np.divmod(self.rows["place"], PER_RANGE)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        stops = [*starts[1:], len(numbers)]
        for start, stop in zip(starts, stops, strict=True):
            keys = (
                sample_key(*divmod(key, PER_RANGE))
                for key in self.rows["key"][start:stop].tolist()
            )
            places = positions[start:stop].tolist()
            yield int(numbers[start]), dict(zip(places, keys, strict=True))


@dataclass(frozen=True, kw_only=True)
class RetriedRange:
    """A range of a retry, as the retry's record has it."""

    source: int
    """Place of its corpus in the run."""
    inputs: int
    file: str
    """The list of its inputs, below the root of the storage."""
    sha256: str
    """Of that list."""


def list_name(generation: int, number: int) -> str:
    """Where the inputs of range `number` are listed. Sorts before its retry's record,
    so that files copied in order exist in order.
    """
    return f"{RETRIES}/{generation:06d}-{number:06d}.npy"


def write_attempts(
    storage: Storage, name: str, source: int, attempts: Attempts
) -> RetriedRange:
    """Write the list of a range's inputs."""
    file = io.BytesIO()
    np.save(file, attempts.rows, allow_pickle=False)
    np.save(file, np.array(attempts.reasons), allow_pickle=False)
    data = file.getvalue()
    storage.write(name, data)
    return RetriedRange(
        source=source,
        inputs=len(attempts.rows),
        file=name,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_attempts(storage: Storage, given: RetriedRange) -> Attempts:
    """The inputs of a range.

    Raises:
        ValueError: their list is gone, or not the one that was written.
    """
    try:
        data = storage.read(given.file)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != given.sha256:
        raise ValueError(
            f"{storage.url}/{given.file}, which lists what is tried again, is gone or "
            "damaged: put a sound copy back, or make the dataset anew"
        )
    file = io.BytesIO(data)
    rows = np.load(file, allow_pickle=False)
    reasons = np.load(file, allow_pickle=False).tolist()
    return Attempts(rows=rows, reasons=reasons)


def create_retry(
    storage: Storage, generation: int, ranges: Sequence[RetriedRange]
) -> bool:
    """Make a retry exist whose lists are written; False where another one does."""
    name = f"{RETRIES}/{generation:06d}.json"
    record = {"ranges": [dataclasses.asdict(one) for one in ranges]}
    text = canonical_json(record).encode()
    return storage.create(name, text) or storage.read(name) == text


def retry_names(storage: Storage) -> list[str]:
    """The records of all retries that were begun, in order."""
    return [name for name in storage.names(RETRIES) if name.endswith(".json")]


def retried_ranges(storage: Storage) -> list[RetriedRange]:
    """The ranges of all retries that were begun, in order.

    Raises:
        ValueError: a record is damaged.
    """
    ranges: list[RetriedRange] = []
    for name in retry_names(storage):
        where = f"{storage.url}/{name}"
        record = read_json(storage.read(name), where)
        with understood(where):
            ranges += (RetriedRange(**fields) for fields in record["ranges"])
            if not all(is_inside(one.file) for one in ranges):
                raise KeyError("file")
    return ranges


def unrecorded(names: Iterable[str]) -> list[str]:
    """Lists among the files of the state whose retry has no record there: what a driver
    left that was killed while it began one.
    """
    found = {name for name in names if name.startswith(f"{RETRIES}/")}
    lists = sorted(name for name in found if name.endswith(".npy"))
    return [name for name in lists if f"{name.partition('-')[0]}.json" not in found]
