"""Arrow files and Hugging Face datasets saved with `save_to_disk`.

Owns reading IPC streams and files, and which files of a saved dataset count. Does not
own types (`pipeline.sources.base`). Local files are mapped into memory, so that rows in
the middle are found by headers alone; remote ones cannot be, and are spooled first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipeline.sources.base import (
    Block,
    BlockSource,
    NeedsSpool,
    Source,
    as_type,
    batch_rows,
    common_schema,
    not_utf8,
    text_block,
    wide_schema,
)
from pipeline.sources.files import (
    Found,
    InputFile,
    in_threads,
    laid_end_to_end,
    overlapping,
    sampled_fingerprint,
    sizes,
)
from pipeline.sources.parquet import READ_ERRORS, first_line
from pipeline.sources.spool import copied, spooled_source
from pipeline.storage import Storage, file_size, open_file
from pipeline.storage_local import local_path

_MAGIC = b"ARROW1"
# What `save_to_disk` writes beside the files, and the most that is read of it.
_STATE = "state.json"
_MAX_STATE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class ArrowSource(BlockSource):
    """Arrow IPC files, local where rows are read from the middle."""

    base: str
    files: tuple[InputFile, ...]
    schema: pa.Schema
    kind: str = "arrow"
    default_columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Rows of all files."""
        return self.files[-1].stop

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and pieces of every file."""
        return in_threads(_fingerprint, self.files)

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        fields = [self.schema.field(name) for name in columns]
        for file in overlapping(self.files, start, stop):
            first = file.start
            for batch in _batches(file):
                if first >= stop:
                    break
                low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                for at in range(low, high, size := batch_rows(fields)):
                    part = batch.slice(at, min(size, high - at))
                    yield _block(part, fields, first + at, file)
                first += batch.num_rows


def _block(
    batch: pa.RecordBatch, fields: Sequence[pa.Field], first: int, file: InputFile
) -> Block:
    try:
        # Arrow trusts the offsets of a file until it is told not to.
        for each in fields:
            not_utf8(batch.column(each.name))
        columns = [as_type(batch.column(each.name), each.type) for each in fields]
        made = pa.RecordBatch.from_arrays(columns, [each.name for each in fields])
        return text_block(made, np.arange(first, first + batch.num_rows))
    except READ_ERRORS as error:
        raise OSError(_damaged(file.name, error)) from error


def _damaged(name: str, error: BaseException) -> str:
    return f"{name} cannot be read ({first_line(error)}); write it anew or leave it out"


def _batches(file: InputFile | Found) -> Iterator[pa.RecordBatch]:
    """Record batches of a file; where it is local their bytes stay on the disk.

    Raises:
        OSError: damaged.
    """
    try:
        with _opened(file.url) as reader:
            if isinstance(reader, pa.RecordBatchFileReader):
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
            else:
                yield from reader
    except READ_ERRORS as error:
        raise OSError(_damaged(file.name, error)) from error


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    path = local_path(url)
    raw = open_file(url) if path is None else pa.memory_map(str(path))
    with contextlib.closing(raw):
        start = raw.read(len(_MAGIC))
        raw.seek(0)
        opened = pa.ipc.open_file if start == _MAGIC else pa.ipc.open_stream
        with opened(raw) as reader:
            yield reader


def open_arrow(found: Sequence[Found], base: str) -> ArrowSource | RemoteArrow:
    """Open files whose columns have the same names.

    Raises:
        ValueError: unreadable, or with other columns than the files before.
    """
    found = _current(found)
    schemas = in_threads(_schema, found)
    schema = schemas[0]
    for file, mine in zip(found, schemas, strict=True):
        schema = common_schema(schema, mine, file.name)
    if all(local_path(file.url) is not None for file in found):
        rows = in_threads(_count, found)
        files = laid_end_to_end(zip(found, rows, strict=True))
        return ArrowSource(base=base, files=files, schema=schema)
    files = laid_end_to_end(zip(found, sizes(found), strict=True))
    return RemoteArrow(base=base, files=files, schema=schema)


def _current(found: Sequence[Found]) -> list[Found]:
    """The files without a saved dataset's caches and what an earlier save left."""
    folders = {posixpath.dirname(file.url) for file in found}
    current: dict[str, set[str]] = {}
    for folder in folders:
        with (
            contextlib.suppress(FileNotFoundError),
            open_file(f"{folder}/{_STATE}") as f,
        ):
            current[folder] = _data_files(f.read(_MAX_STATE))
    kept = []
    for file in found:
        folder, name = posixpath.split(file.url)
        if name in current.get(folder, (name,)):
            kept.append(file)
    return kept or list(found)


def _data_files(state: bytes) -> set[str]:
    try:
        return {entry["filename"] for entry in orjson.loads(state)["_data_files"]}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{_STATE} is not what `save_to_disk` writes") from error


def _schema(file: Found) -> pa.Schema:
    try:
        with _opened(file.url) as reader:
            return wide_schema(reader.schema)
    except READ_ERRORS as error:
        raise ValueError(_damaged(file.name, error)) from error


def _count(file: Found) -> int:
    return sum(batch.num_rows for batch in _batches(file))


@dataclass(frozen=True, kw_only=True)
class RemoteArrow(NeedsSpool):
    """Arrow files that can only be read from the start."""

    base: str
    files: tuple[InputFile, ...]
    """Their bytes laid end to end."""
    schema: pa.Schema
    kind: str = "arrow"
    default_columns: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and pieces of every file."""
        return in_threads(sampled_fingerprint, self.files)

    def spooled(self, storage: Storage, name: str) -> Source:
        """As `NeedsSpool.spooled`."""
        # Rows are counted while they are copied: each file may have any number.
        far = 1 << 40
        found = ((Found(url=each.url, name=each.name), far) for each in self.files)
        files = laid_end_to_end(found)
        source = ArrowSource(base=self.base, files=files, schema=self.schema)
        return spooled_source(self, storage, name, copied(source, self.schema))


def _fingerprint(file: InputFile) -> dict[str, Any]:
    rows = file.stop - file.start
    size = file_size(file.url)
    return {
        **sampled_fingerprint(dataclasses.replace(file, start=0, stop=size)),
        "rows": rows,
    }
