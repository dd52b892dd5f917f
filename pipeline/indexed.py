"""The files of a dataset whose tars were there before: manifest, seal, companions.

Owns putting them together out of the records of the tars, and where files of others go
whose names they need. Does not own the records (`pipeline.indexing`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.companions import EnergonFields, companion_files
from pipeline.index_tar import SET_ASIDE, TarRecord, mapped
from pipeline.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    MANIFEST_SHA256,
    SCHEMA_VERSION,
    TOKENIZER,
    Accounting,
    Manifest,
    Shard,
    canonical_json,
    manifest_seal,
)
from pipeline.staging import SEALS, STATE
from pipeline.storage import Storage
from pipeline.tokenizer import StoredTokenizer, read_tokenizer

INDEX_PLAN = f"{STATE}/index.json"
# One for every tar.
RECORDS = f"{STATE}/indexed"
# Names of image members that Energon is told at most: they may differ in every sample.
_IMAGES = 256
# Identities compared at a time, of 8 bytes each.
_UIDS = 1 << 24


def finish(
    storage: Storage,
    records: Sequence[TarRecord],
    transform: Mapping[str, Any],
    tokenizer: StoredTokenizer,
) -> Manifest:
    """Write the companions and, last, the manifest and its seal.

    Raises:
        ValueError: nothing could be indexed, or samples occur in two tars.
    """
    accounting = sum((record.accounting for record in records), Accounting())
    if not accounting.written:
        reasons = {**accounting.filtered, **accounting.failed}
        raise ValueError(
            f"none of {accounting.inputs} samples could be indexed: "
            + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        )
    kept = [record for record in records if record.samples]
    _refuse_repeats(storage, kept)
    files = {f"{TOKENIZER}/{name}": data for name, data in tokenizer.files.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for record in records:
        if not record.samples:
            # No shard, but known: its table, and the tar itself.
            for name, file in record.files.items():
                digests[file] = record.sha256[name]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        complete=True,
        shards=tuple(_shard(record, number) for number, record in enumerate(kept)),
        sources=dict.fromkeys(sorted({record.source for record in kept}), 1.0),
        accounting=accounting,
        rows=accounting.inputs,
        tokenizer=tokenizer.info,
        transform=transform,
        transform_sha256=transform_digest(transform),
        files=digests,
        indexed=True,
    )
    for name, text in companion_files(manifest, _energon(kept)).items():
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
        place(storage, name, text.encode())
    _write(storage, SEALS, _state_digests(storage))
    manifest = dataclasses.replace(manifest, files=dict(sorted(digests.items())))
    data = manifest.to_json().encode()
    _write(storage, MANIFEST, data)
    _write(storage, MANIFEST_SHA256, manifest_seal(data).encode())
    return manifest


def _state_digests(storage: Storage) -> bytes:
    """What `pipeline.validate --deep` finds damage of the state by."""
    names = [INDEX_PLAN, *storage.names(RECORDS)]
    return canonical_json(
        {name: hashlib.sha256(storage.read(name)).hexdigest() for name in names}
    ).encode()


def place(storage: Storage, name: str, data: bytes) -> None:
    """Write a file, moving one of somebody else out of the way, once."""
    if storage.size(name) is not None and storage.read(name) != data:
        target = f"{SET_ASIDE}/{name}"
        if storage.size(target) is None and storage.size(MANIFEST) is None:
            storage.move(name, target)
    _write(storage, name, data)


def stored_tokenizer(storage: Storage) -> StoredTokenizer:
    """The tokenizer of a dataset, wherever that lies.

    Raises:
        ValueError: it is gone or damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.names(TOKENIZER):
            if name.endswith(".json"):
                (Path(folder) / Path(name).name).write_bytes(storage.read(name))
        return read_tokenizer(Path(folder), f"{storage.url}/{TOKENIZER}")


def trained_vocabulary(given: str) -> int:
    """N of `train:N`."""
    found = re.fullmatch(r"train:(\d+)", given)
    if not found or not 64 <= int(found[1]) <= 1 << 20:
        raise ValueError(
            f"--tokenizer {given!r}: N in train:N is a number of vocabulary entries "
            "from 64 up, such as train:8000"
        )
    return int(found[1])


def transform_digest(transform: Mapping[str, Any]) -> str:
    """Hex sha256 of a transform."""
    return hashlib.sha256(canonical_json(transform).encode()).hexdigest()


def _write(storage: Storage, name: str, data: bytes) -> None:
    """A second run changes nothing, the time of a file included."""
    if storage.size(name) is None or storage.read(name) != data:
        storage.write(name, data)


def _shard(record: TarRecord, number: int) -> Shard:
    return Shard(
        name=record.name,
        split=record.split,
        source=record.source,
        range=number,
        samples=record.samples,
        captions=record.captions,
        tokens=record.tokens,
        bytes=record.bytes,
        sha256=record.sha256,
    )


def _energon(records: Sequence[TarRecord]) -> EnergonFields:
    found = {name for record in records for name in record.images}
    # A comma stands between two names. The plain ones first, should there be many.
    images = sorted(found, key=lambda name: ("." in name, name))
    images = [name for name in images if "," not in name][:_IMAGES]
    captions = {place for record in records for place in record.caption_fields}
    # The plain text first: several fields may be there.
    order = sorted(captions, key=lambda place: (place.startswith("json"), place))
    return EnergonFields(
        image=",".join(images),
        caption=",".join(order),
        shard_counts={record.name: record.physical for record in records},
    )


def _refuse_repeats(storage: Storage, records: Sequence[TarRecord]) -> None:
    """Samples that this pipeline wrote bring their identity along, and a copy of a tar
    brings the same ones. Looks at a part of all identities at a time.
    """
    parts = sum(record.samples for record in records) // _UIDS + 1
    for part in range(parts):
        uids = []
        for record in records:
            with mapped(storage, record.files["index"]) as data:
                found = _uids(data, record.samples)
                uids.append(found[found % np.uint64(parts) == part])
        whole = np.concatenate(uids)
        values, counts = np.unique(whole, return_counts=True)
        if len(values) == len(whole):
            continue
        repeated = values[counts > 1][0]
        names = [
            record.name
            for record, found in zip(records, uids, strict=True)
            if repeated in found
        ]
        raise ValueError(
            f"uid {int(repeated):016x} and {len(whole) - len(values) - 1} more occur "
            f"twice, in {' and '.join(names)}: one tar is a copy of the other, remove "
            "it"
        )


def _after(npy: memoryview, samples: int) -> int:
    """Where the records of an index begin: they are its end."""
    return len(npy) - samples * INDEX_DTYPE.itemsize


def _uids(npy: memoryview, samples: int) -> np.ndarray:
    index = np.frombuffer(npy, INDEX_DTYPE, offset=_after(npy, samples))
    return np.array(index["uid"])
