"""The manifest holds what the contract promises, and refuses what it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit import audit
from pipeline.inspect_data import read_view
from pipeline.inspect_page import page
from pipeline.inspect_text import summary
from pipeline.manifest import (
    IDS_FILES,
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
from pipeline.storage import open_storage
from tests.pipeline.damage import copied

DIGEST = "0f" * 32
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SHARD = Shard(
    name="train/shard-000000.tar",
    split="train",
    source="birds",
    range=0,
    samples=3,
    captions=5,
    tokens=40,
    bytes=10_240,
    sha256=dict.fromkeys(SHARD_FILES, DIGEST),
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
        path="tokenizer", sha256=DIGEST, vocab_size=9, special_ids=SPECIAL_IDS
    ),
    transform={},
    transform_sha256=DIGEST,
    files={"README.md": DIGEST, "tokenizer/tokenizer.json": DIGEST},
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


INDEXED = dataclasses.replace(
    MANIFEST,
    indexed=True,
    shards=(
        dataclasses.replace(
            SHARD,
            name="a folder/00012.v2.tar",
            sha256=dict.fromkeys([*SHARD_FILES, *IDS_FILES], DIGEST),
        ),
        dataclasses.replace(HELD_OUT, name="00000.tar"),
    ),
)


def test_indexed_tars_keep_their_names_and_may_have_a_sidecar_with_ids() -> None:
    loaded = manifest_from_json(json.loads(INDEXED.to_json()))
    assert loaded == INDEXED
    assert loaded.shards[0].ids == "a folder/00012.v2.ids"
    assert loaded.shards[0].files["tar"] == "a folder/00012.v2.tar"
    assert loaded.shards[1].ids is None
    assert set(loaded.shards[1].files) == set(SHARD_FILES)


@pytest.mark.parametrize(
    "name",
    [
        *("../00000.tar", "/data/00000.tar", "a/../../b.tar", "a//b.tar", "./b.tar"),
        *("a\\b.tar", "a\nb.tar", "00000.zip", "", "a folder/00012.v2.tar"),
    ],
)
def test_no_name_leaves_the_folder_or_occurs_twice(name: str) -> None:
    value = json.loads(INDEXED.to_json())
    value["shards"][1]["name"] = name
    with pytest.raises(ValueError, match=r"index the folder,? again"):
        manifest_from_json(value)


def test_the_contracts_names_stay_strict() -> None:
    for shard in INDEXED.shards:
        value = json.loads(dataclasses.replace(INDEXED, shards=(shard,)).to_json())
        value["indexed"] = False
        with pytest.raises(ValueError, match=r"is not a shard of split|has digests of"):
            manifest_from_json(value)


def leaves(value: Any, *place: Any) -> Iterator[tuple[Any, ...]]:
    """Places of everything in parsed JSON, mappings and lists themselves included."""
    yield place
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from leaves(item, *place, key)


def replaced(value: Any, place: tuple[Any, ...], item: Any) -> Any:
    """A copy of parsed JSON with something else at a place."""
    if not place:
        return item
    value = value.copy()
    value[place[0]] = replaced(value[place[0]], place[1:], item)
    return value


WRONG = (None, -1, 10**18, 1.5, "x", "", "\ud800", [], {}, [[]], {"x": {}}, True)


def test_whatever_a_sealed_manifest_says_is_read_or_one_clear_line(
    dataset: Path, tmp_path: Path
) -> None:
    copy = copied(dataset, tmp_path / "copy")
    value = json.loads((copy / "manifest.json").read_bytes())
    places = [
        place
        for place in leaves(value)
        # Shards are alike, and so are the files of each corpus.
        if place[:1] != ("shards",) or place[1:2] in ((), (0,))
    ]
    assert len(places) > 100
    storage = open_storage(copy)
    refused: Counter[Any] = Counter()
    for place, item in itertools.product(places, WRONG):
        written(copy, canonical_json(replaced(value, place, item)))
        try:
            load_manifest(copy)
        except ValueError:
            refused[place[:1]] += 1
            continue
        if place[0] == "transform" and place[1:2] != ("image",):
            continue
        with contextlib.suppress(ValueError):
            list(audit(storage))
        with contextlib.suppress(ValueError):
            view = read_view(storage, rows=10, samples=1)
            summary(view)
            page(view)
    assert refused[("tokenizer",)] > 5 * len(WRONG)
    assert refused[("shards",)] > 10 * len(WRONG)


@pytest.mark.parametrize("levels", [20, 900, 100_000])
def test_nesting_that_cannot_be_walked_is_one_clear_line(
    levels: int, tmp_path: Path
) -> None:
    deep = '{"a": ' * levels + "1" + "}" * levels
    text = MANIFEST.to_json().replace('"transform": {}', f'"transform": {deep}')
    assert deep in text
    with pytest.raises(ValueError, match=r"bring back a sound copy|nested too deep"):
        load_manifest(written(tmp_path, text))
