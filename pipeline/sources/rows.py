"""Where the rows of a text file begin and end, read block by block from any offset.

Owns row boundaries: lines, and lines whose quoted fields may hold line ends. Does not
own what stands in a row (`pipeline.sources.delimited`, `pipeline.sources.jsonl`). Both
are exact functions of the file and the offset of a row, so a range that is read alone
has the rows that the scan of the whole file saw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline.storage import open_file

# A longer row is no row of a table but a missing line end or quote.
MAX_ROW = 64 << 20
_BLOCK = 4 << 20
# Read at least, where a range ends sooner.
_SMALL_BLOCK = 1 << 16
_NEWLINE, _RETURN, _QUOTE, _COMMA = b"\n"[0], b"\r"[0], b'"'[0], b","[0]
# A quote opens a quoted field only where the field begins; after the closing quote the
# field goes on as it is.
FIELD = rb'(?:"[^"]*+(?:""[^"]*+)*+"[^,\n]*+|(?!")[^,\n]*+)'
_ROW = re.compile(rb"%b(?:,%b)*+\n" % (FIELD, FIELD))

RowEnds = Callable[[bytes], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    """Complete rows of a text file that stand side by side."""

    data: bytes
    offset: int
    """Of the data's first byte in the file."""
    starts: np.ndarray
    """Where rows begin in the data (rows,) int64; blank lines are no rows."""
    ends: np.ndarray
    """Where they end, with their line end (rows,) int64."""
    bad: bool = False
    """A single row that is too long or never ends; its data is left out."""


def read_rows(
    url: str, start: int, stop: int, size: int, *, quoted: bool
) -> Iterator[TextBlock]:
    """Rows of a file of `size` bytes that begin in [start, stop), where a row begins.

    Raises:
        OSError: storage failed, or the file is shorter than it was.
    """
    row_ends = _quoted_row_ends if quoted else _line_ends
    with open_file(url) as file:
        reader = _Reader(file=file, url=url, offset=start, size=size)
        while reader.offset < stop:
            yield from _next_rows(reader, stop, row_ends)


@dataclass(kw_only=True)
class _Reader:
    """A window over a file, from `offset` on."""

    file: BinaryIO
    url: str
    offset: int
    size: int
    _data: bytes = b""
    _at: int = 0

    @property
    def left(self) -> int:
        """Bytes of the file from the window's place on."""
        return self.size - self.offset

    def window(self, n_bytes: int) -> bytes:
        """The next bytes of the file, as many as are asked for or left."""
        n_bytes = min(n_bytes, self.left)
        missing = n_bytes - (len(self._data) - self._at)
        if missing > 0:
            self._data, self._at = self._data[self._at :] + self._read(missing), 0
        return self._data[self._at : self._at + n_bytes]

    def _read(self, n_bytes: int) -> bytes:
        self.file.seek(self.offset + len(self._data) - self._at)
        parts = []
        while n_bytes > 0:
            part = self.file.read(n_bytes)
            if not part:
                raise OSError(
                    f"{self.url} ends before byte {self.size}: it was changed while it "
                    "was read; start over once it is complete"
                )
            parts.append(part)
            n_bytes -= len(part)
        return b"".join(parts)

    def skip(self, n_bytes: int) -> None:
        """Move the window forward."""
        self._at = min(self._at + n_bytes, len(self._data))
        self.offset += n_bytes


def _next_rows(reader: _Reader, stop: int, row_ends: RowEnds) -> Iterator[TextBlock]:
    """Complete rows at the reader's place, or the one that cannot be read there."""
    wanted = min(_BLOCK, max(stop - reader.offset, _SMALL_BLOCK))
    while True:
        data = reader.window(wanted)
        last = len(data) == reader.left
        ends = _ends(data, row_ends, last)
        # A row is too long or not whatever else stands in the window.
        sizes = np.diff(ends, prepend=0)
        long = np.flatnonzero(sizes > MAX_ROW)
        ends = ends[: long[0]] if len(long) else ends
        if len(ends):
            yield _block(data, reader.offset, ends)
            reader.skip(int(ends[-1]))
            return
        if last or wanted > MAX_ROW:
            yield _skipped(reader)
            return
        wanted = min(2 * wanted, MAX_ROW + 1)


def _ends(data: bytes, row_ends: RowEnds, last: bool) -> np.ndarray:
    if not last or data.endswith(b"\n"):
        return row_ends(data)
    # The last row may lack its line end.
    return np.minimum(row_ends(data + b"\n"), len(data))


def _block(data: bytes, offset: int, ends: np.ndarray) -> TextBlock:
    data = data[: int(ends[-1])]
    starts = np.concatenate(([0], ends[:-1]))
    bytes_ = np.frombuffer(data, np.uint8)
    first, length = bytes_[starts], ends - starts
    blank = (first == _NEWLINE) & (length == 1)
    crlf = (first == _RETURN) & (bytes_[np.minimum(starts + 1, ends - 1)] == _NEWLINE)
    blank |= crlf & (length == 2)
    kept = ~blank
    return TextBlock(data=data, offset=offset, starts=starts[kept], ends=ends[kept])


def _skipped(reader: _Reader) -> TextBlock:
    """The row that is too long or whose quote is never closed, skipped to its line's
    end: the rows after a stray quote are rows still.
    """
    block = TextBlock(
        data=b"",
        offset=reader.offset,
        starts=np.zeros(1, np.int64),
        ends=np.zeros(1, np.int64),
        bad=True,
    )
    while (end := (data := reader.window(_BLOCK)).find(b"\n")) < 0 and data:
        reader.skip(len(data))
    reader.skip(end + 1)
    return block


def _line_ends(data: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE) + 1


def _quoted_row_ends(data: bytes) -> np.ndarray:
    """Line ends outside of quotes, by the parity of quotes where every opening one
    stands at the beginning of a field, else field by field.
    """
    bytes_ = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(bytes_ == _QUOTE)
    newlines = np.flatnonzero(bytes_ == _NEWLINE)
    if not len(quotes):
        return newlines + 1
    opening = quotes[::2]
    before = np.where(opening > 0, bytes_[opening - 1], _NEWLINE)
    # After a closing quote it is the second half of a doubled one.
    if np.isin(before, (_COMMA, _NEWLINE, _QUOTE)).all():
        inside = np.searchsorted(quotes, newlines) & 1
        return newlines[inside == 0] + 1
    ends, at = [], 0
    while found := _ROW.match(data, at):
        at = found.end()
        ends.append(at)
    return np.array(ends, np.int64)
