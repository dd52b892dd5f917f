"""Corpora: Parquet with embedded images or paths, TSV and CSV with a path column.

Owns opening a corpus, its fingerprint, and reading rows and image bytes. Does not own
which columns are read (`pipeline.columns`), how rows become inputs (`pipeline.plan`) or
what is done with them (`pipeline.ranges`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.captions import BadText
from pipeline.columns import is_text
from pipeline.images import ImageError

_SEPARATORS = {".tsv": "\t", ".csv": ","}
# Small, because a batch holds the bytes of all its images.
_BATCH_ROWS = 64
_FOOTER_BYTES = 8
# What a wrong path can meet. Every other error is the storage's.
_FAULTS_OF_THE_PATH = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_READS = 4
_RETRY_SECONDS = 0.5
_READ_BUFFER = 1 << 16
_NOT_UTF8 = "not UTF-8; save the table as UTF-8 (iconv -f LATIN1 -t UTF-8)"
_TEXT_BLOCK = 1 << 20


class RowRange(Protocol):
    """Some consecutive rows of a corpus, small enough to send to a task."""

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """The rows in order, as mappings of the given columns."""


class Source(Protocol):
    """An opened corpus."""

    @property
    def folder(self) -> Path:
        """Paths in the corpus are relative to this folder, and stay inside it."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""

    @property
    def n_rows(self) -> int:
        """Rows of the corpus."""

    def column(self, name: str) -> pa.Array:
        """One whole column (n_rows,), for planning."""

    def part(self, start: int, stop: int) -> RowRange:
        """Rows [start, stop)."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the corpus's files, wherever they lie."""


def open_source(path: str) -> Source:
    """Open a Parquet, TSV or CSV file or a folder of Parquet files.

    Raises:
        ValueError: not there, not one of these, unreadable, or without rows.
    """
    given = Path(path).absolute()
    if not given.exists():
        raise ValueError(f"--input {path} does not exist")
    paths = sorted(given.rglob("*.parquet")) if given.is_dir() else [given]
    if not paths:
        raise ValueError(
            f"--input {path} is a folder without *.parquet files; give a TSV or CSV "
            "table of its images and captions"
        )
    try:
        source = _open(paths)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--input {path} cannot be read: {reason}") from error
    if not source.n_rows:
        raise ValueError(f"--input {path} has no rows: the corpus is empty")
    return source


def read_image(cell: Any, folder: Path) -> bytes:
    """Encoded bytes of an image cell: bytes, `{bytes, path}`, or a path.

    Raises:
        ImageError: null, missing, or a path that leaves `folder`.
        OSError: storage failed, which is no fault of the input.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not cell:
        raise ImageError("missing_image", "the cell is empty")
    if "\0" in cell:
        raise ImageError("missing_file", "no path has a null character")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, cell))
    if os.path.commonpath([root, path]) != root:
        raise ImageError("path_outside_input", cell)
    try:
        return _file_bytes(path)
    except OSError as error:
        if error.errno in _FAULTS_OF_THE_PATH:
            raise ImageError("missing_file", cell) from error
        raise OSError(
            f"{path} cannot be read ({error.strerror}, {_READS} times): this is the "
            "storage's fault or its permissions', not the image's; the same command "
            "continues once it is mended"
        ) from error


def _file_bytes(path: str) -> bytes:
    """The file's bytes, tried again where storage may have failed for a moment."""
    for left in reversed(range(_READS)):
        try:
            # Opening a pipe or a device could wait for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return Path(path).read_bytes()
        except OSError as error:
            if not left or error.errno in _FAULTS_OF_THE_PATH:
                raise
            time.sleep(_RETRY_SECONDS)
    raise AssertionError("the last read returns or raises")


@dataclass(frozen=True, kw_only=True)
class _ParquetRange:
    """Rows [start, stop) of files laid end to end; reads only row groups it needs."""

    files: tuple[tuple[Path, int], ...]
    start: int
    stop: int

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        first = 0
        for path, n_rows in self.files:
            start, stop = max(self.start - first, 0), min(self.stop - first, n_rows)
            if start < stop:
                yield from _parquet_rows(path, start, stop, columns)
            first += n_rows


