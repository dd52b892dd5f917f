"""Sources that are text files of rows: their bytes laid end to end are the cursors.

Owns reading rows from any row's byte on, over several files. Does not own where rows
begin (`pipeline.sources.rows`) or what stands in them (`pipeline.sources.delimited`,
`pipeline.sources.jsonl`).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.sources.base import Block, BlockSource, with_nulls
from pipeline.sources.files import (
    InputFile,
    content_fingerprint,
    in_threads,
    overlapping,
)
from pipeline.sources.rows import TextBlock, read_rows

# Some editors and Windows programs put it before UTF-8.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class TextSource(BlockSource):
    """Text files with the same columns."""

    kind: str
    base: str
    files: tuple[InputFile, ...]
    headers: tuple[int, ...]
    """Bytes before the first row of each file."""
    schema: pa.Schema
    default_columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Bytes of all files."""
        return self.files[-1].stop

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and content of every file."""
        return in_threads(content_fingerprint, self.files)

    @abc.abstractmethod
    def parsed(self, block: TextBlock, columns: Sequence[str], offset: int) -> Block:
        """Columns of a block's rows; `offset` is the cursor of its first byte."""

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        headers = dict(zip(self.files, self.headers, strict=True))
        for file in overlapping(self.files, start, stop):
            found = read_rows(
                file.url,
                max(start - file.start, headers[file]),
                min(stop, file.stop) - file.start,
                file.stop - file.start,
                quoted=self.kind == "csv",
            )
            for block in found:
                offset = file.start + block.offset
                if block.bad:
                    yield _unreadable(self.schema, columns, offset)
                elif len(block.starts):
                    yield self.parsed(block, columns, offset)


def without_rows(block: Block, wrong: np.ndarray) -> Block:
    """The block with nothing usable in the `wrong` rows (rows,) bool."""
    if not wrong.any():
        return block
    names = block.batch.schema.names
    arrays = [with_nulls(column, wrong) for column in block.batch.columns]
    bad = {name: block.bad.get(name, wrong) | wrong for name in names}
    batch = pa.RecordBatch.from_arrays(arrays, schema=block.batch.schema)
    return Block(batch=batch, cursors=block.cursors, bad=bad)


def _unreadable(schema: pa.Schema, columns: Sequence[str], offset: int) -> Block:
    wrong = np.ones(1, bool)
    arrays = [pa.nulls(1, schema.field(name).type) for name in columns]
    return Block(
        batch=pa.RecordBatch.from_arrays(arrays, list(columns)),
        cursors=np.array([offset], np.int64),
        bad=dict.fromkeys(columns, wrong),
    )
