"""Mending a damaged dataset: nothing is guessed, everything has a digest to meet.

Owns rewriting files that follow from sound ones (offsets, index, counts, companions,
seal), turning back single flipped bits, putting damaged files aside in
`DATASET.quarantine`, and having the rest made again. Does not own finding damage
(`pipeline.audit`) or making shards: that is the preprocess command, which completes a
dataset that lacks files byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow.parquet as pq
import yaml

from pipeline.audit_files import (
    is_leftover,
    read_manifest,
    read_seals,
    sealed_digest,
)
from pipeline.bitrot import SMALL_BYTES, mend_tar, mended
from pipeline.companions import companion_files
from pipeline.damages import Damage
from pipeline.lease import Lease
from pipeline.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    MANIFEST_SHA256,
    TOKENIZER_JSON,
    Manifest,
    Shard,
    file_sha256,
    manifest_seal,
)
from pipeline.shards import StagedShard, members, shard_stats
from pipeline.storage import STATE, Storage, open_storage
from pipeline.stored_config import given_config, stored_config
from pipeline.tarwalk import index_record, read_spans
from pipeline.tokenizer import read_tokenizer

Say = Callable[[str], None]
# Where a file arrives in the quarantine before it gets its name.
_ASIDE = ".palimpsest/aside"


def repair(
    storage: Storage,
    find: Callable[[], Sequence[Damage]],
    *,
    config: str | None,
    say: Say,
) -> list[str]:
    """Mend the damages that `find` finds, and return what was done, a line each. Nobody
    else writes the dataset from before they are looked for until they are mended or put
    aside: what a run under way has not told the manifest yet is no damage.

    Args:
        config: YAML file of the preprocess command; None for what the run's progress
            file says.
        say: gets every line at once.

    Raises:
        ValueError: a driver is at work.
    """
    Lease(storage).refuse_if_held()
    # Of nothing but a dataset.
    done = mend_manifest(storage, say)
    read_manifest(storage)
    with Lease(storage):
        mending = _Repair(storage, say)
        left = mending.mend(find())
    if left:
        # That command takes the lease for itself.
        mending.restore(left, config)
    return done + mending.done


def mend_manifest(storage: Storage, say: Say) -> list[str]:
    """Turn back a flipped bit of the manifest, which all else rests on; what was done.

    A larger manifest is written again by the preprocess command, from its records.
    """
    digest = sealed_digest(storage)
    size = storage.size(MANIFEST)
    if digest is None or size is None or size > SMALL_BYTES:
        return []
    text = storage.read(MANIFEST)
    right = None
    if hashlib.sha256(text).hexdigest() != digest:
        right = mended(text, digest)
    if right is None:
        return []
    storage.write(MANIFEST, right)
    line = f"{MANIFEST}: flipped bit turned back"
    say(line)
    return [line]


class _Repair:
    def __init__(self, storage: Storage, say: Say) -> None:
        self._storage, self._say = storage, say
        self._manifest, _ = read_manifest(storage)
        self._seals = read_seals(storage)
        self._shards = {
            file: (name, shard)
            for shard in self._manifest.shards
            for name, file in shard.files.items()
        }
        self.done: list[str] = []

    def mend(self, damages: Sequence[Damage]) -> list[str]:
        """Rewrite or put aside; returns what is to be restored."""
        left = []
        for path in sorted({damage.path for damage in damages}):
            if self._is_sound(path):
                self._tell(f"{path}: the file is as it was written, and stays")
            elif not self._rewrite(path):
                left.append(path)
        if self._manifest.indexed:
            left = [path for path in left if self._is_ours(path)]
        if left:
            self._put_aside(left)
        # What no digest is known of is gone for good, as it should be, unless it tells
        # what a run is made of.
        ours = () if self._manifest.indexed else (f"{STATE}/", "tokenizer/", MANIFEST)
        return [path for path in left if self._digest(path) or path.startswith(ours)]

    def _tell(self, line: str) -> None:
        self.done.append(line)
        self._say(line)

    def _digest(self, path: str) -> str | None:
        """What the manifest says about a file."""
        if path in self._shards:
            name, shard = self._shards[path]
            return shard.sha256[name]
        return self._manifest.files.get(path) or self._seals.get(path)

    def _is_ours(self, path: str) -> bool:
        """May a file be moved out of an indexed folder? Not one of somebody else's: the
        folder was theirs before, and nothing would bring it back.
        """
        if self._digest(path) is not None or path.startswith(f"{STATE}/"):
            return True
        if is_leftover(self._storage, path):
            return True
        if self._storage.size(path) is not None:
            self._tell(f"{path}: no digest of it is known, and it stays")
        return False

    def _is_sound(self, path: str) -> bool:
        digest = self._digest(path)
        try:
            with self._storage.fetch(path) as local:
                return digest is not None and file_sha256(local) == digest
        except (FileNotFoundError, ValueError):
            # Nor is a folder, or `*.parquet` for all tables, a file to be mended.
            return False

    def _rewrite(self, path: str) -> bool:
        """Write a file anew from others, or with one bit flipped back, where that gives
        what the manifest names.
        """
        if path == MANIFEST_SHA256:
            # A seal that is gone or slipped: the manifest was found to be sound.
            text = manifest_seal(self._storage.read(MANIFEST)).encode()
            self._storage.write(path, text)
            self._tell(f"{path}: rewritten from {MANIFEST}")
            return True
        digest = self._digest(path)
        if digest is None:
            return False
        for origin, make in self._origins(path):
            with contextlib.suppress(ValueError, OSError, KeyError):
                data = make()
                if hashlib.sha256(data).hexdigest() == digest:
                    self._storage.write(path, data)
                    self._tell(f"{path}: rewritten from {origin}")
                    return True
        if self._flip_back(path, digest):
            self._tell(f"{path}: flipped bits turned back")
            return True
        return False

    def _flip_back(self, path: str, digest: str) -> bool:
        """Turn back flipped bits: one in each sample of a tar, one in a small file."""
        if self._storage.size(path) is None:
            return False
        name, shard = self._shards.get(path, ("", None))
        if name != "tar" or shard is None:
            size = self._storage.size(path) or 0
            whole = self._storage.read(path) if size <= SMALL_BYTES else b""
            data = mended(whole, digest) if whole else None
            if data is not None:
                self._storage.write(path, data)
            return data is not None
        if self._manifest.indexed or self._storage.size(path) != shard.bytes:
            return False
        folder = str(PurePosixPath(path).parent)
        with tempfile.TemporaryDirectory() as place, contextlib.suppress(ValueError):
            copy = Path(place) / PurePosixPath(path).name
            with self._storage.fetch(path) as local:
                shutil.copyfile(local, copy)
            if mend_tar(copy, _sound_index(self._storage, shard), digest):
                with self._storage.stage(folder) as staged:
                    shutil.move(copy, staged / copy.name)
                return True
        return False

    def _origins(self, path: str) -> list[tuple[str, Callable[[], bytes]]]:
        """Where the bytes of a file could come from, and how."""
        manifest, storage = self._manifest, self._storage
        if path in self._seals:
            return []
        folder = manifest.tokenizer.path
        companions = companion_files(manifest)
        if path in companions:
            return [(MANIFEST, companions[path].encode)]
        if path.startswith(f"{folder}/") and not path.endswith(TOKENIZER_JSON):
            origin = f"{folder}/{TOKENIZER_JSON}"
            return [(origin, lambda: _tokenizer_file(storage, manifest, path))]
        if path not in self._shards:
            return []
        name, shard = self._shards[path]
        makers: dict[str, tuple[str, Callable[[], bytes]]] = {
            "idx": (shard.index, lambda: _offsets(storage, shard)),
            "index": (shard.name, lambda: _index(storage, manifest, shard)),
            "stats": (shard.sidecar(".parquet"), lambda: _stats(storage, shard)),
        }
        return [makers[name]] if name in makers else []

    def _put_aside(self, paths: Sequence[str]) -> None:
        """Move damaged files into the quarantine, one folder deep as they lay."""
        aside = open_storage(f"{self._storage.url}.quarantine")
        for path in paths:
            # Names of damages need not be those of files.
            if path.startswith("*") or self._storage.size(path) is None:
                continue
            name = PurePosixPath(path).name
            with self._storage.fetch(path) as local, aside.stage(_ASIDE) as folder:
                shutil.copyfile(local, folder / name)
            # Files are staged in folders only, and this one may lie in none.
            aside.move(f"{_ASIDE}/{name}", path)
            self._storage.remove(path)
            self._tell(f"{path}: moved to {aside.url}")

    def restore(self, paths: Sequence[str], config: str | None) -> None:
        """Have the preprocess command make again what is gone."""
        try:
            restore(self._storage, config)
            again = sum(self._storage.size(path) is not None for path in paths)
            self._tell(f"{again} files made again from the corpus")
        except (ValueError, OSError) as error:
            shards = {
                shard.name: shard.samples
                for _, shard in (
                    self._shards[path] for path in paths if path in self._shards
                )
            }
            lost = f"{sum(shards.values())} samples in {len(shards)} shards"
            self._tell(
                f"not made again: {error}. {lost if shards else 'No samples'} are "
                "missing now; bring the corpus back and run the preprocess command, or "
                "put the files back from the quarantine"
            )


def restore(storage: Storage, config: str | None) -> None:
    """Run the preprocess command of a dataset again, which makes lost files anew.

    Raises:
        ValueError: its configuration is not known or not run unasked, or the corpus is
            not what it was.
    """
    from pipeline import preprocess

    values = given_config(config) if config else stored_config(storage)
    values |= {"output": storage.url, "dry_run": False, "retry_failed": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocess.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        # Its summary is no part of what this command prints.
        with contextlib.redirect_stdout(sys.stderr):
            preprocess.main([f"--config={path}"])


def _offsets(storage: Storage, shard: Shard) -> bytes:
    index = _sound_index(storage, shard)
    end = index["span_offset"][-1] + index["span_size"][-1]
    return np.append(index["span_offset"], end).astype("<u8").tobytes()


def _sound_index(storage: Storage, shard: Shard) -> np.ndarray:
    data = storage.read(shard.index)
    if hashlib.sha256(data).hexdigest() != shard.sha256["index"]:
        raise ValueError(f"{shard.index} is damaged")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _index(storage: Storage, manifest: Manifest, shard: Shard) -> bytes:
    """The index of a tar of the contract, read from the tar."""
    image = (manifest.transform.get("image") or {}).get("format", "jpg")
    with storage.fetch(shard.name) as path, path.open("rb") as tar:
        spans = read_spans(tar, members(image))
        records = [index_record(span, image) for span in spans]
    file = io.BytesIO()
    index = np.array(records, dtype=INDEX_DTYPE)
    np.lib.format.write_array(file, index, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _stats(storage: Storage, shard: Shard) -> bytes:
    fields = {field.name for field in dataclasses.fields(StagedShard)}
    staged = {name: value for name, value in vars(shard).items() if name in fields}
    with storage.fetch(shard.sidecar(".parquet")) as path:
        stats = shard_stats(StagedShard(**staged), pq.read_table(path))
    return (json.dumps(stats, indent=1) + "\n").encode()


def _tokenizer_file(storage: Storage, manifest: Manifest, path: str) -> bytes:
    """A file of the tokenizer that follows from its `tokenizer.json`."""
    name = PurePosixPath(path).name
    data = storage.read(f"{manifest.tokenizer.path}/{TOKENIZER_JSON}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_JSON).write_bytes(data)
        return read_tokenizer(Path(folder)).files[name]
