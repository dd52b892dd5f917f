"""Reading the tar of a shard sample by sample, trusting no byte of it.

Owns walking: which headers a sample has, where its members lie, and the index record
that follows from them. Walks by itself, because Python's `tarfile` takes a damaged
header for the end of the archive. Does not own writing (`pipeline.shards`), tars of
other makers (`pipeline.index`), or what damage means (`pipeline.audit_shard`).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import crc32c
import numpy as np

from pipeline.manifest import INDEX_DTYPE
from pipeline.shards import member_header

BLOCK = tarfile.BLOCKSIZE


class BadHeader(ValueError):
    """A header that is not as the contract has it."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset, self.message = offset, message


@dataclass(frozen=True, kw_only=True)
class Span:
    """A sample as it lies in the tar."""

    key: str
    offset: int
    """Byte of the tar at which its first header begins."""
    data: bytes
    """Headers, members and padding."""
    members: Mapping[str, tuple[int, int]]
    """Offset in the tar and size of each member's payload, by name after the key."""

    @property
    def end(self) -> int:
        """Byte after the span."""
        return self.offset + len(self.data)

    def payload(self, name: str) -> bytes:
        """Bytes of a member."""
        offset, size = self.members[name]
        start = offset - self.offset
        return self.data[start : start + size]


def read_span(file: BinaryIO, offset: int, names: Sequence[str]) -> Span:
    """The sample that begins where `file` stands, which is byte `offset` of the tar.

    Memory: one sample; no size is believed before its header is as it must be.

    Raises:
        BadHeader: a header is damaged, or the file ends too early.
    """
    parts: list[bytes] = []
    members: dict[str, tuple[int, int]] = {}
    key, at = "", offset
    for name in names:
        header = file.read(BLOCK)
        key, size = _checked(header, key, name, at)
        padded = size + -size % BLOCK
        payload = file.read(padded)
        if len(payload) != padded:
            raise BadHeader(at, f"the file ends inside {key}.{name}")
        members[name] = (at + BLOCK, size)
        parts += [header, payload]
        at += BLOCK + padded
    return Span(key=key, offset=offset, data=b"".join(parts), members=members)


def read_spans(file: BinaryIO, names: Sequence[str]) -> Iterator[Span]:
    """Every sample of a tar up to its end blocks. Raises BadHeader as `read_span`."""
    offset = 0
    while True:
        head = file.read(BLOCK)
        if not head.strip(b"\0"):
            return
        file.seek(offset)
        span = read_span(file, offset, names)
        yield span
        offset = span.end


def index_record(span: Span, image: str) -> tuple[int, ...]:
    """The record of a sample, in the order of `INDEX_DTYPE`, read from its bytes.

    Raises:
        ValueError: its json or its ids are not what the contract says.
    """
    fields = span_json(span)
    ids = load_ids(span.payload("input_ids.npy"))
    values: dict[str, int] = {
        "span_offset": span.offset,
        "span_size": len(span.data),
        "span_crc32c": crc32c.crc32c(span.data),
        "n_tokens": len(ids),
    }
    for part, name in (("jpg", image), ("ids", "input_ids.npy")):
        offset, size = span.members[name]
        values |= {f"{part}_offset": offset, f"{part}_size": size}
        values[f"{part}_crc32c"] = crc32c.crc32c(span.payload(name))
    try:
        values |= {
            "uid": int(fields["uid"], 16),
            "width": int(fields["width"]),
            "height": int(fields["height"]),
            "n_captions": len(fields["captions"]),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"json of {span.key} lacks {error}") from error
    return tuple(values[name] for name in INDEX_DTYPE.names or ())


def span_json(span: Span) -> dict[str, Any]:
    """The json member. Raises ValueError where it is no JSON object."""
    try:
        value = json.loads(span.payload("json"))
    except RecursionError as error:
        raise ValueError("json is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("json is no object")
    return value


def load_ids(member: bytes) -> np.ndarray:
    """Ids (tokens,) of an `input_ids.npy` member. Raises ValueError if it is none."""
    try:
        ids = np.load(io.BytesIO(member), allow_pickle=False)
    except Exception as error:
        # numpy parses the header as Python, and raises whatever that does.
        raise ValueError("input_ids.npy is no npy file") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind != "u":
        raise ValueError("input_ids.npy is no array of ids")
    return ids


def _checked(header: bytes, key: str, name: str, at: int) -> tuple[str, int]:
    """Key and payload size of a header, which must be that of member `name`."""
    try:
        member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise BadHeader(at, f"header of {name}: {error}") from error
    key = key or member.name.partition(".")[0]
    if member.name != f"{key}.{name}":
        raise BadHeader(at, f"member {member.name!r} where {key}.{name} belongs")
    if header != member_header(member.name, member.size):
        raise BadHeader(at, f"header of {name} is not as the contract has it")
    return key, member.size
