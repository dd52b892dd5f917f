"""No damage passes: every changed byte is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.audit import Damage, audit
from pipeline.manifest import Shard, load_index, load_manifest
from tests.pipeline.corpora import run_module


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def damages(root: Path) -> list[Damage]:
    return list(audit(root, lambda n_bytes: None))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def first_shard(root: Path) -> Shard:
    return load_manifest(root).shards[0]


def test_a_sound_dataset_exits_0(dataset: Path) -> None:
    result = run_module("pipeline.validate", dataset)
    assert result.returncode == 0, result.stdout
    assert "sound; 24 samples" in result.stdout


def test_damage_exits_1_and_names_shard_and_offset(copy: Path) -> None:
    shard = first_shard(copy)
    record = load_index(copy, shard)[1]
    flip(copy / shard.name, int(record["jpg_offset"]) + 5)
    result = run_module("pipeline.validate", copy)
    assert result.returncode == 1
    assert f"{shard.name} offset {record['span_offset']}: sample 1" in result.stdout


def test_a_directory_that_is_no_dataset_exits_1(tmp_path: Path) -> None:
    result = run_module("pipeline.validate", tmp_path)
    assert result.returncode == 1
    assert "not a finished dataset" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_flipped_bit_in_any_header_is_named_by_its_offset(copy: Path) -> None:
    shard = first_shard(copy)
    path = copy / shard.name
    sound = path.read_bytes()
    record = load_index(copy, shard)[1]
    start, size = int(record["span_offset"]), int(record["span_size"])
    headers = [start, int(record["jpg_offset"]) - 512]
    assert start + size < len(sound)
    for header in headers:
        for place in (0, 13, 100, 124, 148, 156, 257, 300, 345, 511):
            flip(path, header + place)
            found = damages(copy)
            assert any(d.path == shard.name and d.offset == header for d in found), (
                place
            )
            # The samples around the damaged one are still checked, and sound.
            assert {d.offset for d in found} <= {None, header, start}
            path.write_bytes(sound)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_of_any_file_is_found(copy: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Plan and records in .palimpsest are the writer's own: no reader opens them.
    paths = [
        path
        for path in sorted(copy.rglob("*"))
        if path.is_file() and ".palimpsest" not in path.parts
    ]
    folders = {path.parent.name for path in paths}
    assert folders >= {"copy", "tokenizer", "rejected", ".nv-meta", "train", "val"}
    sounds = {path: path.read_bytes() for path in paths}
    for _ in range(3):
        # One bit of every file at once: each must be named, whatever else is wrong.
        for path, sound in sounds.items():
            if not path.name.startswith("manifest.json"):
                bit = int(generator.integers(8 * len(sound)))
                flip(path, bit // 8, bit % 8)
        found = {damage.path for damage in damages(copy)}
        names = {path.relative_to(copy).as_posix() for path in paths}
        assert names - found == {"manifest.json", "manifest.json.sha256"}
        for path, sound in sounds.items():
            path.write_bytes(sound)
    for name in ("manifest.json", "manifest.json.sha256"):
        for _ in range(20):
            bit = int(generator.integers(8 * len(sounds[copy / name])))
            flip(copy / name, bit // 8, bit % 8)
            with pytest.raises(ValueError, match="one of them is damaged"):
                damages(copy)
            (copy / name).write_bytes(sounds[copy / name])
    assert damages(copy) == []


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", ".parquet", ".tar.idx"])
def test_a_missing_or_short_file_is_found(copy: Path, suffix: str) -> None:
    shard = first_shard(copy)
    path = copy / shard.sidecar(suffix)
    path.write_bytes(path.read_bytes()[:-512])
    assert any(d.path == shard.sidecar(suffix) for d in damages(copy))
    path.unlink()
    found = [(d.path, d.message) for d in damages(copy)]
    assert (shard.sidecar(suffix), "the file is missing") in found


def test_a_damaged_index_is_named_by_its_record(copy: Path) -> None:
    shard = first_shard(copy)
    index = np.load(copy / shard.index)
    index["jpg_size"][2] += 1
    np.save(copy / shard.index, index)
    messages = [d.message for d in damages(copy) if d.path == shard.index]
    assert any("record 2" in message and "jpg_size" in message for message in messages)


def test_a_shard_that_the_manifest_does_not_name_is_found(copy: Path) -> None:
    shard = first_shard(copy)
    stray = copy / shard.split / "shard-000777.tar"
    shutil.copy(copy / shard.name, stray)
    (found,) = damages(copy)
    assert (found.path, found.message) == (
        f"{shard.split}/{stray.name}",
        "not in the manifest",
    )


def test_a_lost_table_of_rejected_inputs_is_found(copy: Path) -> None:
    lost = {f"rejected/{path.name}" for path in (copy / "rejected").iterdir()}
    assert lost
    shutil.rmtree(copy / "rejected")
    found = {(d.path, d.message) for d in damages(copy)}
    assert {(name, "the file is missing") for name in lost} <= found


def test_a_table_that_the_manifest_does_not_name_is_found(copy: Path) -> None:
    (table, *_) = sorted((copy / "rejected").iterdir())
    shutil.copy(table, table.with_name("range-000777-train.parquet"))
    (found,) = damages(copy)
    assert found.path == "rejected/range-000777-train.parquet"
    assert found.message == "not in the manifest"


def test_the_rows_of_a_dataset_are_its_inputs(copy: Path) -> None:
    """A table that was short from the start, its digest included."""
    shard = first_shard(copy)
    path = copy / shard.sidecar(".parquet")
    pq.write_table(pq.read_table(path)[1:], path)
    messages = [d.message for d in damages(copy)]
    assert "33 rows and 33 keys for 34 inputs" in messages
