"""Is every sample of a tar the one that its index record names?

Owns the checks of one tar against a sound index, in one pass over its bytes, and how a
wrong checksum is traced to a header or a member. Does not own the files beside the tar
(`pipeline.audit_shard`), what a sample must say (`pipeline.audit_deep`) or walking
headers (`pipeline.tarwalk`). Memory: one sample.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import crc32c
import numpy as np

from pipeline.audit_deep import SampleCheck
from pipeline.damages import Damage, Findings
from pipeline.manifest import Manifest, Shard, TokenizerInfo, sample_key, token_ids
from pipeline.shards import END_OF_TAR, members
from pipeline.storage import Storage
from pipeline.tarwalk import BadHeader, Span, read_span
from pipeline.tokenizer import StoredTokenizer

_CHUNK = 1 << 20
_RANGE_DIGITS = len(sample_key(0, 0)) // 2


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is the same for every shard of a dataset."""

    storage: Storage
    indexed: bool
    """Tars of other makers: names, members and headers as they were."""
    image_format: str
    tokenizer: TokenizerInfo
    deep: StoredTokenizer | None
    """Decode images and encode captions again with this; None for the index check."""
    max_pixels: int

    @classmethod
    def of(
        cls, storage: Storage, manifest: Manifest, deep: StoredTokenizer | None
    ) -> Checks:
        """The checks of a dataset."""
        image = manifest.transform.get("image") or {}
        return cls(
            storage=storage,
            indexed=manifest.indexed,
            image_format=image.get("format", "jpg"),
            tokenizer=manifest.tokenizer,
            deep=deep,
            max_pixels=image.get("max_pixels", 1 << 27),
        )

    @property
    def members(self) -> Sequence[str]:
        """Members of a sample of the contract."""
        return members(self.image_format)


