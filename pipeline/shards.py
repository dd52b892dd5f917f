"""Writing one shard: tar, index, parquet, stats and Energon's offsets.

Owns the bytes of a shard's files, exactly as the contract lays them down. Does not own
the schema of index and manifest (`pipeline.manifest`), what is in a sample
(`pipeline.ranges`) or where files finally lie (`pipeline.dataset`).
"""

from __future__ import annotations

import dataclasses
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
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import INDEX_DTYPE, SHARD_FILES, file_sha256

# Members of a sample, in the order in which they lie in the tar.
MEMBERS = ("input_ids.npy", "jpg", "json", "txt")
# Files of a shard, by the suffix that replaces `.tar`.
SUFFIXES = tuple(SHARD_FILES.values())
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
# img2dataset's stats split failures into two kinds; these are its "download" ones.
_NOT_READ = ("missing_file", "missing_image", "path_outside_input")

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
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("jpg_bytes", pa.int64()),
        ("n_captions", pa.int32()),
        ("n_tokens", pa.int32()),
        ("sha256", pa.string()),
        ("dhash", pa.string()),
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
    jpeg: bytes
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


class ShardWriter:
    """Writes the files of one range and split as `directory/split.*`.

    The tar is made with the first sample: a range that keeps nothing for a split leaves
    only a table of its rejected inputs there.
    """

    def __init__(self, directory: Path, split: str, keep: Sequence[str]) -> None:
        self.split = split
        self._stem = directory / split
        fields = [pa.field(name, pa.string()) for name in keep]
        self._schema = pa.schema([*ROW_SCHEMA, *fields])
        self._rows: list[Mapping[str, Any]] = []
        self._records: list[tuple[int, ...]] = []
        self._tar: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._offset = 0

    def add(self, sample: Sample, row: Mapping[str, Any]) -> None:
        """Append a sample to the tar, and its row to the parquet."""
        payloads = {
            "input_ids.npy": _npy(sample.ids),
            "jpg": sample.jpeg,
            "json": json.dumps(sample.json, ensure_ascii=False).encode(),
            "txt": sample.captions[0].encode(),
        }
        start = self._offset
        parts: list[bytes] = []
        at = {}
        for name in MEMBERS:
            header = member_header(f"{sample.key}.{name}", len(payloads[name]))
            at[name] = start + sum(len(part) for part in parts) + len(header)
            parts += [header, payloads[name], _padding(len(payloads[name]))]
        span = b"".join(parts)
        self._write(span)
        ids, jpeg = payloads["input_ids.npy"], payloads["jpg"]
        record = {
            "uid": sample.uid,
            "span_offset": start,
            "span_size": len(span),
            "span_crc32c": crc32c.crc32c(span),
            "jpg_offset": at["jpg"],
            "jpg_size": len(jpeg),
            "jpg_crc32c": crc32c.crc32c(jpeg),
            "ids_offset": at["input_ids.npy"],
            "ids_size": len(ids),
            "ids_crc32c": crc32c.crc32c(ids),
            "width": sample.width,
            "height": sample.height,
            "n_captions": len(sample.captions),
            "n_tokens": len(sample.ids),
        }
        self._records.append(tuple(record[name] for name in INDEX_DTYPE.names or ()))
        self._rows.append(row)

    def reject(self, row: Mapping[str, Any]) -> None:
        """Append the row of an input that makes no sample."""
        self._rows.append(row)

    def close(self) -> StagedShard | None:
        """Finish the files; None where no sample came."""
        if self._tar is None:
            self._write_table(self._stem.with_suffix(".rejected.parquet"))
            return None
        samples_end = self._offset
        self._write(END_OF_TAR)
        _close_durably(self._tar)
        index = np.array(self._records, dtype=INDEX_DTYPE)
        offsets = np.append(index["span_offset"], np.uint64(samples_end))
        _write(self._file(".index.npy"), _npy(index))
        _write(self._file(".tar.idx"), offsets.astype("<u8").tobytes())
        self._write_table(self._file(".parquet"))
        shard = StagedShard(
            split=self.split,
            samples=len(index),
            captions=int(index["n_captions"].sum()),
            tokens=int(index["n_tokens"].sum()),
            bytes=self._offset,
            sha256={"tar": self._hash.hexdigest()},
        )
        stats = json.dumps(self._stats(shard), indent=1) + "\n"
        _write(self._file("_stats.json"), stats.encode())
        beside = {
            name: file_sha256(self._file(suffix))
            for name, suffix in SHARD_FILES.items()
            if name != "tar"
        }
        return dataclasses.replace(shard, sha256={**shard.sha256, **beside})

    def _file(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)

    def _write(self, data: bytes) -> None:
        if self._tar is None:
            self._tar = self._file(".tar").open("wb")
        self._tar.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _write_table(self, path: Path) -> None:
        table = pa.Table.from_pylist(self._rows, self._schema)
        with path.open("wb") as file:
            pq.write_table(table, file)
            _sync(file)

    def _stats(self, shard: StagedShard) -> dict[str, Any]:
        """img2dataset's counts, and ours."""
        statuses = Counter(row["reason"] or row["status"] for row in self._rows)
        failed = [row["reason"] for row in self._rows if row["status"] == "failed"]
        not_read = sum(reason in _NOT_READ for reason in failed)
        return {
            "count": len(self._rows),
            "successes": shard.samples,
            "failed_to_download": not_read,
            "failed_to_resize": len(failed) - not_read,
            "status_dict": dict(sorted(statuses.items())),
            "captions": shard.captions,
            "tokens": shard.tokens,
            "bytes": shard.bytes,
        }


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: the contract leaves no freedom in them."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _close_durably(file: BinaryIO) -> None:
    _sync(file)
    file.close()


def _sync(file: BinaryIO) -> None:
    # A rename may reach the disk before the data it names.
    file.flush()
    os.fsync(file.fileno())
