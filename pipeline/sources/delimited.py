"""TSV and CSV tables: a header line, then rows of as many fields, all of them text.

Owns fields and the rows that do not have as many as the header. Does not own where rows
begin (`pipeline.sources.rows`). A TSV field is what stands between tabs, quotes
included; CSV fields may be quoted and then hold commas, line ends and doubled quotes.
A row that cannot be parsed is a row still, every cell of which is bad.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pipeline.sources.base import Block, not_utf8, text_block
from pipeline.sources.files import Found, in_threads, laid_end_to_end, sizes
from pipeline.sources.rows import FIELD, TextBlock
from pipeline.sources.text import BYTE_ORDER_MARK, TextSource, without_rows
from pipeline.storage import open_file

SEPARATORS = {"tsv": "\t", "csv": ","}
_MAX_HEADER = 1 << 20
_QUOTED = re.compile(rb'"([^"]*+(?:""[^"]*+)*+)"(.*)', re.DOTALL)
_FIELDS = re.compile(rb"(%b)(?:,|\Z)" % FIELD, re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DelimitedSource(TextSource):
    """Tables with one header."""

    def parsed(self, block: TextBlock, columns: Sequence[str], offset: int) -> Block:
        """As `TextSource.parsed`."""
        places = [self.schema.names.index(name) for name in columns]
        cells: list[pa.Array] = []
        wrong = np.zeros(len(block.starts), bool)
        if places:
            separator, n_fields = SEPARATORS[self.kind], len(self.schema)
            cells, wrong = _fields(block, separator, n_fields, places)
        batch = pa.RecordBatch.from_arrays(cells, names=list(columns))
        return without_rows(text_block(batch, offset + block.starts), wrong)


def open_delimited(kind: str, found: Sequence[Found], base: str) -> DelimitedSource:
    """Open tables that all have the same header.

    Raises:
        ValueError: a header is missing, not UTF-8, or not that of the other files.
    """
    names: list[str] | None = None
    headers = []
    for file, line in zip(found, in_threads(_header_line, found), strict=True):
        mine = _header_names(line, SEPARATORS[kind])
        if names is not None and mine != names:
            raise ValueError(
                f"{file.name} has other columns ({', '.join(mine)}) than the files "
                f"before it ({', '.join(names)}); give them as inputs of their own"
            )
        names = mine
        headers.append(len(line))
    return DelimitedSource(
        kind=kind,
        base=base,
        files=laid_end_to_end(zip(found, sizes(found), strict=True)),
        headers=tuple(headers),
        schema=pa.schema([(name, pa.large_string()) for name in names or ()]),
    )


def _header_line(file: Found) -> bytes:
    with open_file(file.url) as opened:
        return opened.readline(_MAX_HEADER)


def _header_names(line: bytes, separator: str) -> list[str]:
    text = line.removeprefix(BYTE_ORDER_MARK).removesuffix(b"\n").removesuffix(b"\r")
    if not text.strip():
        raise ValueError("it has no header line with column names")
    if b"\r" in text:
        raise ValueError("its lines end with CR alone; convert it (tr '\\r' '\\n')")
    if len(line) == _MAX_HEADER:
        raise ValueError(
            f"its first line is longer than {_MAX_HEADER} bytes, which is no header"
        )
    if separator == "," and text.count(b'"') % 2:
        raise ValueError("a quote in the header is not closed on its line")
    try:
        return [cell.decode() for cell in _row_fields(text, separator)]
    except UnicodeDecodeError as error:
        raise ValueError(
            "the header: not UTF-8; save the table as UTF-8 (iconv -f LATIN1 -t UTF-8)"
        ) from error


def _fields(
    block: TextBlock, separator: str, n_fields: int, places: Sequence[int]
) -> tuple[list[pa.Array], np.ndarray]:
    """The columns at `places`, and which rows (rows,) bool have another number of
    fields; their cells are empty.
    """
    data = block.data
    # Arrow takes a lone CR for a line end, which it is not in the middle of a field.
    if data.count(b"\r") == data.count(b"\r\n"):
        parsed = _parsed_by_arrow(block, separator, n_fields, places)
        if parsed is not None:
            return parsed
    rows = []
    for start, end in zip(block.starts.tolist(), block.ends.tolist(), strict=True):
        line = data[start:end].removesuffix(b"\n").removesuffix(b"\r")
        rows.append(_row_fields(line, separator))
    wrong = np.array([len(row) != n_fields for row in rows], bool)
    empty = [b""] * n_fields
    rows = [empty if bad else row for row, bad in zip(rows, wrong, strict=True)]
    columns = [
        pa.array([row[place] for row in rows], pa.large_binary()) for place in places
    ]
    # Bytes become text as they are: what is not UTF-8 is found later, cell by cell.
    return [column.view(pa.large_string()) for column in columns], wrong


def _row_fields(line: bytes, separator: str) -> list[bytes]:
    if separator != ",":
        return line.split(separator.encode())
    fields = _FIELDS.findall(line)
    # At the end of the line the expression matches once more, unless a comma is last.
    if not line.endswith(b",") and len(fields) > 1 and line:
        fields.pop()
    return [_unquoted(cell) for cell in fields]


def _unquoted(cell: bytes) -> bytes:
    quoted = _QUOTED.match(cell)
    return quoted[1].replace(b'""', b'"') + quoted[2] if quoted else cell


def _parsed_by_arrow(
    block: TextBlock, separator: str, n_fields: int, places: Sequence[int]
) -> tuple[list[pa.Array], np.ndarray] | None:
    """As `_fields`, or None where Arrow does not see the rows of the block."""
    numbers: list[int] = []

    def skip(row: Any) -> str:
        numbers.append(row.number)
        return "skip"

    quoted = separator == ","
    names = [str(place) for place in range(n_fields)]
    wanted = [str(place) for place in places]
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(block.data),
            read_options=pyarrow.csv.ReadOptions(
                column_names=names, block_size=len(block.data) + 1, use_threads=False
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                # Arrow hands rows over as text, and cannot where it is not UTF-8.
                invalid_row_handler=skip if _is_utf8(block.data) else None,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(wanted, pa.large_string()),
                include_columns=wanted,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    wrong = np.zeros(len(block.starts), bool)
    if table.num_rows + len(numbers) != len(wrong):
        return None
    wrong[np.array(numbers, np.int64) - 1] = True
    # Back to the places of all rows: a row of the wrong length takes any cell.
    source = np.cumsum(~wrong) - 1
    columns = [table[name].combine_chunks() for name in wanted]
    if numbers and table.num_rows:
        columns = [column.take(np.maximum(source, 0)) for column in columns]
    elif numbers:
        columns = [pa.array([""] * len(wrong), pa.large_string()) for _ in wanted]
    return columns, wrong


def _is_utf8(data: bytes) -> bool:
    return data.isascii() or not_utf8(pa.array([data]).view(pa.string())) is None
