"""A dataset directory being written: what is committed, and what comes next.

Owns `.palimpsest/` (plan, commit records, staging), the commit of staged ranges in
order, resuming, and the files of the finished dataset. Does not own who may write
(`pipeline.lease`) or what is in a shard (`pipeline.shards`). After `kill -9` at any
moment the directory holds committed ranges, and nothing that needs cleaning by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
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
        self._created = not root.exists()

    def stored_plan(self) -> dict[str, Any] | None:
        """What an earlier run wrote down before its first range; None for a new one.

        Raises:
            ValueError: the directory holds something that is not ours.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"--output {self.root} is a file; choose a directory")
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

    def finished(self) -> Manifest | None:
        """The manifest, if the dataset is complete and undamaged at this level."""
        try:
            return load_manifest(self.root)
        except ValueError:
            return None

    def stored_tokenizer(self) -> StoredTokenizer:
        """The tokenizer that an earlier run wrote before its plan."""
        return read_tokenizer(self.root / TOKENIZER)

    def create(self) -> None:
        """Make the directory, so that a lease can be taken in it."""
        self.state.mkdir(parents=True, exist_ok=True)

    def begin(self, plan: Mapping[str, Any], tokenizer: StoredTokenizer) -> None:
        """Write the plan, or go on from the records of an earlier run."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()
        (self.state / "ranges").mkdir(exist_ok=True)
        if not (self.state / "plan.json").exists():
            staged = self.staging / TOKENIZER
            tokenizer.write(staged)
            shutil.rmtree(self.root / TOKENIZER, ignore_errors=True)
            os.replace(staged, self.root / TOKENIZER)
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
        shards = tuple(
            self._place(staged, shard, source, self._next_number(shard.split))
            for shard in staged.shards
        )
        rejected = dict(
            self._place_rejected(staged, split) for split in staged.rejected
        )
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
        shutil.rmtree(self.staging, ignore_errors=True)
        return manifest

    def abandon(self) -> None:
        """Remove everything, for a run that cannot make a dataset."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        if self._created:
            self.root.rmdir()

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

    def _place(
        self, staged: StagedRange, shard: StagedShard, source: str, number: int
    ) -> Shard:
        name = shard_name(shard.split, number)
        entry = Shard(
            name=name, source=source, range=staged.number, **dataclasses.asdict(shard)
        )
        (self.root / shard.split).mkdir(exist_ok=True)
        for suffix in SUFFIXES:
            target = self.root / entry.sidecar(suffix)
            os.replace(staged.directory / f"{shard.split}{suffix}", target)
        _sync_directory(self.root / shard.split)
        return entry

    def _place_rejected(self, staged: StagedRange, split: str) -> tuple[str, str]:
        name = f"rejected/range-{staged.number:06d}-{split}.parquet"
        (self.root / "rejected").mkdir(exist_ok=True)
        os.replace(staged.directory / f"{split}.rejected.parquet", self.root / name)
        return name, file_sha256(self.root / name)


def _read_record(path: Path) -> RangeRecord:
    value = json.loads(path.read_text())
    return RangeRecord(
        range=value["range"],
        rows=value["rows"],
        accounting=Accounting(**value["accounting"]),
        shards=tuple(Shard(**shard) for shard in value["shards"]),
        rejected=value["rejected"],
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