@dataclass(frozen=True, kw_only=True)
class _ParquetSource:
    folder: Path
    files: tuple[tuple[Path, int], ...]
    schema: pa.Schema

    @property
    def n_rows(self) -> int:
        return sum(n_rows for _, n_rows in self.files)

    def column(self, name: str) -> pa.Array:
        # Chunk by chunk, or text beyond 2 GiB overflows the offsets of its type.
        kind = self.schema.field(name).type
        chunks = [
            chunk.cast(kind)
            for path, _ in self.files
            for chunk in pq.read_table(path, columns=[name], partitioning=None)[
                name
            ].chunks
        ]
        return pa.chunked_array(chunks, kind).combine_chunks()

    def part(self, start: int, stop: int) -> RowRange:
        return _ParquetRange(files=self.files, start=start, stop=stop)

    def fingerprint(self) -> list[dict[str, Any]]:
        # The footer holds sizes, offsets and statistics of every column chunk: it tells
        # corpora apart without reading their images.
        return [
            {
                "file": path.relative_to(self.folder).as_posix(),
                "bytes": path.stat().st_size,
                "rows": n_rows,
                "sha256": hashlib.sha256(_parquet_footer(path)).hexdigest(),
            }
            for path, n_rows in self.files
        ]


@dataclass(frozen=True, kw_only=True)
class _TableRange:
    """Rows of a text table, already parsed."""

    table: pa.Table

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for batch in self.table.select(list(columns)).to_batches(1024):
            yield from batch.to_pylist()


@dataclass(frozen=True, kw_only=True)
class _TextSource:
    """A TSV or CSV table, held in memory: unlike Parquet it has no place to start
    reading in the middle, so ranges are sent to tasks as rows.
    """

    folder: Path
    path: Path
    table: pa.Table

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def n_rows(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> pa.Array:
        return self.table[name].combine_chunks()

    def part(self, start: int, stop: int) -> RowRange:
        # A bare slice would be sent with the whole table behind it.
        rows = np.arange(start, stop)
        return _TableRange(table=self.table.take(rows))

    def fingerprint(self) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size, rows = self.path.stat().st_size, self.n_rows
        return [{"file": self.path.name, "bytes": size, "rows": rows, "sha256": digest}]


def _open(paths: list[Path]) -> Source:
    suffix = paths[0].suffix.lower()
    if suffix in _SEPARATORS:
        table = _read_text(paths[0], _SEPARATORS[suffix])
        return _TextSource(folder=paths[0].parent, path=paths[0], table=table)
    if suffix != ".parquet":
        raise OSError(f"{suffix or 'no suffix'} is not .parquet, .tsv or .csv")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    schema = _wide_schema(pq.read_schema(paths[0]))
    files = []
    for path in paths:
        schema = _common_schema(schema, path, paths[0])
        files.append((path, pq.read_metadata(path).num_rows))
    return _ParquetSource(folder=folder, files=tuple(files), schema=schema)


def _wide_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, _wide(field.type)) for field in schema])


def _wide(kind: pa.DataType) -> pa.DataType:
    """The type that holds any amount of what `kind` holds."""
    if pa.types.is_dictionary(kind):
        return _wide(kind.value_type)
    if is_text(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_wide(kind.value_type))
    return kind


def _common_schema(schema: pa.Schema, path: Path, first: Path) -> pa.Schema:
    """`schema` with types that the file's columns fit too."""
    other = _wide_schema(pq.read_schema(path))
    if other.names != schema.names:
        raise OSError(f"{path.name} and {first.name} have different columns")
    fields = []
    for mine, theirs in zip(schema, other, strict=True):
        mixed = {is_text(mine.type), is_text(theirs.type)} == {True, False}
        nulls = pa.types.is_null(mine.type) or pa.types.is_null(theirs.type)
        try:
            if mixed and not nulls:
                raise pa.ArrowTypeError("text and no text")
            pair = [pa.schema([mine]), pa.schema([theirs])]
            fields += pa.unify_schemas(pair, promote_options="permissive")
        except pa.ArrowException as error:
            raise OSError(
                f"column {mine.name!r} holds {theirs.type} in {path.name}, but "
                f"{mine.type} in the files before it; write all with one type"
            ) from error
    return pa.schema(fields)


