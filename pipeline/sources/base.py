"""What every source is: columns, rows that can be read from any place, a fingerprint.

Owns the `Source` protocol, how blocks of a format become its scan and its rows, and
what stands in for text that cannot be used. Does not own any format (its siblings), or
which columns are read (`pipeline.columns`).
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.captions import BadText
from pipeline.columns import is_text
from pipeline.storage import Storage

# Rows of a batch, without and with images.
MAX_ROWS = 16_384
IMAGE_ROWS = 64
# Python objects of this many rows are held at a time.
_ROWS = 1024
# Text that is not UTF-8, and dates beyond what Python counts.
_NO_PYTHON_VALUE = (ValueError, OverflowError)
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


class Source(Protocol):
    """An opened corpus; picklable, and as large as its list of files."""

    @property
    def kind(self) -> str:
        """One of `options.SOURCE_FORMATS`."""

    @property
    def base(self) -> str:
        """Folder or URL prefix that relative image paths are relative to."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns, as rows and scans yield them."""

    @property
    def end(self) -> int:
        """Cursor past the last row."""

    @property
    def default_columns(self) -> Mapping[str, Any]:
        """What this format knows about its columns: fields of `ColumnOptions`."""

    def scan(
        self, columns: Sequence[str], start: int = 0
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """Columns of all rows from cursor `start` on, in order, in bounded memory.

        With each batch come its rows' cursors (rows,) int64, increasing: row numbers
        where rows can be counted, else bytes of the files laid end to end. Text that is
        not UTF-8 and rows that cannot be parsed are null.

        Raises:
            ValueError: the file's structure is damaged.
            OSError: storage failed, or a part of a file is damaged.
        """

    def rows(
        self, columns: Sequence[str], start: int, stop: int
    ) -> Iterator[Mapping[str, Any]]:
        """Rows whose cursor lies in [start, stop), where `start` is a row's cursor;
        `BadText` stands where scans have null for what cannot be used.
        """

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the corpus's files, wherever they lie."""


class NeedsSpool(abc.ABC):
    """A corpus whose rows must be brought into order before they can be read.

    Knows everything about itself but its rows: kind, base, schema, default columns and
    fingerprint are those of a `Source`.
    """

    kind: str
    base: str
    schema: pa.Schema
    default_columns: Mapping[str, Any]

    @abc.abstractmethod
    def fingerprint(self) -> list[dict[str, Any]]:
        """As `Source.fingerprint`."""

    @abc.abstractmethod
    def spooled(self, storage: Storage, name: str) -> Source:
        """The source in order, as Parquet at `name` of `storage`, which every task can
        read. A finished spool of the same corpus is used again.

        Raises:
            ValueError: no rows, or a file's structure is damaged.
        """


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some consecutive rows, as read from a file."""

    batch: pa.RecordBatch
    cursors: np.ndarray
    """Where each row begins (rows,) int64."""
    bad: Mapping[str, np.ndarray]
    """Rows (rows,) bool whose cell cannot be used, which is null, by column."""

    def cut(self, start: int, stop: int) -> Block:
        """The rows whose cursors lie in [start, stop)."""
        low, high = np.searchsorted(self.cursors, (start, stop))
        if low == 0 and high == len(self.cursors):
            return self
        return self.slice(int(low), int(high - low))

    def slice(self, low: int, count: int) -> Block:
        """`count` rows from row `low` on."""
        return Block(
            batch=self.batch.slice(low, count),
            cursors=self.cursors[low : low + count],
            bad={name: rows[low : low + count] for name, rows in self.bad.items()},
        )


class BlockSource(abc.ABC):
    """Scan and rows of a format that yields blocks."""

    @property
    @abc.abstractmethod
    def end(self) -> int:
        """As `Source.end`."""

    @abc.abstractmethod
    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """Blocks that hold all rows with cursors in [start, stop), and maybe more of
        the rows beside them.
        """

    def scan(
        self, columns: Sequence[str], start: int = 0
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """As `Source.scan`."""
        for block in self.blocks(columns, start, self.end):
            kept = block.cut(start, self.end)
            if len(kept.cursors):
                yield kept.batch, kept.cursors

    def rows(
        self, columns: Sequence[str], start: int, stop: int
    ) -> Iterator[Mapping[str, Any]]:
        """As `Source.rows`."""
        for block in self.blocks(columns, start, stop):
            kept = block.cut(start, stop)
            for low in range(0, len(kept.cursors), _ROWS):
                yield from _row_dicts(kept.slice(low, _ROWS))


def _row_dicts(block: Block) -> Iterator[dict[str, Any]]:
    names = block.batch.schema.names
    if not names:
        yield from ({} for _ in block.cursors)
        return
    columns = [_python_cells(column) for column in block.batch.columns]
    for name, rows in block.bad.items():
        if name in names:
            cells = columns[names.index(name)]
            for place in np.flatnonzero(rows):
                cells[place] = BadText()
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def _python_cells(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except _NO_PYTHON_VALUE:
        return [cell.as_py() if _is_readable(cell) else BadText() for cell in column]


def text_block(batch: pa.RecordBatch, cursors: np.ndarray) -> Block:
    """A block of `batch`, whose text may be anything but UTF-8."""
    arrays, bad = [], {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        wrong = not_utf8(column)
        if wrong is not None:
            bad[name] = wrong
        arrays.append(column if wrong is None else with_nulls(column, wrong))
    if bad:
        batch = pa.RecordBatch.from_arrays(arrays, schema=batch.schema)
    return Block(batch=batch, cursors=cursors, bad=bad)


def not_utf8(column: pa.Array) -> np.ndarray | None:
    """Cells (rows,) bool with text that is not UTF-8, also inside lists and structs;
    None where there is none.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        # Arrow looks at the structure first, and cells of a broken one kill.
        if "UTF8" not in str(error):
            raise
        return np.array([not _is_readable(cell) for cell in column], bool)
    return None


def _is_readable(cell: pa.Scalar) -> bool:
    try:
        cell.as_py()
    except _NO_PYTHON_VALUE:
        return False
    return True


def with_nulls(column: pa.Array, rows: np.ndarray) -> pa.Array:
    """The column with null in `rows` (rows,) bool."""
    return column.take(pa.array(np.arange(len(column)), mask=rows))


def widened(kind: pa.DataType) -> pa.DataType:
    """The type that holds any amount of what `kind` holds, in its plainest form."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_text(kind):
        kind = pa.large_string()
    elif any(is_bytes(kind) for is_bytes in _BYTES):
        kind = pa.large_binary()
    elif any(is_list(kind) for is_list in _LISTS):
        kind = pa.large_list(widened(kind.value_type))
    elif pa.types.is_struct(kind):
        kind = pa.struct([field.with_type(widened(field.type)) for field in kind])
    return kind


def wide_schema(schema: pa.Schema) -> pa.Schema:
    """Names and widened types of a file's columns."""
    return pa.schema([pa.field(field.name, widened(field.type)) for field in schema])


def common_schema(mine: pa.Schema, theirs: pa.Schema, name: str) -> pa.Schema:
    """The schema that columns of two files fit, both of them wide.

    Raises:
        ValueError: other columns in file `name`, or text in one and no text in other.
    """
    if mine.names != theirs.names:
        raise ValueError(
            f"{name} has other columns ({', '.join(theirs.names)}) than the files "
            f"before it ({', '.join(mine.names)}); give them as inputs of their own"
        )
    pairs = zip(mine, theirs, strict=True)
    return pa.schema([_common_field(*pair, name) for pair in pairs])


def _common_field(mine: pa.Field, theirs: pa.Field, name: str) -> pa.Field:
    kinds = [mine.type, theirs.type]
    mixed = len({pa.types.is_large_string(kind) for kind in kinds}) == 2
    try:
        if mixed and not any(pa.types.is_null(kind) for kind in kinds):
            raise pa.ArrowTypeError("text and no text")
        pair = [pa.schema([mine]), pa.schema([theirs])]
        (field,) = pa.unify_schemas(pair, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"column {mine.name!r} holds {theirs.type} in {name}, but {mine.type} in "
            "the files before it; write all with one type"
        ) from error
    return field


def as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as the wide type that its own fits."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column if column.type == kind else column.cast(kind)


def batch_rows(fields: Iterable[pa.Field]) -> int:
    """Rows that are read at a time: a batch with images holds the bytes of all."""
    return IMAGE_ROWS if any(_holds_bytes(field.type) for field in fields) else MAX_ROWS


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    if pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_large_binary(kind)
