"""Damaging copies of datasets, for the tests that look for damage."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import crc32c
import numpy as np

from pipeline.audit import audit
from pipeline.damages import Damage
from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    Manifest,
    Shard,
    file_sha256,
    load_manifest,
    manifest_from_json,
    manifest_seal,
)
from pipeline.shards import END_OF_TAR, member_header, members
from pipeline.storage import open_storage
from pipeline.tarwalk import BLOCK, Span, read_spans


def damages(root: Path, *, deep: bool = False) -> list[Damage]:
    """Every damage, found in this process."""
    return list(audit(open_storage(root), deep=deep))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def first_shard(root: Path) -> Shard:
    """The first shard of the manifest."""
    return load_manifest(root).shards[0]


def reseal(root: Path, **changes: object) -> None:
    """Give the manifest the digests that the shards' files have now, and a new seal: as
    if the dataset had been written like this.
    """
    value = json.loads((root / MANIFEST).read_bytes())
    for given in value["shards"]:
        shard = Shard(**given)
        given["bytes"] = (root / shard.name).stat().st_size
        given["sha256"] = {
            name: file_sha256(root / file) for name, file in shard.files.items()
        }
    manifest: Manifest = manifest_from_json(value | {"totals": totals_of(value)})
    text = dataclasses.replace(manifest, **changes).to_json().encode()
    (root / MANIFEST).write_bytes(text)
    (root / MANIFEST_SHA256).write_text(manifest_seal(text))


def rewrite_first(root: Path, member: str, change: Callable[[bytes], bytes]) -> str:
    """Change a member of the first sample, and everything that has a digest of it, as
    if it had been written like this; returns the name of the tar.
    """
    shard = first_shard(root)
    path, index_path = root / shard.name, root / shard.index
    with path.open("rb") as file:
        spans = list(read_spans(file, members("jpg")))
    payloads = {name: spans[0].payload(name) for name in members("jpg")}
    payloads[member] = change(payloads[member])
    first = b"".join(
        member_header(f"{spans[0].key}.{name}", len(data))
        + data
        + bytes(-len(data) % BLOCK)
        for name, data in payloads.items()
    )
    rest = b"".join(span.data for span in spans[1:])
    path.write_bytes(first + rest + END_OF_TAR)
    index = np.load(index_path)
    with path.open("rb") as file:
        for record, span in zip(index, read_spans(file, members("jpg")), strict=True):
            for name in ("span_offset", "span_size", "span_crc32c"):
                record[name] = span_record(span)[name]
            for part, name in (("jpg", "jpg"), ("ids", "input_ids.npy")):
                record[f"{part}_offset"], record[f"{part}_size"] = span.members[name]
                record[f"{part}_crc32c"] = crc32c.crc32c(span.payload(name))
    np.save(index_path, index)
    ends = np.append(index["span_offset"], len(first + rest)).astype("<u8")
    (root / shard.sidecar(".tar.idx")).write_bytes(ends.tobytes())
    reseal(root)
    return shard.name


def span_record(span: Span) -> dict[str, int]:
    """What the index says about a span as a whole."""
    return {
        "span_offset": span.offset,
        "span_size": len(span.data),
        "span_crc32c": crc32c.crc32c(span.data),
    }


def totals_of(value: dict) -> dict:
    """The sums of a manifest as JSON whose shards were changed."""
    totals: dict[str, dict[str, int]] = {}
    for shard in value["shards"]:
        row = totals.setdefault(shard["split"], {"shards": 0})
        row["shards"] += 1
        for key in ("samples", "captions", "tokens", "bytes"):
            row[key] = row.get(key, 0) + shard[key]
    return totals


def copied(dataset: Path, place: Path) -> Path:
    """A copy of a dataset to damage, and what lies beside it."""
    beside = dataset.with_name(f"{dataset.name}.progress.json")
    copy = Path(shutil.copytree(dataset, place))
    if beside.exists():
        shutil.copy(beside, copy.with_name(f"{copy.name}.progress.json"))
    return copy
