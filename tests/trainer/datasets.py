"""Datasets of several sources, and datasets that are still being written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    Accounting,
    Manifest,
    load_manifest,
    manifest_seal,
)
from tests.conftest import EMOJI, emoji_shards


def slices(folder: Path, *rows: int) -> list[Path]:
    """Tables of consecutive rows of the bundled corpus."""
    table, start, found = pq.read_table(EMOJI), 0, []
    for number, count in enumerate(rows):
        path = folder / f"part{number}.parquet"
        pq.write_table(table.slice(start, count), path)
        found.append(path)
        start += count
    return found


def preprocess(output: Path, *words: str, tokenizer: Path) -> Path:
    """Shards of 16 samples at 32 px, all in `train`."""
    return emoji_shards(
        output,
        "--shard.samples=16",
        f"--tokenizer={tokenizer}",
        "--split.val=0",
        "--workers=1",
        *words,
    )


def growing_copy(dataset: Path, copy: Path) -> Manifest:
    """A copy of a dataset that `show` lets grow; the finished manifest."""
    shutil.copytree(dataset, copy)
    return load_manifest(dataset)


def repaired(whole: Manifest) -> Manifest:
    """The manifest once the first tar has other bytes, and as many samples."""
    first = whole.shards[0]
    first = dataclasses.replace(first, sha256={**first.sha256, "tar": "0" * 64})
    return dataclasses.replace(whole, shards=(first, *whole.shards[1:]))


def show(copy: Path, whole: Manifest, shards: int) -> None:
    """Write the manifest that preprocessing would have written after so many shards:
    complete only with the last.
    """
    kept = whole.shards[:shards]
    written = sum(shard.samples for shard in kept)
    manifest = whole
    if shards < len(whole.shards):
        manifest = dataclasses.replace(
            whole,
            complete=False,
            shards=kept,
            rows=written,
            accounting=Accounting(inputs=written, written=written),
        )
    text = manifest.to_json().encode()
    for name, data in ((MANIFEST, text), (MANIFEST_SHA256, None)):
        temporary = copy / f".{name}.new"
        temporary.write_bytes(data or manifest_seal(text).encode())
        temporary.replace(copy / name)
