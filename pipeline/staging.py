"""Ranges that are done but not yet in the dataset, as they lie on storage.

Owns the record of a staged range, its directory, and their names below `.palimpsest/`.
Does not own how a range is made (`pipeline.ranges`) or committed (`pipeline.dataset`).
A staged range is durable: a driver that dies loses none of them.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.manifest import Accounting, canonical_json
from pipeline.shards import REJECTED, SUFFIXES, StagedShard
from pipeline.storage import STATE, Storage

CANDIDATES = f"{STATE}/candidates"
COMPARE = f"{STATE}/compare"
SIGNATURES = "signatures.npy"
# sha256 of every file in `.palimpsest/` of a finished dataset.
SEALS = f"{STATE}/files.json"
# Lies there while a driver may still want what tasks stage.
RUNNING = f"{STATE}/running"


class TakenOver(ValueError):
    """Another driver owns the output now: nothing in it may be touched any more."""


@dataclass(frozen=True, kw_only=True)
class StagedRange:
    """A range whose files lie in a directory of its own, not yet in the dataset."""

    number: int
    run: str
    """The transform's sha256: what an older configuration staged does not count."""
    directory: str
    rows: int
    accounting: Accounting
    shards: tuple[StagedShard, ...]
    rejected: Mapping[str, str]
    """sha256 of the table of each split of which the range kept nothing."""
    retried: Mapping[str, int]
    """For a retry: how its inputs had failed before, counted by reason."""
    verdicts: str = ""
    """sha256 of what the comparison said, once there was one."""

    def files(self) -> list[str]:
        """Names of all files, below the storage's root."""
        names = [
            f"{self.directory}/{shard.split}{suffix}"
            for shard in self.shards
            for suffix in SUFFIXES
        ]
        return names + [
            f"{self.directory}/{split}{REJECTED}" for split in self.rejected
        ]


def new_directory(stage: str, number: int) -> str:
    """Name of a directory that no other attempt shares."""
    return f"{stage}/{number:06d}-{uuid.uuid4().hex}"


def record_name(stage: str, number: int) -> str:
    """Name of the record that makes a staged range exist."""
    return f"{stage}/{number:06d}.json"


def read_staged(
    storage: Storage, stage: str, number: int, run: str
) -> StagedRange | None:
    """The range as this run staged it, or None where it is not there or has lost a
    file.
    """
    try:
        value = json.loads(storage.read(record_name(stage, number)))
    except FileNotFoundError:
        return None
    if value.get("run") != run:
        return None
    staged = _from_json(value)
    if all(storage.size(name) is not None for name in staged.files()):
        return staged
    return None


def write_staged(storage: Storage, stage: str, staged: StagedRange) -> StagedRange:
    """Make a staged range exist, or return the one that another attempt made first."""
    name = record_name(stage, staged.number)
    text = canonical_json(dataclasses.asdict(staged)).encode()
    if storage.create(name, text):
        return staged
    first = read_staged(storage, stage, staged.number, staged.run)
    if first is None:
        # The one that was there has lost files, or is of another run.
        storage.write(name, text)
        return staged
    if first.directory != staged.directory:
        storage.remove_tree(staged.directory)
    return first


def _from_json(value: Mapping[str, Any]) -> StagedRange:
    fields = {
        **value,
        "accounting": Accounting(**value["accounting"]),
        "shards": tuple(StagedShard(**shard) for shard in value["shards"]),
    }
    return StagedRange(**fields)
