"""What a staged range keeps once it was compared with the corpus, and its place.

Owns applying verdicts to staged shards and copying the files of a settled range to
their final names: what Ray tasks do after the comparison. Does not own the comparison
(`pipeline.compare`) or the record that makes a shard exist (`pipeline.dataset`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline import compare
from pipeline.criteria import signature
from pipeline.manifest import Accounting, Shard, file_sha256, sample_key
from pipeline.shards import (
    REJECTED,
    SUFFIXES,
    WRITTEN,
    Dropped,
    StagedShard,
    position,
    without,
)
from pipeline.staging import (
    CANDIDATES,
    COMPARE,
    STATE,
    StagedRange,
    new_directory,
    read_staged,
    write_staged,
)
from pipeline.storage import Storage
from pipeline.work import Report, Work

SETTLED = f"{STATE}/settled"
VERDICTS = f"{STATE}/verdicts"
# Comparisons that say an input is not wanted, rather than that it is there already.
_FILTERS = ("caption_repetition",)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A settled range and the names that its shards get."""

    staged: StagedRange
    names: Mapping[str, str]
    """Name of the tar of each split that has samples, below the dataset directory."""

    @property
    def number(self) -> int:
        """Number of the range."""
        return self.staged.number


def settle_range(work: Work, number: int, report: Report) -> StagedRange:
    """The staged range without what the comparison drops.

    Raises:
        OSError: the range is not staged (any more); the same command makes it again.
    """
    del report
    settled = read_staged(work.storage, SETTLED, number, work.run)
    if settled is not None:
        return settled
    staged = read_staged(work.storage, CANDIDATES, number, work.run)
    if staged is None:
        raise OSError(
            f"staged range {number:06d} has lost files; the same command makes it again"
        )
    verdicts, digest = _verdicts(work, number)
    staged = dataclasses.replace(staged, verdicts=digest)
    if not len(verdicts):
        return staged
    dropped = {int(verdict["position"]): _dropped(verdict) for verdict in verdicts}
    directory = new_directory(SETTLED, number)
    with _local(work.storage, staged) as source, work.storage.stage(directory) as into:
        settled = _apply(staged, dropped, source, into)
    settled = dataclasses.replace(settled, directory=directory)
    return write_staged(work.storage, SETTLED, settled)


def place_range(work: Work, placement: Placement, report: Report) -> int:
    """Copy a settled range's files to their final names. What is staged stays until
    the record of the range exists, so that this can be done again.
    """
    del report
    storage, staged = work.storage, placement.staged
    for split, name in placement.names.items():
        for suffix in SUFFIXES:
            target = name.removesuffix(".tar") + suffix
            storage.copy(f"{staged.directory}/{split}{suffix}", target)
    for split in staged.rejected:
        target = rejected_name(split, staged.number)
        storage.copy(f"{staged.directory}/{split}{REJECTED}", target)
    return staged.number


def store_committed(
    work: Work, committed: tuple[int, tuple[Shard, ...]], report: Report
) -> int:
    """Give the comparison the samples of a committed range, which win over new ones."""
    del report
    number, shards = committed
    records = []
    for shard in shards:
        with work.storage.fetch(shard.sidecar(".parquet")) as path:
            rows = pq.read_table(path).to_pylist()
        place = work.split_names.index(shard.split)
        records += [
            signature(position(row["key"]), place, row)
            for row in rows
            if row["status"] == WRITTEN
        ]
    array = np.array(sorted(records), dtype=compare.SIGNATURE_DTYPE)
    compare.store(work.storage, COMPARE, number, committed=True, signatures=array)
    return number


def rejected_name(split: str, number: int) -> str:
    """Where the table of a range lies that kept nothing for a split."""
    return f"rejected/range-{number:06d}-{split}.parquet"


def verdict_name(number: int) -> str:
    """Where the verdicts of a range are kept, to make it again one day."""
    return f"{VERDICTS}/{number:06d}.npy"


def _verdicts(work: Work, number: int) -> tuple[np.ndarray, str]:
    """Verdicts of a range, as kept from its commit or from the comparison, and the
    sha256 of the file that keeps them.
    """
    if not work.comparison.needed:
        return np.zeros(0, compare.VERDICT_DTYPE), ""
    try:
        stored = work.storage.read(verdict_name(number))
    except FileNotFoundError:
        found = compare.gather(work.storage, COMPARE, work.comparison, number)
        file = io.BytesIO()
        np.save(file, found, allow_pickle=False)
        stored = file.getvalue()
        work.storage.write(verdict_name(number), stored)
    verdicts = np.load(io.BytesIO(stored), allow_pickle=False)
    return verdicts, hashlib.sha256(stored).hexdigest()


def _dropped(verdict: np.void) -> Dropped:
    reason = compare.KINDS[int(verdict["kind"])]
    return Dropped(
        status="filtered" if reason in _FILTERS else "duplicate",
        reason=reason,
        of=sample_key(int(verdict["of_range"]), int(verdict["of_position"])),
    )


def _apply(
    staged: StagedRange, dropped: Mapping[int, Dropped], source: Path, into: Path
) -> StagedRange:
    shards: list[StagedShard] = []
    rejected = dict(staged.rejected)
    for split in staged.rejected:
        _same(source / f"{split}{REJECTED}", into)
    for shard in staged.shards:
        left = without(source, into, shard.split, dropped)
        if left is None:
            table = into / f"{shard.split}{REJECTED}"
            rejected[shard.split] = file_sha256(table)
        else:
            shards.append(left)
    return dataclasses.replace(
        staged,
        shards=tuple(shards),
        rejected=dict(sorted(rejected.items())),
        accounting=_recounted(staged.accounting, list(dropped.values())),
    )


def _recounted(counts: Accounting, dropped: Sequence[Dropped]) -> Accounting:
    filtered = Counter(one.reason for one in dropped if one.status == "filtered")
    duplicates = len(dropped) - filtered.total()
    moved = Accounting(
        written=-len(dropped), filtered=dict(filtered), duplicates=duplicates
    )
    return counts + moved


def _same(path: Path, into: Path) -> None:
    try:
        os.link(path, into / path.name)
    except OSError:
        shutil.copyfile(path, into / path.name)


@contextlib.contextmanager
def _local(storage: Storage, staged: StagedRange) -> Iterator[Path]:
    """The staged files as a local directory."""
    if storage.path is not None:
        yield storage.path / staged.directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in staged.files():
            with storage.fetch(name) as path:
                shutil.copyfile(path, Path(folder) / Path(name).name)
        yield Path(folder)
