"""Is a shard as its manifest entry says? One shard, or one table of rejected inputs.

Owns the index check of a shard (digests, sizes, checksums of every span, headers, rows)
and how a damage is traced to its place. Does not own the dataset as a whole
(`pipeline.audit`), what a sample must say (`pipeline.audit_deep`) or walking headers
(`pipeline.tarwalk`). Memory: one sample, a batch of rows, and 16 bytes per input.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audit_tar import Checks, HashedFile, TarAudit
from pipeline.damages import Damage, Findings, first_difference
from pipeline.manifest import (
    INDEX_DTYPE,
    Shard,
    file_sha256,
    sample_key,
)
from pipeline.shards import WRITTEN
from pipeline.tarwalk import BadHeader, index_record, read_spans

_CHUNK = 1 << 20
_BATCH_ROWS = 512
_RANGE_DIGITS = len(sample_key(0, 0)) // 2
# Messages that end the list of a file's damages: more of them say nothing new.
_MOST_DAMAGES = 1000


def audit_shard(checks: Checks, shard: Shard) -> Findings:
    """Every damage of a shard's files, and what its index and table hold."""
    found = Findings(range=None if checks.indexed else shard.range)
    with contextlib.ExitStack() as stack:
        paths: dict[str, Path] = {}
        for name, file in shard.files.items():
            try:
                paths[name] = stack.enter_context(checks.storage.fetch(file))
            except FileNotFoundError:
                message = "the file is missing"
                found.damages.append(Damage(path=file, offset=None, message=message))
        _ShardAudit(checks, shard, paths, found).run()
    if len(found.damages) > _MOST_DAMAGES:
        more = f"{len(found.damages) - _MOST_DAMAGES} more damages in this shard"
        found.damages[_MOST_DAMAGES:] = [
            Damage(path=shard.name, offset=None, message=more)
        ]
    return found


def audit_table(checks: Checks, name: str, sha256: str) -> Findings:
    """Rows of a table of rejected inputs, which lies beside no shard."""
    digits = Path(name).name.removeprefix("range-")[:_RANGE_DIGITS]
    found = Findings(range=int(digits) if digits.isdecimal() else None)
    try:
        with checks.storage.fetch(name) as path:
            # Its damage is that of a file of the manifest, and named there.
            if file_sha256(path) == sha256:
                _read_rows(path, name, found)
                return found
    except FileNotFoundError:
        pass
    found.whole = False
    return found


