"""A dataset directory being written: what is committed, and what comes next.

Owns `.palimpsest/` (plan, commit records, staging), the commit of staged ranges in
order, resuming, and the files of the finished dataset. Does not own who may write
(`pipeline.lease`) or what is in a shard (`pipeline.shards`). After `kill -9` at any
moment the directory holds committed ranges, and nothing that needs cleaning by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.companions import companion_files
from pipeline.config import differences
from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    SCHEMA_VERSION,
    TOKENIZER,
    Accounting,
    Manifest,
    Shard,
    canonical_json,
    file_sha256,
    load_manifest,
    manifest_seal,
    shard_name,
)
from pipeline.ranges import StagedRange
from pipeline.shards import SUFFIXES, StagedShard
from pipeline.tokenizer import StoredTokenizer, read_tokenizer

STATE = ".palimpsest"
# Says, while a run is under way, that the root was made by this command.
_OURS = "made-the-directory"


@dataclass(frozen=True, kw_only=True)
class RangeRecord:
    """A committed range. A shard exists when the record that names it does."""

    range: int
    rows: int
    accounting: Accounting
    shards: tuple[Shard, ...]
    rejected: Mapping[str, str]
    """Tables of rejected inputs that lie beside no shard, and their sha256."""


class DatasetWriter:
    """The directory of one dataset, from its first file to its manifest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / STATE
        self.staging = self.state / "staging"
        self.lease_path = self.state / "lease.json"
        self.records: list[RangeRecord] = []

    def stored_plan(self) -> dict[str, Any] | None:
        """What an earlier run wrote down before its first range; None for a new one.

        Raises:
            ValueError: the directory holds something that is not ours.
        """
        self._refuse_unusable()
        path = self.state / "plan.json"
        if path.is_file():
            return json.loads(path.read_text())
        found = set(os.listdir(self.root)) if self.root.is_dir() else set()
        # An earlier run may have died between its first files and its plan.
        if found and (STATE not in found or found - {STATE, TOKENIZER}):
            raise ValueError(
                f"--output {self.root} is not empty and no dataset of this command; "
                "choose a new directory"
            )
        return None

    def refuse_other(
        self, transform: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> None:
        """Raise ValueError unless the stored plan is of the same transform."""
        changed = list(differences(stored["transform"], transform))
        if changed:
            raise ValueError(
                f"--output {self.root} was made with another configuration "
                f"({'; '.join(changed)}); choose a new --output, go back to that "
                "configuration, or delete the directory"
            )

    def _refuse_unusable(self) -> None:
        """Raise ValueError where no directory can be, or none that can be read."""
        if os.path.exists(self.root) and not self.root.is_dir():
            raise ValueError(f"--output {self.root} is a file; choose a directory")
        if self.root.is_dir() and not _allowed(self.root, os.R_OK | os.X_OK):
            raise ValueError(
                f"--output {self.root} cannot be read by this user; choose another or "
                "change its permissions"
            )

    def refuse_unwritable(self) -> None:
        """Raise ValueError where the directory cannot be made or written in."""
        place = self.state
        while not os.path.exists(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(
                f"--output {self.root} cannot be made: {place} is a file; choose "
                "another --output"
            )
        if not _allowed(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"--output {self.root} cannot be written: no permission to write in "
                f"{place}, or it is mounted read-only; choose another --output or "
                "change that"
            )

    def finished(self) -> Manifest | None:
        """The manifest of a complete dataset, None where there is none yet. One without
        any sample is a run that died while it was removed.
        """
        try:
            manifest = load_manifest(self.root)
        except ValueError:
            return None
        return manifest if manifest.accounting.written else None

    def missing_file(self, manifest: Manifest) -> str | None:
        """A file of the manifest that is gone or cut short, if any. Looks at names and
        sizes only: bytes are checked by `pipeline.audit`.
        """
        for name in manifest.files:
            if not (self.root / name).is_file():
                return name
        found = (self._missing(shard) for shard in manifest.shards)
        return next((name for name in found if name), None)

    def left_behind(self) -> bool:
        """Is there anything that a driver killed after its last file left?"""
        marks = (self.staging, self.lease_path, self.state / _OURS)
        return any(map(os.path.exists, marks)) or any(self.state.glob("lease-*"))

    def tidy(self) -> None:
        """Remove what only a run under way needs. The caller holds the lease."""
        (self.state / _OURS).unlink(missing_ok=True)
        shutil.rmtree(self.staging, ignore_errors=True)

    def stored_tokenizer(self) -> StoredTokenizer:
        """The tokenizer that an earlier run wrote before its plan."""
        return read_tokenizer(self.root / TOKENIZER)

    def create(self) -> None:
        """Make the directory, so that a lease can be taken in it."""
        ours = not self.root.exists()
        self.state.mkdir(parents=True, exist_ok=True)
        if ours:
            (self.state / _OURS).touch()

    def begin(self, plan: Mapping[str, Any], tokenizer: StoredTokenizer) -> None:
        """Write the plan, or go on from the records of an earlier run."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()
        (self.state / "ranges").mkdir(exist_ok=True)
        self._write_tokenizer(tokenizer)
        if not (self.state / "plan.json").exists():
            self.write(f"{STATE}/plan.json", canonical_json(plan))
        while (path := self._record_path(len(self.records))).exists():
            self.records.append(_read_record(path))

    def stored_duplicates(self) -> np.ndarray | None:
        """Inputs (N,) found to be duplicates across splits by an earlier run."""
        path = self.state / "duplicates.npy"
        return np.load(path) if path.exists() else None

    def store_duplicates(self, duplicate: np.ndarray) -> None:
        """Keep the result of the digest pass, which reads the whole corpus."""
        temporary = self.staging / "duplicates.npy"
        np.save(temporary, duplicate)
        os.replace(temporary, self.state / "duplicates.npy")

    def commit(self, staged: StagedRange, source: str) -> RangeRecord:
        """Move a staged range into place, numbers following in range order, and then
        write its record. Killed in between, the next run moves the same files again.
        """
        if staged.number != len(self.records):
            raise ValueError(f"range {staged.number} committed out of order")
        (self.accounting() + staged.accounting).check()
        shards = tuple(
            _entry(staged, shard, source, self._next_number(shard.split))
            for shard in staged.shards
        )
        rejected = _rejected(staged)
        self._place(staged, shards)
        record = RangeRecord(
            range=staged.number,
            rows=staged.rows,
            accounting=staged.accounting,
            shards=shards,
            rejected=rejected,
        )
        path = self._record_path(record.range)
        self.write(
            path.relative_to(self.root).as_posix(),
            canonical_json(dataclasses.asdict(record)),
        )
        self.records.append(record)
        shutil.rmtree(staged.directory, ignore_errors=True)
        return record

    def damaged_ranges(self) -> list[int]:
        """Committed ranges of which a file is gone or cut short."""
        return [
            record.range
            for record in self.records
            if any(self._missing(shard) for shard in record.shards)
            or not all((self.root / name).is_file() for name in record.rejected)
        ]

    def restore(self, staged: StagedRange) -> None:
        """Put the files of a committed range that was made again in their places.

        Raises:
            ValueError: they are not the files that were lost.
        """
        record = self.records[staged.number]
        was = [(shard.split, shard.sha256) for shard in record.shards]
        now = [(shard.split, shard.sha256) for shard in staged.shards]
        if was != now or record.rejected != _rejected(staged):
            raise ValueError(
                f"{self.root} lacks files of range {staged.number}, and its inputs "
                "give others now: images of the corpus changed; choose a new --output"
            )
        self._place(staged, record.shards)
        shutil.rmtree(staged.directory, ignore_errors=True)

    def accounting(self) -> Accounting:
        """Counts of the committed ranges."""
        return sum((record.accounting for record in self.records), Accounting())

    def write_manifest(
        self,
        plan: Mapping[str, Any],
        tokenizer: StoredTokenizer,
        *,
        complete: bool,
        companions: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Write the manifest of what is committed, and its seal. Raises ValueError if
        the accounting does not add up.
        """
        accounting = self.accounting()
        accounting.check()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            complete=complete,
            shards=tuple(shard for record in self.records for shard in record.shards),
            sources={plan["source"]: 1.0},
            accounting=accounting,
            rows=sum(record.rows for record in self.records),
            tokenizer=tokenizer.info,
            transform=plan["transform"],
            transform_sha256=plan["transform_sha256"],
            files=self._digests(tokenizer, companions or {}),
        )
        self.write(MANIFEST, manifest.to_json())
        self.write(MANIFEST_SHA256, manifest_seal(manifest.to_json().encode()))
        return manifest

    def finish(self, plan: Mapping[str, Any], tokenizer: StoredTokenizer) -> Manifest:
        """Write the companions and, last, the complete manifest."""
        manifest = self.write_manifest(plan, tokenizer, complete=False)
        companions = companion_files(manifest)
        for path, text in companions.items():
            self.write(path, text)
        manifest = self.write_manifest(
            plan, tokenizer, complete=True, companions=companions
        )
        self.tidy()
        return manifest

    def abandon(self) -> None:
        """Remove everything but what says whose it was, for a run that cannot make a
        dataset. Killed at any moment, it leaves a run that can be continued: records
        vanish at once, the plan after all that belongs to it, and a tokenizer without a
        plan is no obstacle.
        """
        for name in (MANIFEST, MANIFEST_SHA256):
            (self.root / name).unlink(missing_ok=True)
        for path in self.root.iterdir():
            if path.name not in (STATE, TOKENIZER):
                _remove(path)
        self.staging.mkdir(exist_ok=True)
        os.replace(self.state / "ranges", self.staging / "ranges")
        (self.state / "duplicates.npy").unlink(missing_ok=True)
        (self.state / "plan.json").unlink(missing_ok=True)
        _remove(self.root / TOKENIZER)
        _remove(self.staging)

    def remove_emptied(self) -> None:
        """Remove the directories of an abandoned run, once the lease is given back; the
        root only where it was made by this command.
        """
        ours = self.state / _OURS
        emptied = [self.state, self.root] if ours.exists() else [self.state]
        ours.unlink(missing_ok=True)
        # Another driver may have begun here already.
        with contextlib.suppress(OSError):
            for path in emptied:
                path.rmdir()

    def write(self, name: str, text: str) -> None:
        """Write a file below the root so that it is there whole or not at all."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        # In the staging directory: a run killed here leaves nothing beside the data.
        temporary = self.staging / uuid.uuid4().hex
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)

    def _digests(
        self, tokenizer: StoredTokenizer, companions: Mapping[str, str]
    ) -> dict[str, str]:
        """sha256 of every file that is no shard's, by path. The plan and the records in
        `.palimpsest/` are the writer's own and not part of the dataset.
        """
        files = {f"{TOKENIZER}/{name}": data for name, data in tokenizer.files.items()}
        files |= {name: text.encode() for name, text in companions.items()}
        digests = {
            name: hashlib.sha256(data).hexdigest() for name, data in files.items()
        }
        for record in self.records:
            digests |= record.rejected
        return digests

    def _record_path(self, number: int) -> Path:
        return self.state / "ranges" / f"{number:06d}.json"

    def _next_number(self, split: str) -> int:
        return sum(shard.split == split for r in self.records for shard in r.shards)

    def _missing(self, shard: Shard) -> str | None:
        """A file of the shard that is gone or cut short."""
        for suffix in SUFFIXES:
            path = self.root / shard.sidecar(suffix)
            size = path.stat().st_size if path.is_file() else 0
            if not size or (suffix == ".tar" and size != shard.bytes):
                return shard.sidecar(suffix)
        return None

    def _place(self, staged: StagedRange, shards: Iterable[Shard]) -> None:
        for shard in shards:
            (self.root / shard.split).mkdir(exist_ok=True)
            for suffix in SUFFIXES:
                target = self.root / shard.sidecar(suffix)
                os.replace(staged.directory / f"{shard.split}{suffix}", target)
            _sync_directory(self.root / shard.split)
        for split in staged.rejected:
            target = self.root / _rejected_name(staged, split)
            target.parent.mkdir(exist_ok=True)
            os.replace(staged.directory / f"{split}.rejected.parquet", target)

    def _write_tokenizer(self, tokenizer: StoredTokenizer) -> None:
        """File by file, so that a tokenizer that a plan rests on is never gone."""
        staged, target = self.staging / TOKENIZER, self.root / TOKENIZER
        tokenizer.write(staged)
        if not (self.state / "plan.json").exists():
            _remove(target)
        target.mkdir(exist_ok=True)
        for path in sorted(staged.iterdir()):
            os.replace(path, target / path.name)


def _entry(staged: StagedRange, shard: StagedShard, source: str, number: int) -> Shard:
    """The manifest's entry of a staged shard that becomes `number` of its split."""
    name = shard_name(shard.split, number)
    return Shard(
        name=name, source=source, range=staged.number, **dataclasses.asdict(shard)
    )


def _rejected_name(staged: StagedRange, split: str) -> str:
    return f"rejected/range-{staged.number:06d}-{split}.parquet"


def _rejected(staged: StagedRange) -> dict[str, str]:
    """sha256 of the staged tables of rejected inputs, by their path in the dataset."""
    return {
        _rejected_name(staged, split): file_sha256(
            staged.directory / f"{split}.rejected.parquet"
        )
        for split in staged.rejected
    }


def _read_record(path: Path) -> RangeRecord:
    value = json.loads(path.read_text())
    return RangeRecord(
        range=value["range"],
        rows=value["rows"],
        accounting=Accounting(**value["accounting"]),
        shards=tuple(Shard(**shard) for shard in value["shards"]),
        rejected=value["rejected"],
    )


def _allowed(path: Path, mode: int) -> bool:
    # The user that files are written as, who may not be the one that logged in.
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
