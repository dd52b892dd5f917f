"""Parquet files: rows numbered over all files, read row group by row group.

Owns reading only the row groups that a range needs, and naming the one that is damaged.
Does not own types (`pipeline.sources.base`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.base import (
    MAX_ROWS,
    Block,
    BlockSource,
    as_type,
    batch_rows,
    common_schema,
    text_block,
    wide_schema,
)
from pipeline.sources.files import (
    Found,
    InputFile,
    in_threads,
    laid_end_to_end,
    overlapping,
)
from pipeline.storage import file_size, open_file
from pipeline.storage_local import local_path

_FOOTER_BYTES = 8
_READ_BUFFER = 1 << 16
# What a damaged file can make of Arrow's reader.
READ_ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeError, KeyError)


@dataclass(frozen=True, kw_only=True)
class ParquetSource(BlockSource):
    """Parquet files with columns of the same names."""

    base: str
    files: tuple[InputFile, ...]
    schema: pa.Schema
    kind: str = "parquet"
    default_columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Rows of all files."""
        return self.files[-1].stop

    def fingerprint(self) -> list[dict[str, Any]]:
        """The footer holds sizes, offsets and statistics of every column chunk: it
        tells corpora apart without reading their images.
        """
        return in_threads(_fingerprint, self.files)

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        fields = [self.schema.field(name) for name in columns]
        for file in overlapping(self.files, start, stop):
            with _opened(file.url) as parquet:
                yield from _blocks(parquet, file, fields, start, stop)


def open_parquet(found: Sequence[Found], base: str) -> ParquetSource:
    """Open files whose columns have the same names.

    Raises:
        ValueError: unreadable, or with other columns than the files before.
    """
    schema: pa.Schema | None = None
    rows = []
    opened = in_threads(_schema_and_rows, found)
    for file, (mine, n_rows) in zip(found, opened, strict=True):
        schema = mine if schema is None else common_schema(schema, mine, file.name)
        rows.append(n_rows)
    files = laid_end_to_end(zip(found, rows, strict=True))
    return ParquetSource(base=base, files=files, schema=schema)


def _schema_and_rows(file: Found) -> tuple[pa.Schema, int]:
    try:
        with _opened(file.url) as parquet:
            return wide_schema(parquet.schema_arrow), parquet.metadata.num_rows
    except READ_ERRORS as error:
        raise ValueError(
            f"{file.name} is no whole Parquet file ({first_line(error)}); write it "
            "anew or leave it out"
        ) from error


@contextlib.contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    path = local_path(url)
    # Without pre-buffering: a whole column chunk, which may be all images, would be
    # held in memory.
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": _READ_BUFFER}
    # Of pages that have one; it costs the others nothing.
    options["page_checksum_verification"] = True
    if path is not None:
        with pq.ParquetFile(path, **options) as parquet:
            yield parquet
        return
    with open_file(url) as file, pq.ParquetFile(file, **options) as parquet:
        yield parquet


def _blocks(
    parquet: pq.ParquetFile,
    file: InputFile,
    fields: Sequence[pa.Field],
    start: int,
    stop: int,
) -> Iterator[Block]:
    first = file.start
    for group in range(parquet.num_row_groups):
        n_rows = parquet.metadata.row_group(group).num_rows
        if first < stop and start < first + n_rows:
            try:
                yield from _group_blocks(parquet, group, fields, first, stop)
            except READ_ERRORS as error:
                raise OSError(
                    f"row group {group} of {file.name} cannot be read "
                    f"({first_line(error)}); where the file is damaged, write it anew "
                    "or leave it out"
                ) from error
        first += n_rows


def _group_blocks(
    parquet: pq.ParquetFile,
    group: int,
    fields: Sequence[pa.Field],
    first: int,
    stop: int,
) -> Iterator[Block]:
    """Blocks of a row group whose first row is `first`, as far as `stop`."""
    end = first + parquet.metadata.row_group(group).num_rows
    for batch, n_rows in _batches(parquet, group, fields):
        if first >= stop:
            return
        columns = [
            as_type(column, target.type)
            for column, target in zip(batch, fields, strict=True)
        ]
        made = pa.RecordBatch.from_arrays(columns, [each.name for each in fields])
        yield text_block(made, np.arange(first, first + n_rows))
        first += n_rows
    if first != end:
        raise OSError(f"it ends {end - first} rows early")


def _batches(
    parquet: pq.ParquetFile, group: int, fields: Sequence[pa.Field]
) -> Iterator[tuple[list[pa.Array], int]]:
    if not fields:
        n_rows = parquet.metadata.row_group(group).num_rows
        yield from (
            ([], min(MAX_ROWS, n_rows - low)) for low in range(0, n_rows, MAX_ROWS)
        )
        return
    names = [each.name for each in fields]
    for batch in parquet.iter_batches(
        batch_rows(fields),
        row_groups=[group],
        columns=names,
        use_threads=False,
    ):
        yield [batch.column(name) for name in names], batch.num_rows


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _fingerprint(file: InputFile) -> dict[str, Any]:
    with open_file(file.url) as opened:
        opened.seek(-_FOOTER_BYTES, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-_FOOTER_BYTES - length, os.SEEK_END)
        digest = hashlib.sha256(opened.read()).hexdigest()
    return {
        "file": file.name,
        "bytes": file_size(file.url),
        "rows": file.stop - file.start,
        "sha256": digest,
    }
