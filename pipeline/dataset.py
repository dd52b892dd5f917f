"""A dataset being written: what is committed, and what comes next.

Owns `.palimpsest/` (plan, commit records), the commit of settled ranges in order,
resuming, and the files of the finished dataset. Does not own who may write
(`pipeline.lease`), what is in a shard (`pipeline.shards`), staging (`pipeline.staging`)
or the files of retries (`pipeline.attempts`). After `kill -9` at any moment storage
holds committed ranges and staged ones, and nothing that needs cleaning by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.attempts import RETRIES, retried_ranges, retry_names, unrecorded
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
    manifest_from_json,
    manifest_seal,
    shard_name,
)
from pipeline.plan import Plan, read_table
from pipeline.records import RangeRecord, read_record, record_text
from pipeline.settle import SETTLED, Placement, rejected_name, verdict_name
from pipeline.shards import SUFFIXES
from pipeline.staging import (
    CANDIDATES,
    COMPARE,
    RUNNING,
    SEALS,
    STATE,
    StagedRange,
    TakenOver,
)
from pipeline.storage import STAGING, Storage
from pipeline.storage_local import local_path
from pipeline.tokenizer import StoredTokenizer, read_tokenizer

PLAN = f"{STATE}/plan.json"
TABLE = f"{STATE}/plan.npy"
RECORDS = f"{STATE}/ranges"
SPOOL = f"{STATE}/spool"
# Everything that only a run under way needs.
_TRANSIENT = (CANDIDATES, COMPARE, SETTLED, STAGING, SPOOL)
# Small reads under way at once: on an object store they cost mostly waiting.
_READERS = 16


class DatasetWriter:
    """The folder of one dataset, from its first file to its manifest."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.records: list[RangeRecord] = []
        self._versions: dict[str, str | None] = {}

    def stored_plan(self) -> dict[str, Any] | None:
        """What an earlier run wrote down before its first range; None for a new one.

        Raises:
            ValueError: the folder holds something that is not ours.
        """
        path = self.storage.path
        if path is not None and not path.exists():
            self.refuse_unwritable()
        if path is not None and path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is a file; choose a directory")
        if path is not None and path.is_dir() and not _allowed(path, os.R_OK | os.X_OK):
            raise ValueError(
                f"--output {path} cannot be read by this user; choose another or "
                "change its permissions"
            )
        try:
            return json.loads(self.storage.read(PLAN))
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise ValueError(
                f"{PLAN} in --output {self.storage.url} is damaged ({error}); delete "
                "the folder, or choose a new --output"
            ) from error
        for name in self.storage.names():
            # An earlier run may have died between its first files and its plan.
            if not name.startswith((f"{STATE}/", f"{TOKENIZER}/")):
                raise ValueError(
                    f"--output {self.storage.url} is not empty and no dataset of this "
                    f"command ({name} lies in it); choose a new folder"
                )
        return None

    def refuse_unwritable(self) -> None:
        """Raise ValueError where a local folder cannot be made or written in; a remote
        one says so at the first write.
        """
        if self.storage.path is None:
            return
        root = place = self.storage.path / STATE
        while not os.path.exists(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(
                f"--output {root.parent} cannot be made: {place} is a file; choose "
                "another --output"
            )
        if not _allowed(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"--output {root.parent} cannot be written: no permission to write in "
                f"{place}, or it is mounted read-only; choose another --output or "
                "change that"
            )

    def refuse_other(
        self, transform: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> None:
        """Raise ValueError unless the stored plan is of the same transform."""
        changed = list(differences(stored["transform"], transform))
        if changed:
            raise ValueError(
                f"--output {self.storage.url} was made with another configuration "
                f"({'; '.join(changed)}); choose a new --output, go back to that "
                "configuration, or delete the folder"
            )

    def finished(self) -> Manifest | None:
        """The manifest of a complete dataset, None where there is none yet. One without
        any sample is a run that died while it was removed.
        """
        try:
            text = self.storage.read(MANIFEST)
            if self.storage.read(MANIFEST_SHA256) != manifest_seal(text).encode():
                return None
            manifest = manifest_from_json(json.loads(text))
        except (FileNotFoundError, ValueError):
            return None
        return manifest if manifest.complete and manifest.accounting.written else None

    def missing_file(self, manifest: Manifest) -> str | None:
        """A file of the manifest that is gone or cut short, if any. Looks at names and
        sizes only: bytes are checked by `pipeline.audit`.
        """
        sizes = self.storage.sizes()
        names = (name for name in manifest.files if name not in sizes)
        cut = (name for shard in manifest.shards for name in _missing(shard, sizes))
        return next(chain(names, cut), None)

    def retry_begun(self) -> bool:
        """Was a retry begun that is not part of the finished dataset yet?"""
        total = len(retried_ranges(self.storage))
        if not total:
            return False
        last = json.loads(self.storage.read(SEALS))
        plan = json.loads(self.storage.read(PLAN))
        return self._record_name(plan["ranges"] + total - 1) not in last

    def left_behind(self) -> bool:
        """Is there anything that a driver killed after its last file left?"""
        left = (f"{name}/" for name in _TRANSIENT)
        marks = (RUNNING, f"{STATE}/lease", *left)
        return any(name.startswith(marks) for name in self.storage.names(STATE))

    def tidy(self) -> None:
        """Remove what only a run under way needs. The caller holds the lease."""
        self.storage.remove(RUNNING)
        for name in _TRANSIENT:
            self.storage.remove_tree(name)
        for name in unrecorded(self.storage.names(RETRIES)):
            self.storage.remove(name)

    def stored_tokenizer(self) -> StoredTokenizer:
        """The tokenizer that an earlier run wrote before its plan.

        Raises:
            ValueError: it is gone or damaged.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name in self.storage.names(TOKENIZER):
                data = self.storage.read(name)
                (Path(folder) / name.rpartition("/")[2]).write_bytes(data)
            return read_tokenizer(Path(folder), f"{self.storage.url}/{TOKENIZER}")

    def read_plan(self, described: Mapping[str, Any]) -> Plan | None:
        """The plan of an earlier run, None where its table is missing or damaged."""
        try:
            table = read_table(self.storage.read(TABLE))
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return Plan(table=table, split_names=tuple(described["splits"]))

    def begin(
        self, described: Mapping[str, Any], plan: Plan, tokenizer: StoredTokenizer
    ) -> None:
        """Write the plan, or go on from the records of an earlier run."""
        text = canonical_json(described).encode()
        new = self.storage.size(PLAN) is None
        if not new and self.storage.read(PLAN) != text:
            raise TakenOver(
                f"another configuration was started in {self.storage.url} meanwhile; "
                "choose a new --output"
            )
        self.storage.write(RUNNING, described["transform_sha256"].encode())
        for name, data in tokenizer.files.items():
            self.storage.write(f"{TOKENIZER}/{name}", data)
        if new:
            for name in self.storage.names(TOKENIZER):
                if name.removeprefix(f"{TOKENIZER}/") not in tokenizer.files:
                    self.storage.remove(name)
        if new or self._stored_table() != plan.table_bytes():
            self.storage.write(TABLE, plan.table_bytes())
        if new and not self.storage.create(PLAN, text):
            raise TakenOver(
                f"another driver started in {self.storage.url} meanwhile; run the same "
                "command again once it is done"
            )
        self._read_records()

    def commit(
        self, staged: StagedRange, shards: Sequence[Shard], verdicts: str
    ) -> RangeRecord:
        """Write the record of a range whose files are in place, in range order. Killed
        before, the next run copies the same files again.
        """
        if staged.number != len(self.records):
            raise ValueError(f"range {staged.number} committed out of order")
        record = RangeRecord(
            range=staged.number,
            rows=staged.rows,
            accounting=staged.accounting,
            shards=tuple(shards),
            rejected={
                rejected_name(split, staged.number): digest
                for split, digest in sorted(staged.rejected.items())
            },
            retried=staged.retried,
            verdicts=verdicts,
        )
        staged.accounting.check()
        samples = sum(shard.samples for shard in shards)
        if samples != staged.accounting.written:
            raise ValueError(
                f"range {staged.number} has {samples} samples, but accounts for "
                f"{staged.accounting.written}; run the same command again"
            )
        name, text = self._record_name(record.range), record_text(record)
        if not self.storage.create(name, text) and self.storage.read(name) != text:
            raise TakenOver(
                f"another driver committed {name} to {self.storage.url}, so this one "
                "stops; nothing that it committed is lost"
            )
        self.records.append(record)
        return record

    def _stored_table(self) -> bytes | None:
        try:
            return self.storage.read(TABLE)
        except FileNotFoundError:
            return None

    def names_for(self, staged: StagedRange, taken: dict[str, int]) -> Placement:
        """Names of a range's shards, numbers following those `taken` in each split."""
        names = {}
        for shard in staged.shards:
            number = taken.get(shard.split, 0)
            names[shard.split] = shard_name(shard.split, number)
            taken[shard.split] = number + 1
        return Placement(staged=staged, names=names)

    def taken(self) -> dict[str, int]:
        """Shards committed in each split."""
        counts: dict[str, int] = {}
        for record in self.records:
            for shard in record.shards:
                counts[shard.split] = counts.get(shard.split, 0) + 1
        return counts

    def damaged_ranges(self) -> list[int]:
        """Committed ranges of which a file is gone or cut short."""
        sizes = self.storage.sizes()

        def whole(record: RangeRecord) -> bool:
            missing = any(
                True for shard in record.shards for _ in _missing(shard, sizes)
            )
            return not missing and sizes.keys() >= record.rejected.keys()

        return [record.range for record in self.records if not whole(record)]

    def restored(self, staged: StagedRange) -> Placement:
        """Where the files of a committed range go that was made again.

        Raises:
            ValueError: they are not the files that were lost.
        """
        record = self.records[staged.number]
        was = {shard.split: dict(shard.sha256) for shard in record.shards}
        now = {shard.split: dict(shard.sha256) for shard in staged.shards}
        if was != now or list(record.rejected.values()) != list(
            staged.rejected.values()
        ):
            raise ValueError(
                f"{self.storage.url} lacks files of range {staged.number}, and its "
                "inputs give others now: images of the corpus changed; choose a new "
                "--output"
            )
        names = {shard.split: shard.name for shard in record.shards}
        return Placement(staged=staged, names=names)

    def accounting(self) -> Accounting:
        """Counts of the committed ranges, every input once."""
        total = sum((record.net() for record in self.records), Accounting())
        failed = {reason: count for reason, count in total.failed.items() if count}
        return dataclasses.replace(total, failed=failed)

    def write_manifest(
        self,
        described: Mapping[str, Any],
        tokenizer: StoredTokenizer,
        *,
        complete: bool,
        companions: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Write the manifest of what is committed, and its seal. Raises ValueError if
        the accounting does not add up, or another driver wrote one meanwhile.
        """
        accounting = self.accounting()
        accounting.check()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            complete=complete,
            shards=tuple(shard for record in self.records for shard in record.shards),
            sources=described["sources"],
            accounting=accounting,
            rows=sum(record.rows for record in self.records if not record.retried),
            tokenizer=tokenizer.info,
            transform=described["transform"],
            transform_sha256=described["transform_sha256"],
            files=self._digests(tokenizer, companions or {}),
        )
        text = manifest.to_json().encode()
        self._replace(MANIFEST, text)
        self._replace(MANIFEST_SHA256, manifest_seal(text).encode())
        return manifest

    def finish(
        self, described: Mapping[str, Any], tokenizer: StoredTokenizer
    ) -> Manifest:
        """Write the companions and, last, the complete manifest."""
        manifest = self.write_manifest(described, tokenizer, complete=False)
        companions = companion_files(manifest)
        for name, text in companions.items():
            self.storage.write(name, text.encode())
        self.storage.write(SEALS, self._seals())
        manifest = self.write_manifest(
            described, tokenizer, complete=True, companions=companions
        )
        self.tidy()
        return manifest

    def abandon(self) -> None:
        """Remove everything, for a run that cannot make a dataset. Killed at any
        moment, it leaves a run that can be continued: the plan goes after all that
        rests on it, and a tokenizer without a plan is no obstacle.
        """
        for name in (MANIFEST, MANIFEST_SHA256):
            self.storage.remove(name)
        for name in self._top():
            if name not in (STATE, TOKENIZER):
                self.storage.remove_tree(name)
                self.storage.remove(name)
        # Last to first: what is left is always a run that can go on.
        for name in reversed(self.storage.names(RECORDS)):
            self.storage.remove(name)
        for name in (*_TRANSIENT, RETRIES, f"{STATE}/verdicts"):
            self.storage.remove_tree(name)
        for name in (SEALS, TABLE, PLAN, RUNNING):
            self.storage.remove(name)
        self.storage.remove_tree(TOKENIZER)
        self.records = []

    def _top(self) -> list[str]:
        """What lies directly in the folder, empty folders included."""
        if self.storage.path is not None:
            return sorted(path.name for path in self.storage.path.iterdir())
        return sorted({name.partition("/")[0] for name in self.storage.names()})

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file that only this driver may change meanwhile."""
        found = self.storage.read_version(name)
        current = found[1] if found else None
        if name in self._versions and self._versions[name] != current:
            done = False
        elif found is None:
            done = self.storage.create(name, data)
        else:
            done = self.storage.replace(name, data, found[1])
        if not done:
            raise TakenOver(
                f"another driver wrote {name} in {self.storage.url}, so this one "
                "stops; nothing that it committed is lost"
            )
        written = self.storage.read_version(name)
        self._versions[name] = written[1] if written else None

    def _read_records(self) -> None:
        names = [name for name in self.storage.names(RECORDS) if name.endswith(".json")]
        with ThreadPoolExecutor(_READERS) as pool:
            texts = dict(zip(names, pool.map(self.storage.read, names), strict=True))
        self.records = []
        while (text := texts.get(self._record_name(len(self.records)))) is not None:
            self.records.append(read_record(text))

    def _digests(
        self, tokenizer: StoredTokenizer, companions: Mapping[str, str]
    ) -> dict[str, str]:
        """sha256 of every file that is no shard's, by path. What lies in `.palimpsest/`
        is the writer's own and not part of the dataset.
        """
        files = {f"{TOKENIZER}/{name}": data for name, data in tokenizer.files.items()}
        files |= {name: text.encode() for name, text in companions.items()}
        digests = {name: _sha256(data) for name, data in files.items()}
        for record in self.records:
            digests |= record.rejected
        return digests

    def _seals(self) -> bytes:
        digests = {
            self._record_name(record.range): _sha256(record_text(record))
            for record in self.records
        }
        digests |= {
            verdict_name(record.range): record.verdicts
            for record in self.records
            if record.verdicts
        }
        digests |= {one.file: one.sha256 for one in retried_ranges(self.storage)}
        for name in (PLAN, TABLE, *retry_names(self.storage)):
            digests[name] = _sha256(self.storage.read(name))
        return canonical_json(digests).encode()

    def _record_name(self, number: int) -> str:
        return f"{RECORDS}/{number:06d}.json"


def _missing(shard: Shard, sizes: Mapping[str, int]) -> Iterator[str]:
    """Files of a shard that are gone or cut short."""
    for suffix in SUFFIXES:
        size = sizes.get(shard.sidecar(suffix))
        if not size or (suffix == ".tar" and size != shard.bytes):
            yield shard.sidecar(suffix)


def _allowed(path: Path, mode: int) -> bool:
    """What the effective user may do, where the system tells that apart."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def refuse_inside_dataset(output: str) -> None:
    """Raise ValueError where `output` lies in another dataset, whose files it would be
    taken for.
    """
    path = local_path(output)
    for folder in path.resolve().parents if path is not None else ():
        if (folder / MANIFEST).is_file() and (folder / STATE).is_dir():
            raise ValueError(
                f"--output {output} lies in the dataset {folder}, which it would "
                "damage; choose an --output outside of it"
            )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
