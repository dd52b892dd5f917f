"""JSON Lines: one object a line, whose fields are the columns.

Owns which columns there are: the fields of the first lines of the files. Does not own
their types (`pipeline.sources.fields`). A field that a line lacks is null; a field that
appears only later is not seen; a line that is no object is a row that cannot be used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.sources.base import Block
from pipeline.sources.fields import (
    caption_types,
    field_column,
    field_types,
    nested_fields,
    parse_object,
    schema_of,
)
from pipeline.sources.files import Found, InputFile, laid_end_to_end, sizes
from pipeline.sources.rows import TextBlock, read_rows
from pipeline.sources.text import BYTE_ORDER_MARK, TextSource, without_rows
from pipeline.storage import open_file

# Lines of all files together that types are found in, and bytes of each file.
_SAMPLE_ROWS = 10_000
_SAMPLE_BYTES = 8 << 20
_SAMPLE_FILES = 64


@dataclass(frozen=True, kw_only=True)
class JsonlSource(TextSource):
    """JSON Lines files."""

    caption_types: Mapping[str, pa.DataType]
    """Types of the columns with text where they are captions."""
    captions: frozenset[str] = frozenset()
    """Columns that are."""

    def with_captions(self, names: Collection[str]) -> JsonlSource:
        """The source as it is read where these columns are captions: lists of text stay
        lists beside anything else, and what is neither text nor such a list is bad.
        """
        kinds = {
            name: kind for name, kind in self.caption_types.items() if name in names
        }
        fields = [
            field.with_type(kinds.get(field.name, field.type)) for field in self.schema
        ]
        return replace(self, schema=pa.schema(fields), captions=frozenset(kinds))

    def parsed(self, block: TextBlock, columns: Sequence[str], offset: int) -> Block:
        """As `TextSource.parsed`."""
        cells: list[list[Any]] = [[] for _ in columns]
        wrong_rows = np.zeros(len(block.starts), bool)
        # Only what is asked for is kept of a block's objects.
        for place, line in enumerate(_lines(block) if columns else ()):
            fields = parse_object(line)
            wrong_rows[place] = fields is None
            for values, name in zip(cells, columns, strict=True):
                values.append(None if fields is None else fields.get(name))
        arrays, bad = [], {}
        for values, name in zip(cells, columns, strict=True):
            kind, captions = self.schema.field(name).type, name in self.captions
            column, wrong = field_column(values, kind, captions=captions)
            arrays.append(column)
            if wrong is not None:
                bad[name] = wrong
        parsed = Block(
            batch=pa.RecordBatch.from_arrays(arrays, list(columns)),
            cursors=offset + block.starts,
            bad=bad,
        )
        return without_rows(parsed, wrong_rows)


def _lines(block: TextBlock) -> Iterator[bytes]:
    for start, end in zip(block.starts.tolist(), block.ends.tolist(), strict=True):
        yield block.data[start:end]


def open_jsonl(found: Sequence[Found], base: str) -> JsonlSource:
    """Open files of one object a line.

    Raises:
        ValueError: no object in the first lines.
    """
    files = laid_end_to_end(zip(found, sizes(found), strict=True))
    objects = list(_sampled(files))
    if not objects and files[-1].stop:
        raise ValueError(
            "none of its first lines is a JSON object; write one a line (jq -c .)"
        )
    return JsonlSource(
        kind="jsonl",
        base=base,
        files=files,
        headers=tuple(_mark_bytes(file) for file in found),
        schema=schema_of(field_types(objects), nested_fields(objects)),
        caption_types=caption_types(objects),
    )


def _sampled(files: Sequence[InputFile]) -> Iterator[dict[str, Any]]:
    """Objects of the first lines of files that are spread over all of them."""
    step = -(-len(files) // _SAMPLE_FILES)
    chosen = files[::step]
    for file in chosen:
        left = _SAMPLE_ROWS // len(chosen)
        size = file.stop - file.start
        stop = min(size, _SAMPLE_BYTES)
        for block in read_rows(file.url, 0, stop, size, quoted=False):
            for line in _lines(block):
                row = parse_object(line.removeprefix(BYTE_ORDER_MARK))
                left -= 1
                if row is not None:
                    yield row
                if not left:
                    break
            if left <= 0:
                break


def _mark_bytes(file: Found) -> int:
    with open_file(file.url) as opened:
        mark = opened.read(len(BYTE_ORDER_MARK))
    return len(mark) if mark == BYTE_ORDER_MARK else 0
