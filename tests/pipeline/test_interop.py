"""Every loader that people use reads the same samples from the same shards.

webdataset, Hugging Face `datasets` and Ray Data always run. The others live in an
environment of their own, which `make interop` makes; without it they are skipped.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.index import IndexConfig
from pipeline.indexing import index
from pipeline.manifest import load_index, load_manifest
from tests.conftest import ROOT
from tests.pipeline.foreign import img2dataset_files, img2dataset_shard, write_tar
from tests.pipeline.peers import pixels

ENVIRONMENT = Path(os.environ.get("INTEROP", ROOT / ".venv-interop"))
ALWAYS = ("webdataset", "datasets", "ray")
# How each of the others is recognised below the environment.
INSTALLED = {
    "energon": "lib/python*/site-packages/megatron/energon",
    "dali": "lib/python*/site-packages/nvidia/dali",
    "open_clip": "open_clip/open_clip_train",
}


def skip_unless_installed(peer: str) -> None:
    if peer not in ALWAYS and not any(ENVIRONMENT.glob(INSTALLED[peer])):
        pytest.skip(f"{peer} is not installed; `make interop` does, and runs this")


def peer_environment(peer: str, cache: Path) -> dict[str, str]:
    """Variables for a peer's process: no hub, no caches at home."""
    path = str(ENVIRONMENT / "open_clip") if peer == "open_clip" else ""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    return {**os.environ, **offline, "PYTHONPATH": path}


def read(peer: str, folder: Path, split: str) -> tuple[list[dict[str, Any]], int]:
    """Samples of a split as the peer's loader gives them, and the count it tells."""
    python = sys.executable if peer in ALWAYS else ENVIRONMENT / "bin" / "python"
    script = Path(__file__).with_name("peers.py")
    done = subprocess.run(
        [str(python), str(script), peer, str(folder), split],
        env=peer_environment(peer, folder.parent / "cache"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    counts = [line["count"] for line in lines if "count" in line]
    samples = [line for line in lines if "count" not in line]
    return samples, counts[0] if counts else len(samples)


def stored(folder: Path, split: str) -> list[dict[str, Any]]:
    """The same from our index: digests of all members and of the pixels."""
    samples = []
    for shard in load_manifest(folder).split(split):
        tar = (folder / shard.name).read_bytes()
        for record in load_index(folder, shard):
            start, size = int(record["span_offset"]), int(record["span_size"])
            span = io.BytesIO(tar[start : start + size] + bytes(1024))
            sample: dict[str, Any] = {}
            with tarfile.open(fileobj=span) as found:
                for member in found:
                    key, _, name = member.name.partition(".")
                    data = found.extractfile(member).read()  # type: ignore[union-attr]
                    sample |= {"key": key, name: hashlib.sha256(data).hexdigest()}
                    if name == "jpg":
                        sample["pixels"] = pixels(data)
                    if name == "json":
                        fields = json.loads(data)
                        sample["caption"] = fields["caption"]
                        sample["uid"] = fields.get("uid")
            samples.append(sample)
    return samples


def comparable(samples: list[dict[str, Any]], names: Iterable[str]) -> list[list[Any]]:
    """What of the samples a peer tells, in an order of its own."""
    return sorted([sample[name] for name in sorted(names)] for sample in samples)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("peer", [*ALWAYS, *INSTALLED])
def test_a_peer_reads_the_same_keys_bytes_and_counts(
    shards: Path, tmp_path: Path, peer: str, split: str
) -> None:
    skip_unless_installed(peer)
    folder = tmp_path / "emoji"
    shutil.copytree(shards, folder)
    expected = stored(folder, split)
    samples, count = read(peer, folder, split)
    assert count == len(expected) == load_manifest(folder).samples(split) > 0
    told = samples[0]
    assert {"jpg", "txt"} <= told.keys() or {"pixels", "txt"} <= told.keys()
    assert comparable(samples, told) == comparable(expected, told)


@pytest.mark.parametrize("kind", ["ours", "gnu", "pax"])
def test_energons_own_index_is_ours(shards: Path, tmp_path: Path, kind: str) -> None:
    skip_unless_installed("energon")
    folder, bare = tmp_path / "indexed", tmp_path / "bare"
    if kind == "ours":
        shutil.copytree(shards, folder)
    else:
        form = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
        files = {"long" * 40 + n: d for n, d in img2dataset_files(range(5)).items()}
        # One that only we leave out: Energon counts what lies in the tar.
        files["broken.jpg"], files["broken.txt"] = b"no image", b"a bird"
        write_tar(folder / "train" / "a.tar", files, kind=form, folders=True)
        config = IndexConfig(dataset=str(folder), tokenizer="train:200", workers=1)
        assert index(config).accounting.failed == {"not_an_image": 1}
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        (bare / shard.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / shard.name, bare / shard.name)
    splits = sorted({shard.split for shard in manifest.shards})
    done = subprocess.run(
        [
            str(ENVIRONMENT / "bin" / "energon"),
            *("prepare", str(bare), "--non-interactive", "--num-workers=1"),
            *(f"--split-parts={split}:{split}/.*" for split in splits),
            *("--sample-type=CaptioningSample", "--no-progress"),
            '--field-map={"image": "jpg", "caption": "txt"}',
        ],
        env=peer_environment("energon", tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for shard in manifest.shards:
        ours, theirs = folder / shard.files["idx"], bare / shard.files["idx"]
        assert ours.read_bytes() == theirs.read_bytes()
    told = [json.loads((f / ".nv-meta/.info.json").read_text()) for f in (folder, bare)]
    assert told[0]["shard_counts"] == told[1]["shard_counts"]


@pytest.mark.parametrize("peer", ["webdataset", "datasets", "energon"])
def test_a_peer_reads_indexed_tars_as_the_trainer_does(
    tmp_path: Path, peer: str
) -> None:
    skip_unless_installed(peer)
    folder = tmp_path / "birds"
    for number in range(2):
        img2dataset_shard(folder / "train", number, range(number * 4, number * 4 + 4))
    index(IndexConfig(dataset=str(folder), tokenizer="train:200", workers=1))
    expected = stored(folder, "train")
    samples, count = read(peer, folder, "train")
    assert count == len(expected) == 8
    told = {"key", "jpg", "txt"}
    assert comparable(samples, told) == comparable(expected, told)
