"""Anybody's tar as samples: where every member lies, and where headers are damaged.

Owns walking the headers of a tar that this pipeline may not have written: GNU and PAX
long names, directories, links. Does not own what a sample is worth
(`pipeline.index_tar`) or the contract's own tars byte by byte (`pipeline.audit`).
Python's `tarfile` takes a damaged header for the end of the archive; this does not.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
# A name longer than this is no file's, and would be read into memory.
_MAX_EXTENSION = 1 << 20
# As webdataset splits a name: the key ends at the first dot of the last part.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file of the tar. Offsets in bytes from the tar's start."""

    name: str
    start: int
    """Of its first header: long names have headers of their own."""
    data: int
    size: int
    end: int
    """After its padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """Bytes that no sound header explains."""

    start: int
    end: int
    reason: str
    """damaged_header or truncated_tar."""
    name: str
    """Of the member whose bytes end with the tar; empty where no header is sound."""


@dataclass(kw_only=True, slots=True)
class TarSample:
    """Adjacent members with one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """By what follows the key in their names, in lower case."""
    start: int
    end: int
    damage: str | None = None
    """Reason why it cannot be trusted: a gap beside it, or two members of one name."""


class Archive:
    """The samples of a tar.

    Args:
        data: the tar, best memory-mapped: members are looked at only when asked for.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.ended = False
        """Whether the walk met the end-of-archive mark: without one a tar may be cut
        short, and nothing else would tell."""

    def samples(self) -> Iterator[TarSample]:
        """Samples in order. One beside a gap is `damage`d: nobody can tell what it
        lost.
        """
        current: TarSample | None = None
        gap: Gap | None = None
        for item in self.members():
            name = _NAME.fullmatch(item.name)
            if isinstance(item, Gap):
                gap, key = item, name[1] if name else ""
                if current is not None and key and key != current.key:
                    yield current
                    current = None
                if current is None:
                    current = TarSample(key=key, start=item.start, end=item.end)
                current.damage = item.reason
                continue
            if name is None or _META.match(item.name):
                continue
            key, extension = name[1], name[2].lower()
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current = TarSample(key=key, start=item.start, end=item.end)
                current.damage = gap.reason if gap else None
            elif extension in current.members:
                current.damage = current.damage or "duplicate_member"
            gap = None
            current.members[extension] = item
            current.end = item.end
        if current is not None:
            yield current

    def members(self) -> Iterator[Member | Gap]:
        """Regular files and gaps, in order."""
        offset, size = 0, len(self._data)
        while offset < size:
            if self._is_end(offset):
                self.ended = True
                return
            member = self._member(offset)
            if member is not None and member.data + member.size <= size:
                # Directories and links have names but no bytes.
                if member.name:
                    yield member
                offset = member.end
                continue
            start, offset = offset, self._next_header(offset + _BLOCK)
            cut = member if offset >= size else None
            yield Gap(
                start=start,
                end=offset,
                reason="truncated_tar" if cut else "damaged_header",
                name=cut.name if cut else "",
            )

    def _is_end(self, offset: int) -> bool:
        """Nothing but zeros from here on, two blocks of them at least."""
        if self._data[offset : offset + 2 * _BLOCK] != bytes(2 * _BLOCK):
            return False
        for start in range(offset, len(self._data), _CHUNK):
            piece = self._data[start : start + _CHUNK]
            if piece != bytes(len(piece)):
                return False
        return True

    def _next_header(self, offset: int) -> int:
        """First place from `offset` on that holds a sound header, or the end."""
        while offset < len(self._data):
            magic = bytes(self._data[offset + 257 : offset + 262])
            if magic == b"ustar" and self._header(offset) is not None:
                return offset
            offset += _BLOCK
        return len(self._data)

    def _header(self, offset: int) -> tarfile.TarInfo | None:
        block = bytes(self._data[offset : offset + _BLOCK])
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None
        return header if header.size >= 0 else None

    def _member(self, start: int) -> Member | None:
        """The entry that starts at `start`; nameless where it is no regular file; None
        where a header is damaged.
        """
        offset, name, size = start, None, None
        while True:
            header = self._header(offset)
            if header is None:
                return None
            data = offset + _BLOCK
            end = data + header.size + -header.size % _BLOCK
            if header.type not in _EXTENSIONS:
                break
            if header.size > _MAX_EXTENSION or end > len(self._data):
                return None
            text = bytes(self._data[data : data + header.size])
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = _text(text.split(b"\0", 1)[0])
            elif header.type == tarfile.XHDTYPE:
                records = _pax_records(text)
                if records is None or any(key in records for key in _SPARSE):
                    return None
                name = records.get("path", name)
                if "size" in records and records["size"].isdecimal():
                    size = int(records["size"])
            offset = end
        if header.type == tarfile.GNUTYPE_SPARSE:
            return None
        if header.type not in tarfile.REGULAR_TYPES:
            size = header.size if header.type not in _BODILESS else 0
            name = ""
        length = header.size if size is None else size
        return Member(
            name=header.name if name is None else name,
            start=start,
            data=data,
            size=length,
            end=data + length + -length % _BLOCK,
        )


_SPARSE = ("GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size")
# Entries that say something about the next one.
_EXTENSIONS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE),
)
_BODILESS = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.DIRTYPE, tarfile.FIFOTYPE),
)


def _pax_records(text: bytes) -> dict[str, str] | None:
    """`length key=value` lines by key, None where they are damaged."""
    records = {}
    while text.strip(b"\0"):
        digits, blank, _ = text.partition(b" ")
        if not (blank and digits.isdigit() and len(digits) < 8):
            return None
        length = int(digits)
        line, text = text[len(digits) + 1 : length], text[length:]
        key, equals, value = line.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        records[_text(key)] = _text(value[:-1])
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
