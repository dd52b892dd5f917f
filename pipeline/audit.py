"""Every check that a dataset is what its manifest says, over all its shards.

Owns the order of checks, running them side by side, and what only the whole shows:
identities and keys that occur twice, and inputs that are not accounted for. Does not
own one shard (`pipeline.audit_shard`) or files of no shard (`pipeline.audit_files`).
"""

from __future__ import annotations

import functools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.audit_files import check_files, check_state, check_strays, read_manifest
from pipeline.audit_shard import audit_shard, audit_table
from pipeline.audit_tar import Checks
from pipeline.damages import Damage, Findings
from pipeline.manifest import MANIFEST, Accounting, Manifest, Shard
from pipeline.shards import WRITTEN
from pipeline.storage import Storage
from pipeline.tokenizer import StoredTokenizer

_RANGE_DIGITS = 6


def audit(
    storage: Storage,
    *,
    deep: bool = False,
    workers: int = 1,
    on_bytes: Callable[[int], object] = lambda n_bytes: None,
) -> Iterator[Damage]:
    """Every damage of a dataset. `on_bytes` gets the tar bytes checked so far.

    Args:
        deep: also decode images, encode captions again, and compare what samples say.
        workers: shards checked at a time, each in a process of its own above 1.

    Raises:
        ValueError: there is no manifest to check against, or it cannot be read.
    """
    manifest, damages = read_manifest(storage)
    yield from damages
    broken = {damage.path for damage in damages}
    if MANIFEST in broken:
        # Whatever it says may be wrong, and would be blamed on others.
        return
    for damage in check_files(storage, manifest):
        broken.add(damage.path)
        yield damage
    yield from check_strays(storage, manifest)
    if deep:
        yield from check_state(storage, manifest)
    encoder = None
    # Encoding with a damaged tokenizer would blame every sample.
    if deep and not any(name.startswith(manifest.tokenizer.path) for name in broken):
        encoder = stored_tokenizer(storage, manifest)
    checks = Checks.of(storage, manifest, encoder)
    totals = _Totals(storage, manifest)
    for task, found in _findings(checks, manifest, workers):
        yield from found.damages
        totals.add(task, found)
        on_bytes(task.bytes if isinstance(task, Shard) else 0)
    yield from totals.damages()


def stored_tokenizer(storage: Storage, manifest: Manifest) -> StoredTokenizer:
    """The tokenizer of a dataset, on whatever storage it lies."""
    folder = manifest.tokenizer.path
    files = {
        name.removeprefix(f"{folder}/"): storage.read(name)
        for name in manifest.files
        if name.startswith(f"{folder}/")
    }
    return StoredTokenizer(files=files, info=manifest.tokenizer)


Task = Shard | tuple[str, str]


def _findings(
    checks: Checks, manifest: Manifest, workers: int
) -> Iterator[tuple[Task, Findings]]:
    """The check of every shard and table, in order."""
    tasks: list[Task] = list(manifest.shards)
    tasks += sorted(
        (name, digest)
        for name, digest in manifest.files.items()
        if name.endswith(".parquet")
    )
    check = functools.partial(_check, checks)
    if min(workers, len(tasks)) <= 1:
        yield from ((task, check(task)) for task in tasks)
        return
    # Spawned, not forked: threads of decoders and of fsspec do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context)
    try:
        yield from zip(tasks, pool.map(check, tasks), strict=True)
    except BrokenProcessPool as error:
        raise OSError(
            "a process that checked a shard died, most often of too little memory; "
            f"run it again with fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check(checks: Checks, task: Task) -> Findings:
    if isinstance(task, Shard):
        return audit_shard(checks, task)
    return audit_table(checks, *task)


class _Totals:
    """What only all shards together show. Memory: 16 bytes per input, and O(shards)."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._manifest = storage, manifest
        self._uids: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._tables: dict[int, list[str]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._retried: set[str] = set()
        self._whole = True

    def add(self, task: Task, found: Findings) -> None:
        """Count what a check found."""
        if isinstance(task, Shard):
            self._uids.append(found.uids)
        name = task.sidecar(".parquet") if isinstance(task, Shard) else task[0]
        if found.range is not None:
            self._tables.setdefault(found.range, []).append(name)
        self._keys.append(found.keys)
        self._counts += found.counts
        self._retried.update(found.retried)
        self._whole &= found.whole

    def damages(self) -> Iterator[Damage]:
        """Identities and keys that are not unique, and sums that are not right."""
        yield from self._repeated_uids()
        if not self._whole:
            # A table is damaged, and named; sums without it would only repeat that.
            return
        keys = np.concatenate([*self._keys, np.empty(0, np.uint64)])
        if not self._manifest.indexed:
            repeated = len(keys) - len(np.unique(keys))
            if repeated:
                message = f"{repeated} keys occur twice in the tables"
                yield Damage(path="*.parquet", offset=None, message=message)
        given, found = self._manifest.accounting, self._accounting()
        for name, value in asdict(given).items():
            if asdict(found)[name] != value:
                message = f"{name} {asdict(found)[name]}, the manifest has {value}"
                yield Damage(path="*.parquet", offset=None, message=message)

    def _repeated_uids(self) -> Iterator[Damage]:
        uids = np.concatenate([*self._uids, np.empty(0, np.uint64)])
        sorted_uids = np.sort(uids)
        repeated = np.unique(sorted_uids[1:][sorted_uids[1:] == sorted_uids[:-1]])
        if not len(repeated):
            return
        for shard, numbers in zip(self._manifest.shards, self._uids, strict=True):
            for place in np.flatnonzero(np.isin(numbers, repeated)).tolist():
                message = (
                    f"record {place}: uid {int(numbers[place]):016x} occurs twice in "
                    "the dataset"
                )
                yield Damage(path=shard.index, offset=None, message=message)

    def _accounting(self) -> Accounting:
        """What the rows add up to, each input by its last attempt (law 2)."""
        counts = self._counts - self._superseded()
        reasons: dict[str, dict[str, int]] = {"filtered": {}, "failed": {}}
        for (status, reason), count in sorted(counts.items()):
            if status in reasons:
                reasons[status][reason] = count
        return Accounting(
            inputs=sum(counts.values()),
            written=sum(n for (status, _), n in counts.items() if status == WRITTEN),
            duplicates=sum(
                n for (status, _), n in counts.items() if status == "duplicate"
            ),
            **reasons,
        )

    def _superseded(self) -> Counter[tuple[str, str]]:
        """Rows of inputs that a later row tries again."""
        counts: Counter[tuple[str, str]] = Counter()
        for number in sorted({int(key[:_RANGE_DIGITS]) for key in self._retried}):
            for name in self._tables.get(number, ()):
                for row in self._rows(name):
                    if row["key"] in self._retried:
                        counts[row["status"], row["reason"] or ""] += 1
        return counts

    def _rows(self, name: str) -> Sequence[dict[str, Any]]:
        with self._storage.fetch(name) as path:
            columns = ["key", "status", "reason"]
            return pq.read_table(path, columns=columns).to_pylist()