def _read_text(path: Path, separator: str) -> pa.Table:
    """All cells as text. CSV fields may be quoted; a TSV field is what stands between
    tabs, quotes included, so that one stray quote cannot swallow the rows after it.
    """
    quoted = separator == ","
    parse = pyarrow.csv.ParseOptions(
        delimiter=separator,
        quote_char='"' if quoted else False,
        newlines_in_values=quoted,
    )
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.readline()
    if not header.strip():
        raise OSError("it has no header line with column names")
    if len(header) == size and len(header.splitlines()) == 1:
        return pa.table({})
    block = _TEXT_BLOCK
    while True:
        try:
            return _parse_text(path, parse, block)
        except pa.ArrowInvalid as error:
            # A row may be longer than a block.
            if "straddling" not in str(error) or block > size:
                raise OSError(_explain_text(path, parse, block, error)) from error
            block *= 8


def _parse_text(
    path: Path, parse: pyarrow.csv.ParseOptions, block: int, *, threads: bool = True
) -> pa.Table:
    read = pyarrow.csv.ReadOptions(block_size=block, use_threads=threads)
    names = _header_names(path, parse, read)
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.large_string()), strings_can_be_null=False
    )
    return pyarrow.csv.read_csv(
        path, parse_options=parse, read_options=read, convert_options=convert
    )


def _header_names(
    path: Path, parse: pyarrow.csv.ParseOptions, read: pyarrow.csv.ReadOptions
) -> list[str]:
    with pyarrow.csv.open_csv(path, parse_options=parse, read_options=read) as reader:
        try:
            return reader.schema.names
        except UnicodeDecodeError as error:
            raise OSError(f"the header: {_NOT_UTF8}") from error


def _explain_text(
    path: Path, parse: pyarrow.csv.ParseOptions, block: int, error: Exception
) -> str:
    """What is wrong in which row of a table that does not parse, and the cure."""
    try:
        # Rows are counted only by a single thread.
        _parse_text(path, parse, block, threads=False)
    except pa.ArrowInvalid as counted:
        error = counted
    reason = str(error).strip().splitlines()[0].removeprefix("CSV parse error: ")
    if place := re.match(r"In CSV column #(\d+): Row #(\d+): .*UTF8", reason):
        read = pyarrow.csv.ReadOptions(block_size=block)
        name = _header_names(path, parse, read)[int(place[1])]
        return f"column {name!r}, row {place[2]}: {_NOT_UTF8}"
    if "Expected" in reason:
        separators = "tabs" if parse.delimiter == "\t" else "commas"
        return (
            f"{reason}; the header is row 1, and every row needs as many {separators}"
        )
    return reason


def _parquet_rows(
    path: Path, start: int, stop: int, columns: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    # Otherwise a whole column chunk, which may be all images, is held in memory.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BUFFER) as file:
        first = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if first < stop and start < first + n_rows:
                position = first
                batches = file.iter_batches(
                    _BATCH_ROWS,
                    row_groups=[group],
                    columns=list(columns),
                    use_threads=False,
                )
                for batch in batches:
                    low, high = max(start - position, 0), stop - position
                    if high <= 0:
                        break
                    yield from _decoded(batch.slice(low, max(high - low, 0)))
                    position += batch.num_rows
            first += n_rows


def _decoded(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows of a batch, with `BadText` for text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [decoded_cells(column) for column in batch.columns]
        names = batch.schema.names
        return [
            dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)
        ]


def decoded_cells(column: pa.Array) -> list[Any]:
    """Cells of a column, with `BadText` for text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded_cell(cell) for cell in column]


def _decoded_cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return BadText()


def _parquet_footer(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-_FOOTER_BYTES, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-_FOOTER_BYTES - length, os.SEEK_END)
        return file.read()
