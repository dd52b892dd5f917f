"""Every check that a dataset directory is what its manifest says, byte by byte.

Owns finding damage and naming it by file and offset. Does not own the schema
(`pipeline.manifest`) or the layout of a shard (`pipeline.shards`). Walks tar headers
itself: Python's `tarfile` takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import (
    INDEX_DTYPE,
    SHARD_FILES,
    Manifest,
    Shard,
    TokenizerInfo,
    file_sha256,
    load_manifest,
    sample_key,
    token_ids,
)
from pipeline.shards import END_OF_TAR, MEMBERS, member_header

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that is not as it was written."""

    path: str
    """File below the dataset directory."""
    offset: int | None
    """Byte in that file, where one place is to blame."""
    message: str

    def __str__(self) -> str:
        where = (
            self.path if self.offset is None else f"{self.path} offset {self.offset}"
        )
        return f"{where}: {self.message}"


def audit(root: Path, on_bytes: Callable[[int], object]) -> Iterator[Damage]:
    """Every damage of the dataset at `root`. `on_bytes` gets the tar bytes checked.

    Raises:
        ValueError: there is no manifest to check against, or it is damaged.
    """
    manifest = load_manifest(root)
    yield from _check_files(root, manifest)
    yield from _check_strays(root, manifest)
    uids = []
    for shard in manifest.shards:
        check = _ShardAudit(root, shard, manifest.tokenizer)
        yield from check.damages()
        uids.append(check.uids)
        on_bytes(shard.bytes)
    yield from _check_uids(manifest, uids)
    yield from _check_rows(root, manifest)


class _ShardAudit:
    """The checks of one shard, which share its bytes."""

    def __init__(self, root: Path, shard: Shard, tokenizer: TokenizerInfo) -> None:
        self._root, self._shard, self._tokenizer = root, shard, tokenizer
        self.uids = np.empty(0, dtype=np.uint64)

    def damages(self) -> Iterator[Damage]:
        shard = self._shard
        suffixes = SHARD_FILES.values()
        paths = {suffix: self._root / shard.sidecar(suffix) for suffix in suffixes}
        missing = [suffix for suffix, path in paths.items() if not path.is_file()]
        for suffix in missing:
            yield self._damage("the file is missing", suffix=suffix)
        if missing:
            return
        for name, suffix in SHARD_FILES.items():
            if file_sha256(paths[suffix]) != shard.sha256[name]:
                message = "sha256 does not match the manifest"
                yield self._damage(message, suffix=suffix)
        index = self._index(paths[".index.npy"])
        if index is None:
            yield self._damage(
                f"not {shard.samples} records of the schema", suffix=".index.npy"
            )
        else:
            self.uids = index["uid"]
            offsets = np.append(index["span_offset"], _span_end(index))
            if paths[".tar.idx"].read_bytes() != offsets.astype("<u8").tobytes():
                message = "offsets do not match the index"
                yield self._damage(message, suffix=".tar.idx")
        yield from self._check_stats(paths["_stats.json"])
        with paths[".tar"].open("rb") as file:
            yield from self._check_tar(file.read(), index)

    def _damage(
        self, message: str, offset: int | None = None, suffix: str = ".tar"
    ) -> Damage:
        path = self._shard.sidecar(suffix)
        return Damage(path=path, offset=offset, message=message)

    def _index(self, path: Path) -> np.ndarray | None:
        try:
            index = np.load(path, allow_pickle=False)
        except Exception:
            # numpy parses the header as Python, and raises whatever that does.
            return None
        expected = index.dtype == INDEX_DTYPE and index.shape == (self._shard.samples,)
        return index if expected else None

    def _check_stats(self, path: Path) -> Iterator[Damage]:
        try:
            stats = json.loads(path.read_bytes())
            found = (stats["successes"], stats["captions"], stats["tokens"])
        except (ValueError, KeyError, TypeError):
            found = None
        if found != (self._shard.samples, self._shard.captions, self._shard.tokens):
            message = "counts do not match the manifest"
            yield self._damage(message, suffix="_stats.json")

    def _check_tar(self, tar: bytes, index: np.ndarray | None) -> Iterator[Damage]:
        if len(tar) != self._shard.bytes:
            yield self._damage(f"{len(tar)} bytes instead of {self._shard.bytes}")
        offset, last_key = 0, ""
        for number in range(self._shard.samples):
            record = None if index is None else index[number]
            walked = _walk_sample(tar, offset, self._shard.range, last_key)
            if isinstance(walked, _BadHeader):
                message = f"sample {number}: {walked.message}"
                yield self._damage(message, walked.offset)
            else:
                last_key = walked.key
            if record is None:
                if isinstance(walked, _BadHeader):
                    # Nothing else says where the next sample starts.
                    return
                offset = walked.end
                continue
            if isinstance(walked, _Sample):
                yield from self._compare(walked, record, number, offset)
            yield from self._check_bytes(tar, record, number)
            # The index leads on, past a sample that cannot be walked.
            offset = int(record["span_offset"]) + int(record["span_size"])
        if tar[offset:] != END_OF_TAR:
            yield self._damage("no two zero blocks at the end of the archive", offset)

    def _compare(
        self, sample: _Sample, record: np.void, number: int, offset: int
    ) -> Iterator[Damage]:
        """Places in the index against those of the walk."""
        walked = {
            "span_offset": offset,
            "span_size": sample.end - offset,
            "ids_offset": sample.members["input_ids.npy"][0],
            "ids_size": sample.members["input_ids.npy"][1],
            "jpg_offset": sample.members["jpg"][0],
            "jpg_size": sample.members["jpg"][1],
        }
        for field, value in walked.items():
            if record[field] != value:
                yield Damage(
                    path=self._shard.index,
                    offset=None,
                    message=f"record {number} ({sample.key}): {field} is "
                    f"{record[field]}, the tar says {value}",
                )

    def _check_bytes(
        self, tar: bytes, record: np.void, number: int
    ) -> Iterator[Damage]:
        """Checksums of the index against the bytes, and what the ids say."""
        for part, name in (("span", "span"), ("jpg", "jpg"), ("ids", "input_ids.npy")):
            start, size = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
            if crc32c.crc32c(tar[start : start + size]) != record[f"{part}_crc32c"]:
                message = f"sample {number}: CRC32C of {name} does not match the index"
                yield self._damage(message, start)
                return
        start, size = int(record["ids_offset"]), int(record["ids_size"])
        dtype, n_tokens = self._tokenizer.dtype, int(record["n_tokens"])
        if n_tokens * dtype.itemsize > size:
            yield self._damage(f"sample {number}: fewer ids than {n_tokens}", start)
            return
        ids = token_ids(tar[start : start + size], n_tokens, dtype)
        separators = np.count_nonzero(ids == self._tokenizer.special_ids["sep"])
        if separators != record["n_captions"] or np.any(
            ids >= self._tokenizer.vocab_size
        ):
            message = f"sample {number}: ids are not {record['n_captions']} captions"
            yield self._damage(message, start)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    key: str
    end: int
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's payload."""


