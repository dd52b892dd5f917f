"""The manifest holds what the contract promises, and refuses what it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.manifest import (
    SHARD_FILES,
    Accounting,
    Manifest,
    Shard,
    TokenizerInfo,
    canonical_json,
    load_manifest,
    manifest_from_json,
    manifest_seal,
)

SHARD = Shard(
    name="train/shard-000000.tar",
    split="train",
    source="birds",
    range=0,
    samples=3,
    captions=5,
    tokens=40,
    bytes=10_240,
    sha256=dict.fromkeys(SHARD_FILES, "00"),
)
HELD_OUT = dataclasses.replace(
    SHARD, name="val/shard-000000.tar", split="val", samples=1, captions=1
)
MANIFEST = Manifest(
    schema_version=1,
    complete=True,
    shards=(SHARD, HELD_OUT),
    sources={"birds": 1.0},
    accounting=Accounting(inputs=4, written=4),
    rows=6,
    tokenizer=TokenizerInfo(
        path="tokenizer", sha256="00", vocab_size=9, special_ids={"pad": 0}
    ),
    transform={},
    transform_sha256="00",
    files={"README.md": "00"},
)


def written(root: Path, text: str) -> Path:
    (root / "manifest.json").write_text(text)
    (root / "manifest.json.sha256").write_text(manifest_seal(text.encode()))
    return root


def test_totals_of_every_split_stand_in_the_file(tmp_path: Path) -> None:
    value = json.loads(MANIFEST.to_json())
    assert value["totals"] == {
        "train": {
            "shards": 1,
            "samples": 3,
            "captions": 5,
            "tokens": 40,
            "bytes": 10_240,
        },
        "val": {
            "shards": 1,
            "samples": 1,
            "captions": 1,
            "tokens": 40,
            "bytes": 10_240,
        },
    }
    loaded = load_manifest(written(tmp_path, MANIFEST.to_json()))
    assert loaded == MANIFEST
    assert loaded.sha256 == MANIFEST.sha256


@pytest.mark.parametrize("key", ["shards", "samples", "captions", "tokens", "bytes"])
def test_totals_that_the_shards_do_not_add_up_to_are_refused(
    tmp_path: Path, key: str
) -> None:
    value = json.loads(MANIFEST.to_json())
    value["totals"]["train"][key] += 1
    with pytest.raises(ValueError, match="its shards add up to"):
        load_manifest(written(tmp_path, canonical_json(value)))
    del value["totals"]
    with pytest.raises(ValueError, match="its shards add up to"):
        manifest_from_json(value)


def test_a_shard_without_a_digest_of_every_file_is_refused() -> None:
    value = json.loads(MANIFEST.to_json())
    del value["shards"][0]["sha256"]["stats"]
    with pytest.raises(ValueError, match="preprocess the corpus again"):
        manifest_from_json(value)


@pytest.mark.parametrize("seal", [b"", b"\n", b"\xff\xfe", b"00  manifest.json\n"])
def test_a_damaged_seal_is_one_clear_line(tmp_path: Path, seal: bytes) -> None:
    root = written(tmp_path, MANIFEST.to_json())
    (root / "manifest.json.sha256").write_bytes(seal)
    with pytest.raises(ValueError, match=r"preprocess` again to rewrite both"):
        load_manifest(root)