class _ShardAudit:
    """The checks of one shard, which share its files."""

    def __init__(
        self, checks: Checks, shard: Shard, paths: Mapping[str, Path], found: Findings
    ) -> None:
        self._checks, self._shard, self._paths = checks, shard, paths
        self._found = found
        self._ids = _mapped(paths.get("ids"))

    def run(self) -> None:
        """Check everything that is there."""
        wrong = {name for name in self._paths if not self._matches(name)}
        sound = self._paths.keys() - wrong
        index = self._index() if "index" in sound else None
        if index is not None:
            self._found.uids = np.array(index["uid"])
        if "parquet" in sound:
            _read_rows(self._paths["parquet"], self._file("parquet"), self._found)
        else:
            self._found.whole = False
        if "tar" in self._paths:
            self._check_tar(index, sound)
        for name in sorted(wrong - {"tar"}):
            self._damage(
                name, "sha256 does not match the manifest", self._place(name, index)
            )
        # Tars of other makers may have samples that are in no index.
        if "idx" in sound and index is not None and not self._checks.indexed:
            self._check_offsets(index)
        if "stats" in sound:
            self._check_stats()

    def _matches(self, name: str) -> bool:
        # That of the tar is computed while its spans are read.
        return name == "tar" or (
            file_sha256(self._paths[name]) == self._shard.sha256[name]
        )

    def _file(self, name: str) -> str:
        return self._shard.files[name]

    def _damage(self, name: str, message: str, offset: int | None = None) -> None:
        path = self._file(name)
        self._found.damages.append(Damage(path=path, offset=offset, message=message))

    def _index(self) -> np.ndarray | None:
        """The records, memory-mapped; None where they are not what the schema says."""
        try:
            index = np.load(self._paths["index"], mmap_mode="r", allow_pickle=False)
        except ValueError:
            index = None
        expected = (self._shard.samples,)
        if index is None or index.dtype != INDEX_DTYPE or index.shape != expected:
            self._damage("index", f"not {self._shard.samples} records of the schema")
            return None
        return index

    def _place(self, name: str, index: np.ndarray | None) -> int | None:
        """First byte that differs, for a file that follows from a sound one."""
        if name == "idx" and index is not None:
            return first_difference(self._paths[name].read_bytes(), _offsets(index))
        return None

    def _check_offsets(self, index: np.ndarray) -> None:
        place = first_difference(self._paths["idx"].read_bytes(), _offsets(index))
        if place is not None:
            self._damage("idx", "offsets do not match the index", place)

    def _check_stats(self) -> None:
        try:
            stats = json.loads(self._paths["stats"].read_bytes())
            found = (stats["successes"], stats["captions"], stats["tokens"])
        except (ValueError, KeyError, TypeError):
            found = None
        shard = self._shard
        if found != (shard.samples, shard.captions, shard.tokens):
            self._damage("stats", "counts do not match the manifest")

    def _check_tar(self, index: np.ndarray | None, sound: set[str]) -> None:
        before = len(self._found.damages)
        size = self._paths["tar"].stat().st_size
        if size != self._shard.bytes:
            self._damage("tar", f"{size} bytes instead of {self._shard.bytes}")
        with self._paths["tar"].open("rb") as file:
            hashed = HashedFile(file)
            if index is not None:
                tar = TarAudit(self._checks, self._shard, self._ids, self._found)
                tar.check(hashed, index, self._rows(sound))
            digest = hashed.finish()
        if digest != self._shard.sha256["tar"]:
            if index is None and not self._checks.indexed:
                self._walk()
            if len(self._found.damages) == before:
                self._damage("tar", "sha256 does not match the manifest")
        elif index is None and "index" in self._paths and not self._checks.indexed:
            self._compare_index()

    def _walk(self) -> None:
        """A damaged tar without an index that leads on: its first bad header."""
        with self._paths["tar"].open("rb") as file:
            try:
                for _ in read_spans(file, self._checks.members):
                    pass
            except BadHeader as error:
                self._damage("tar", error.message, error.offset)

    def _compare_index(self) -> None:
        """Records of a damaged index against those that its sound tar gives."""
        try:
            given = np.load(self._paths["index"], mmap_mode="r", allow_pickle=False)
        except Exception:
            # numpy parses the header as Python, and raises whatever that does.
            return
        if given.dtype != INDEX_DTYPE:
            return
        with self._paths["tar"].open("rb") as file:
            spans = read_spans(file, self._checks.members)
            for number, (span, record) in enumerate(zip(spans, given, strict=False)):
                right = index_record(span, self._checks.image_format)
                for name, value in zip(INDEX_DTYPE.names or (), right, strict=True):
                    if record[name] != value:
                        self._damage(
                            "index",
                            f"record {number} ({span.key}): {name} is {record[name]}, "
                            f"the tar says {value}",
                        )

    def _rows(self, sound: set[str]) -> Iterator[Mapping[str, Any]]:
        """Rows of samples, in order; nothing where they are not wanted or damaged."""
        if self._checks.deep is None or "parquet" not in sound:
            return iter(())
        return _sample_rows(self._paths["parquet"])


def _offsets(index: np.ndarray) -> bytes:
    """Energon's file: where samples begin, and where the last one ends."""
    end = index["span_offset"][-1] + index["span_size"][-1]
    return np.append(index["span_offset"], end).astype("<u8").tobytes()


def _mapped(path: Path | None) -> np.ndarray | None:
    if path is None or not path.stat().st_size:
        return None
    return np.memmap(path, np.uint8, "r")


def _read_rows(path: Path, name: str, found: Findings) -> None:
    """Keys, counts and retries of a table."""
    keys: list[np.ndarray] = []
    columns = ["key", "status", "reason", "retry_of"]
    try:
        with pq.ParquetFile(path) as table:
            there = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(1 << 14, columns=there):
                values = batch.to_pydict()
                keys.append(_numbers(values["key"]))
                reasons = [reason or "" for reason in values["reason"]]
                found.counts.update(zip(values["status"], reasons, strict=True))
                found.retried += [key for key in values.get("retry_of", ()) if key]
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        message = f"the table cannot be read: {reason}"
        found.damages.append(Damage(path=name, offset=None, message=message))
        found.whole = False
    found.keys = np.concatenate([*keys, np.empty(0, np.uint64)])


def _sample_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(_BATCH_ROWS):
            yield from (row for row in batch.to_pylist() if row["status"] == WRITTEN)


def _numbers(keys: Sequence[str]) -> np.ndarray:
    """64-bit numbers (keys,): the contract's keys as they are, others hashed."""
    numbers = (
        int(key)
        if len(key) == 2 * _RANGE_DIGITS and key.isdecimal()
        else int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        for key in keys
    )
    return np.fromiter(numbers, np.uint64, len(keys))