@dataclass(frozen=True, kw_only=True)
class _BadHeader:
    offset: int
    message: str


def _walk_sample(
    tar: bytes, offset: int, range_number: int, last_key: str
) -> _Sample | _BadHeader:
    """Read the headers of the sample at `offset`."""
    members, key = {}, ""
    for name in MEMBERS:
        header = tar[offset : offset + _BLOCK]
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            return _BadHeader(offset=offset, message=f"header of {name}: {error}")
        key = key or member.name.partition(".")[0]
        if member.name != f"{key}.{name}":
            message = f"member {member.name!r} where {key}.{name} belongs"
            return _BadHeader(offset=offset, message=message)
        if header != member_header(member.name, member.size):
            message = f"header of {name} is not as the contract has it"
            return _BadHeader(offset=offset, message=message)
        members[name] = (offset + _BLOCK, member.size)
        offset += _BLOCK + member.size + -member.size % _BLOCK
    in_range = key[:6] == sample_key(range_number, 0)[:6] and key > last_key
    if not (in_range and len(key) == len(sample_key(0, 0))):
        message = f"key {key!r} does not follow {last_key!r} in range {range_number}"
        return _BadHeader(offset=offset, message=message)
    return _Sample(key=key, end=offset, members=members)


def _span_end(index: np.ndarray) -> np.uint64:
    return index["span_offset"][-1] + index["span_size"][-1]


def _check_files(root: Path, manifest: Manifest) -> Iterator[Damage]:
    """Tokenizer, companions and tables of rejected inputs."""
    for name, digest in sorted(manifest.files.items()):
        path = root / name
        if not path.is_file():
            yield Damage(path=name, offset=None, message="the file is missing")
        elif file_sha256(path) != digest:
            message = "sha256 does not match the manifest"
            yield Damage(path=name, offset=None, message=message)


def _check_strays(root: Path, manifest: Manifest) -> Iterator[Damage]:
    """Shards and tables that no record names would be read by all loaders but ours."""
    known = {shard.name for shard in manifest.shards}
    known |= {shard.sidecar(".parquet") for shard in manifest.shards}
    known |= manifest.files.keys()
    for path in sorted([*root.glob("*/*.tar"), *root.glob("*/*.parquet")]):
        name = path.relative_to(root).as_posix()
        if name not in known:
            yield Damage(path=name, offset=None, message="not in the manifest")


def _check_uids(manifest: Manifest, uids: list[np.ndarray]) -> Iterator[Damage]:
    seen: set[int] = set()
    for shard, numbers in zip(manifest.shards, uids, strict=True):
        for number, uid in enumerate(numbers.tolist()):
            if uid in seen:
                message = f"record {number}: uid {uid:016x} occurs twice in the dataset"
                yield Damage(path=shard.index, offset=None, message=message)
            seen.add(uid)


def _check_rows(root: Path, manifest: Manifest) -> Iterator[Damage]:
    """Law 2 on disk: every input has exactly one row, under a key of its own."""
    keys: list[str] = []
    names = [shard.sidecar(".parquet") for shard in manifest.shards]
    names += [name for name in manifest.files if name.endswith(".parquet")]
    for name in names:
        try:
            keys += pq.read_table(root / name, columns=["key"])["key"].to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            yield Damage(path=name, offset=None, message=f"not readable: {reason}")
            return
    inputs = manifest.accounting.inputs
    if len(keys) != inputs or len(set(keys)) != inputs:
        message = f"{len(keys)} rows and {len(set(keys))} keys for {inputs} inputs"
        yield Damage(path="*.parquet", offset=None, message=message)