class TarAudit:
    """The checks of one tar.

    Args:
        ids: bytes (size,) of the sidecar with token ids, where there is one.
        found: where damages go.
    """

    def __init__(
        self, checks: Checks, shard: Shard, ids: np.ndarray | None, found: Findings
    ) -> None:
        self._checks, self._shard, self._ids = checks, shard, ids
        self._found = found
        self._places = {"ids": "input_ids.npy", "jpg": checks.image_format}
        self._deep: SampleCheck | None = None
        if checks.deep is not None:
            self._deep = SampleCheck(
                checks.deep, image=checks.image_format, max_pixels=checks.max_pixels
            )

    def check(
        self, file: HashedFile, index: np.ndarray, rows: Iterator[Mapping[str, Any]]
    ) -> None:
        """Every sample by its record, and what lies between and behind them."""
        end, last_key = 0, ""
        for number in range(len(index)):
            record = index[number]
            start = int(record["span_offset"])
            if start != end and not self._checks.indexed:
                self._damage("tar", f"sample {number} does not follow the last", end)
            data = file.read_at(start, int(record["span_size"]))
            if crc32c.crc32c(data) != record["span_crc32c"]:
                self._trace(number, record, data)
                next(rows, None)
            elif self._checks.indexed:
                self._check_given(number, record, data, next(rows, None))
            else:
                last_key = self._check_span(number, record, data, last_key, rows)
            end = start + int(record["span_size"])
        if not self._checks.indexed and file.rest() != END_OF_TAR:
            self._damage("tar", "no two zero blocks at the end of the archive", end)

    def _check_given(
        self,
        number: int,
        record: np.void,
        data: bytes,
        row: Mapping[str, Any] | None,
    ) -> None:
        """A sample of a tar that keeps its own members and headers."""
        self._check_parts(number, record, data)
        if self._deep is None:
            return
        start = int(record["span_offset"])
        image, ids = self._part(record, data, "jpg"), self._part(record, data, "ids")
        tokens = token_ids(ids, int(record["n_tokens"]), self._checks.tokenizer.dtype)
        for message in self._deep.given_problems(image, tokens, record, row):
            self._damage("tar", f"sample {number}: {message}", start)

    def _check_span(
        self,
        number: int,
        record: np.void,
        data: bytes,
        last_key: str,
        rows: Iterator[Mapping[str, Any]],
    ) -> str:
        """A sample that has the bytes it was written with; returns its key."""
        start = int(record["span_offset"])
        row = next(rows, None)
        try:
            span = read_span(io.BytesIO(data), start, self._checks.members)
        except BadHeader as error:
            self._damage("tar", f"sample {number}: {error.message}", error.offset)
            return last_key
        prefix = sample_key(self._shard.range, 0)[:_RANGE_DIGITS]
        follows = span.key > last_key and len(span.key) == 2 * _RANGE_DIGITS
        if not (span.key.startswith(prefix) and follows):
            message = f"key {span.key!r} does not follow {last_key!r} in its range"
            self._damage("tar", message, start)
        self._compare_places(number, span, record)
        self._check_parts(number, record, data)
        if self._deep is not None:
            for message in self._deep.problems(span, record, row):
                self._damage("tar", f"sample {number} ({span.key}): {message}", start)
        return span.key

    def _damage(self, name: str, message: str, offset: int | None = None) -> None:
        path = self._shard.files[name]
        self._found.damages.append(Damage(path=path, offset=offset, message=message))

    def _compare_places(self, number: int, span: Span, record: np.void) -> None:
        for part, name in self._places.items():
            given = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
            if given != span.members[name]:
                message = (
                    f"record {number} ({span.key}): {name} at {given}, the tar says "
                    f"{span.members[name]}"
                )
                self._damage("index", message)

    def _check_parts(self, number: int, record: np.void, data: bytes) -> None:
        """Checksums of image and ids, and that the ids are the captions counted."""
        start = int(record["span_offset"])
        image, ids = self._part(record, data, "jpg"), self._part(record, data, "ids")
        for part, payload in (("jpg", image), ("ids", ids)):
            if crc32c.crc32c(payload) != record[f"{part}_crc32c"]:
                place = int(record[f"{part}_offset"])
                file = "ids" if part == "ids" and self._ids is not None else "tar"
                message = f"sample {number}: CRC32C of {part} does not match the index"
                self._damage(file, message, place)
                return
        info, n_tokens = self._checks.tokenizer, int(record["n_tokens"])
        if n_tokens * info.dtype.itemsize > len(ids):
            self._damage("tar", f"sample {number}: fewer ids than {n_tokens}", start)
            return
        tokens = token_ids(ids, n_tokens, info.dtype)
        captions = np.count_nonzero(tokens == info.special_ids["sep"])
        if captions != record["n_captions"] or np.any(tokens >= info.vocab_size):
            message = f"sample {number}: ids are not {record['n_captions']} captions"
            self._damage("tar", message, start)

    def _part(self, record: np.void, data: bytes, part: str) -> bytes:
        offset, size = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
        if part == "ids" and self._ids is not None:
            return self._ids[offset : offset + size].tobytes()
        start = offset - int(record["span_offset"])
        return data[start : start + size] if start >= 0 else b""

    def _trace(self, number: int, record: np.void, data: bytes) -> None:
        """Name the place in a span whose checksum is wrong, as well as can be told."""
        start = int(record["span_offset"])
        if not self._checks.indexed:
            try:
                span = read_span(io.BytesIO(data), start, self._checks.members)
            except BadHeader as error:
                self._damage("tar", f"sample {number}: {error.message}", error.offset)
                return
            for part, name in self._places.items():
                if crc32c.crc32c(span.payload(name)) != record[f"{part}_crc32c"]:
                    place = span.members[name][0]
                    self._damage(
                        "tar",
                        f"sample {number} ({span.key}): {name} does not match its "
                        "CRC32C in the index",
                        place,
                    )
                    return
            place = span.members["json"][0]
            message = f"sample {number} ({span.key}): json, txt or padding is damaged"
            self._damage("tar", message, place)
            return
        message = f"sample {number}: CRC32C of its span does not match the index"
        self._damage("tar", message, start)


class HashedFile:
    """A file read forwards once, in pieces, with the sha256 of all of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._at = file, hashlib.sha256(), 0

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes that lie at or after the last ones read; fewer at the file's end."""
        while self._at < offset and self._read(min(offset - self._at, _CHUNK)):
            pass
        return self._read(size) if self._at == offset else b""

    def rest(self) -> bytes:
        """What follows, cut short where it is longer than the end of a tar."""
        return self._read(len(END_OF_TAR) + 1)

    def finish(self) -> str:
        """Read on to the end; the sha256 of the file."""
        while self._read(_CHUNK):
            pass
        return self._hash.hexdigest()

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        self._at += len(data)
        return data
