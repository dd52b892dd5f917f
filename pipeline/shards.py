"""Writing one shard: tar, index, parquet, stats and Energon's offsets.

Owns the bytes of a shard's files, exactly as the contract lays them down. They are
written into a folder that is staged: `pipeline.storage` makes them last. Does not own
the schema of index and manifest (`pipeline.manifest`), what is in a sample
(`pipeline.ranges`) or where files finally lie (`pipeline.dataset`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import crc32c
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import INDEX_DTYPE, SHARD_FILES, file_sha256, sample_key
from pipeline.reasons import STATUSES, is_not_read

# Status of an input that is a sample.
WRITTEN = STATUSES[0]
# How the table of a range and split ends that has rejected inputs and no sample.
REJECTED = ".rejected.parquet"
_RANGE_DIGITS = len(sample_key(0, 0)) // 2
# Files of a shard, by the suffix that replaces `.tar`.
SUFFIXES = tuple(SHARD_FILES.values())
_WRITE_BACK_BYTES = 4 << 20
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uid", pa.string()),
        ("url", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("caption", pa.string()),
        # Named as Parquet reads it back, or rewritten shards would differ from others.
        ("captions", pa.list_(pa.field("element", pa.string()))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("jpg_bytes", pa.int64()),
        ("n_captions", pa.int32()),
        ("n_tokens", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("pixels_sha256", pa.string()),
        ("duplicate_of", pa.string()),
        ("retry_of", pa.string()),
        ("exif", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, ready to be written."""

    key: str
    uid: int
    ids: np.ndarray
    image: bytes
    width: int
    height: int
    captions: Sequence[str]
    json: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StagedShard:
    """What a finished shard's manifest entry needs, except its name."""

    split: str
    samples: int
    captions: int
    tokens: int
    bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Why a sample that was written does not stay: its row in the table says so."""

    status: str
    """`duplicate` or `filtered`."""
    reason: str
    of: str
    """Key of the input that it repeats."""


class ShardWriter:
    """Writes the files of one range and split as `directory/split.*`.

    The tar is made with the first sample: a range that keeps nothing for a split leaves
    only a table of its rejected inputs there.
    """

    def __init__(
        self, directory: Path, split: str, keep: Sequence[str], image_format: str
    ) -> None:
        self.split = split
        self._directory = directory
        self._members = members(image_format)
        self._schema = table_schema(keep)
        self._rows: list[Mapping[str, Any]] = []
        self._records: list[tuple[int, ...]] = []
        self._tar: _Tar | None = None

    @property
    def table_sha256(self) -> str:
        """Digest of the table of rejected inputs, once it is written."""
        return file_sha256(self._directory / f"{self.split}{REJECTED}")

    def add(self, sample: Sample, row: Mapping[str, Any]) -> int:
        """Append a sample to the tar, and its row to the parquet; returns its bytes."""
        payloads = (
            _npy(sample.ids),
            sample.image,
            orjson.dumps(sample.json),
            sample.captions[0].encode(),
        )
        if self._tar is None:
            self._tar = _Tar(self._directory / f"{self.split}.tar")
        start = self._tar.size
        parts: list[bytes] = []
        at, offset = {}, start
        for name, payload in zip(self._members, payloads, strict=True):
            at[name] = offset + tarfile.BLOCKSIZE
            parts.append(member_header(f"{sample.key}.{name}", len(payload)))
            parts += [payload, _padding(len(payload))]
            offset = at[name] + len(payload) + len(parts[-1])
        span = b"".join(parts)
        self._tar.write(span)
        ids, image = payloads[:2]
        ids_name, image_name = self._members[:2]
        record = {
            "uid": sample.uid,
            "span_offset": start,
            "span_size": len(span),
            "span_crc32c": crc32c.crc32c(span),
            "jpg_offset": at[image_name],
            "jpg_size": len(image),
            "jpg_crc32c": crc32c.crc32c(image),
            "ids_offset": at[ids_name],
            "ids_size": len(ids),
            "ids_crc32c": crc32c.crc32c(ids),
            "width": sample.width,
            "height": sample.height,
            "n_captions": len(sample.captions),
            "n_tokens": len(sample.ids),
        }
        self._records.append(tuple(record[name] for name in INDEX_DTYPE.names or ()))
        self._rows.append(row)
        return len(span)

    def reject(self, row: Mapping[str, Any]) -> None:
        """Append the row of an input that makes no sample."""
        self._rows.append(row)

    def close(self) -> StagedShard | None:
        """Finish the files; None where no sample came."""
        table = pa.Table.from_pylist(self._rows, self._schema)
        index = np.array(self._records, dtype=INDEX_DTYPE)
        return _finish(self._directory, self.split, self._tar, index, table)


def without(
    staged: Path, into: Path, split: str, dropped: Mapping[int, Dropped]
) -> StagedShard | None:
    """Copy a shard from one directory to another, without some of its samples.

    `dropped` names them by their position in the range. Spans are copied as they are:
    nothing is decoded or encoded. None where no sample is left.
    """
    table = pq.read_table(staged / f"{split}.parquet")
    keys, statuses = table["key"].to_pylist(), table["status"].to_pylist()
    written = [
        key for key, status in zip(keys, statuses, strict=True) if status == WRITTEN
    ]
    index = np.load(staged / f"{split}.index.npy", allow_pickle=False)
    kept = np.array([position(key) not in dropped for key in written], bool)
    tar = _Tar(into / f"{split}.tar") if kept.any() else None
    if tar is not None:
        with (staged / f"{split}.tar").open("rb") as source:
            for record in index[kept]:
                source.seek(int(record["span_offset"]))
                tar.write(source.read(int(record["span_size"])))
    index = _moved(index[kept])
    return _finish(into, split, tar, index, _with_verdicts(table, dropped))


def table_schema(keep: Sequence[str]) -> pa.Schema:
    """Schema of a shard's parquet: the contract's columns, then passthrough ones."""
    return pa.schema([*ROW_SCHEMA, *(pa.field(name, pa.string()) for name in keep)])


def members(image_format: str) -> tuple[str, str, str, str]:
    """Members of a sample, in the order in which they lie in the tar."""
    return ("input_ids.npy", image_format, "json", "txt")


def position(key: str) -> int:
    """Position of an input in its range, from its key."""
    return int(key[_RANGE_DIGITS:])


class _Tar:
    """A tar being written, and the digest of what was."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._handed_over = 0
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        if self.size - self._handed_over >= _WRITE_BACK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        """Have the kernel begin to write what it has: whoever publishes the tar waits
        for all of it to be on the disk, and does nothing else meanwhile.
        """
        start, self._handed_over = self._handed_over, self.size
        if hasattr(os, "posix_fadvise"):
            # Linux starts writing dirty pages then, and keeps them.
            advice = (start, self.size - start, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(self._file.fileno(), *advice)

    def close(self) -> str:
        """End the archive, and return the sha256 of the file."""
        self.write(END_OF_TAR)
        self._file.close()
        return self._hash.hexdigest()


def _moved(index: np.ndarray) -> np.ndarray:
    """Records of samples that now lie end to end from the start of a tar."""
    sizes = index["span_size"]
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<u8")[: len(index)]
    moved = index.copy()
    for name in ("span_offset", "jpg_offset", "ids_offset"):
        moved[name] = index[name] - index["span_offset"] + start
    return moved


def _with_verdicts(table: pa.Table, dropped: Mapping[int, Dropped]) -> pa.Table:
    rows = table.to_pylist()
    for row in rows:
        verdict = dropped.get(position(row["key"]))
        if verdict is not None:
            row |= {"status": verdict.status, "reason": verdict.reason}
            row["duplicate_of"] = verdict.of
    return pa.Table.from_pylist(rows, table.schema)


def _finish(
    directory: Path, split: str, tar: _Tar | None, index: np.ndarray, table: pa.Table
) -> StagedShard | None:
    """Write everything beside the tar."""
    if tar is None:
        _write_table(directory / f"{split}{REJECTED}", table)
        return None
    end = tar.size
    digest = tar.close()
    stem = directory / split
    offsets = np.append(index["span_offset"], np.uint64(end))
    _beside(stem, ".index.npy").write_bytes(_npy(index))
    _beside(stem, ".tar.idx").write_bytes(offsets.astype("<u8").tobytes())
    _write_table(_beside(stem, ".parquet"), table)
    shard = StagedShard(
        split=split,
        samples=len(index),
        captions=int(index["n_captions"].sum()),
        tokens=int(index["n_tokens"].sum()),
        bytes=tar.size,
        sha256={"tar": digest},
    )
    stats = json.dumps(shard_stats(shard, table), indent=1) + "\n"
    _beside(stem, "_stats.json").write_bytes(stats.encode())
    beside = {
        name: file_sha256(_beside(stem, suffix))
        for name, suffix in SHARD_FILES.items()
        if name != "tar"
    }
    return dataclasses.replace(shard, sha256={**shard.sha256, **beside})


def shard_stats(shard: StagedShard, table: pa.Table) -> dict[str, Any]:
    """img2dataset's counts, and ours: what stands in `X_stats.json`."""
    status, reason = table["status"].to_pylist(), table["reason"].to_pylist()
    pairs = list(zip(status, reason, strict=True))
    failed = [reason for status, reason in pairs if status == "failed"]
    # img2dataset splits failures into two kinds: "download" is whatever is not read.
    not_read = sum(map(is_not_read, failed))
    return {
        "count": len(pairs),
        "successes": shard.samples,
        "failed_to_download": not_read,
        "failed_to_resize": len(failed) - not_read,
        "status_dict": dict(
            sorted(Counter(reason or status for status, reason in pairs).items())
        ),
        "captions": shard.captions,
        "tokens": shard.tokens,
        "bytes": shard.bytes,
    }


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _write_table(path: Path, table: pa.Table) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file)


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: the contract leaves no freedom in them."""
    if not name.isascii() or len(name) > tarfile.LENGTH_NAME or size > _MAX_SIZE:
        return _header_of(name, size)
    # Filled in rather than built anew: four times a sample, that took longer than all
    # else that is done to write one.
    encoded, digits = name.encode(), b"%011o" % size
    checksum = _NO_NAME_SUM + sum(encoded) + sum(digits)
    return b"%b%b%b%b%06o%b" % (
        encoded.ljust(tarfile.LENGTH_NAME, b"\0"),
        _NO_NAME[tarfile.LENGTH_NAME : _SIZE_AT],
        digits,
        _NO_NAME[_SIZE_AT + len(digits) : _CHECKSUM_AT],
        checksum,
        _NO_NAME[_CHECKSUM_AT + _CHECKSUM_DIGITS :],
    )


def _header_of(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


# A header without a name, and the sum of its bytes without its size and checksum.
_SIZE_AT, _SIZE_DIGITS = 124, 11
_CHECKSUM_AT, _CHECKSUM_DIGITS = 148, 6
_MAX_SIZE = 8**_SIZE_DIGITS - 1
_NO_NAME = _header_of("", 0)
_NO_NAME_SUM = (
    int(_NO_NAME[_CHECKSUM_AT:][:_CHECKSUM_DIGITS], 8) - _SIZE_DIGITS * b"0"[0]
)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _npy(array: np.ndarray) -> bytes:
    """A one-dimensional array as an npy file."""
    return _npy_header(array.dtype, len(array)) + array.tobytes()


@functools.lru_cache
def _npy_header(dtype: np.dtype, length: int) -> bytes:
    # Captions of most samples have as many tokens as those of some sample before.
    file = io.BytesIO()
    empty = np.zeros(length, dtype)
    np.lib.format.write_array_header_1_0(
        file, np.lib.format.header_data_from_array_1_0(empty)
    )
    return file.getvalue()
