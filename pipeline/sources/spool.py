"""Corpora whose rows must be brought into order first: a copy of them, as Parquet.

Owns the spool below `.palimpsest/spool/` of the output: its files, when a finished one
is used again, external sorts by DuckDB in bounded memory, and bringing rows with one
key together (`--group`). Does not own what is sorted in other formats
(`pipeline.sources.coco`, `pipeline.sources.folder`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.base import Block, BlockSource, NeedsSpool, Source
from pipeline.sources.files import InputFile
from pipeline.sources.parquet import ParquetSource
from pipeline.storage import Storage

SPOOL = ".palimpsest/spool"
# Columns of a spool beside those of the corpus: places of the columns whose cell cannot
# be used, and the row's cursor in the corpus.
_BAD, _CURSOR = "__bad__", "__cursor__"
_BAD_TYPE = pa.large_list(pa.int32())
_VERSION = 1
_FILE, _MARKER = "rows.parquet", "spool.json"
# A row group ends with the first of these, and so does what a reader holds.
_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 << 20
# Of one sort, on the driver; what does not fit goes to the disk.
_MEMORY = "1GB"
_THREADS = 2
_SORTED_ROWS = 1024

Fill = Callable[[Path], Iterator[pa.RecordBatch]]


@dataclass(frozen=True, kw_only=True)
class SpooledSource(ParquetSource):
    """A spool: rows as the corpus has them, in another order."""

    prints: tuple[Mapping[str, Any], ...]
    """Fingerprint of the corpus."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """As the corpus's own."""
        return [dict(entry) for entry in self.prints]

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        if not columns:
            yield from super().blocks(columns, start, stop)
            return
        whole = dataclasses.replace(self, schema=self.schema.append(_BAD_FIELD))
        for block in super(SpooledSource, whole).blocks([*columns, _BAD], start, stop):
            bad = _bad_cells(block.batch.column(_BAD), self.schema.names)
            yield Block(
                batch=block.batch.select(list(columns)),
                cursors=block.cursors,
                bad={name: rows for name, rows in bad.items() if name in columns},
            )


_BAD_FIELD = pa.field(_BAD, _BAD_TYPE)


def _bad_cells(places: pa.Array, names: Sequence[str]) -> dict[str, np.ndarray]:
    bad: dict[str, np.ndarray] = {}
    for row in np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False)):
        for place in places[int(row)].as_py():
            rows = bad.setdefault(names[place], np.zeros(len(places), bool))
            rows[row] = True
    return bad


@dataclass(frozen=True, kw_only=True)
class GroupedSource(NeedsSpool):
    """A corpus in which rows with one value of the column `by` are to stand side by
    side: groups in the order of their first rows, rows in their order. Rows without a
    value stay alone.
    """

    given: Source | NeedsSpool
    by: str
    kind: str
    base: str
    schema: pa.Schema
    default_columns: Mapping[str, Any]
    captions: tuple[str, ...] = ()
    """Columns that are read as captions: their cells in the spool depend on it."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """As `Source.fingerprint`."""
        return self.given.fingerprint()

    def spooled(self, storage: Storage, name: str) -> Source:
        """As `NeedsSpool.spooled`."""
        first = f"{name}/given"

        def fill(work: Path) -> Iterator[pa.RecordBatch]:
            given = self.given
            if isinstance(given, NeedsSpool):
                given = given.spooled(storage, first)
            assert isinstance(given, BlockSource)
            blocks = given.blocks(given.schema.names, 0, given.end)
            rows = work / _FILE
            names = [*self.schema.names, _CURSOR, _BAD]
            # DuckDB takes names that differ in case alone for one.
            plain = [f"c{place}" for place in range(len(names))]
            stored = _stored(blocks, self.schema)
            write_rows(rows, (batch.rename_columns(plain) for batch in stored))
            key = plain[names.index(self.by)]
            for batch in sort(work, _grouping(rows, key, plain[-2])):
                yield batch.rename_columns(names)

        spool = spooled_source(
            self,
            storage,
            f"{name}/grouped",
            fill,
            by=self.by,
            captions=self.captions,
        )
        storage.remove_tree(f"{SPOOL}/{first}")
        return spool


def grouped(given: Source | NeedsSpool, by: str) -> GroupedSource:
    """The corpus with rows that have one value of column `by` side by side.

    Raises:
        ValueError: there is no such column.
    """
    if by not in given.schema.names:
        names = ", ".join(given.schema.names)
        raise ValueError(f"--group: no column {by!r}; the columns are: {names}")
    return GroupedSource(
        given=given,
        by=by,
        kind=given.kind,
        base=given.base,
        schema=given.schema,
        default_columns=given.default_columns,
    )


def _grouping(rows: Path, key: str, cursor: str) -> str:
    """SQL for the rows of a file in the order that `GroupedSource` promises."""
    table = f"read_parquet({literal(rows)})"
    # Not as a window: it would hold all columns of the rows.
    return f"""
        SELECT given.* FROM {table} AS given LEFT JOIN (
            SELECT CAST({key} AS VARCHAR) AS key, min({cursor}) AS first FROM {table}
            WHERE CAST({key} AS VARCHAR) <> '' GROUP BY ALL
        ) AS groups ON CAST(given.{key} AS VARCHAR) = groups.key
        ORDER BY coalesce(groups.first, given.{cursor}), given.{cursor}
    """


def copied(source: BlockSource, schema: pa.Schema) -> Fill:
    """Fills a spool with the rows of a source in their order."""
    return lambda _: _stored(source.blocks(schema.names, 0, source.end), schema)


def _stored(blocks: Iterable[Block], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Blocks with all columns as they lie in a spool."""
    fields = [*schema, pa.field(_CURSOR, pa.int64()), _BAD_FIELD]
    for block in blocks:
        places: list[list[int] | None] = [None] * len(block.cursors)
        for place, name in enumerate(schema.names):
            for row in np.flatnonzero(block.bad.get(name, ())):
                places[row] = [*(places[row] or ()), place]
        arrays = [*block.batch.columns, pa.array(block.cursors)]
        arrays.append(pa.array(places, _BAD_TYPE))
        yield pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def spooled_source(
    given: NeedsSpool, storage: Storage, name: str, fill: Fill, **settings: Any
) -> SpooledSource:
    """The spool `name` of a corpus, made by `fill` unless it is there already.

    `fill(directory)` yields batches with the columns of `given`, in their final order,
    and may keep files in the directory meanwhile.

    Raises:
        ValueError: there are no rows.
    """
    prints = given.fingerprint()
    folder = f"{SPOOL}/{name}"
    fields = [str(field) for field in given.schema]
    what = [_VERSION, given.kind, prints, fields, sorted(settings.items())]
    digest = hashlib.sha256(orjson.dumps(what)).hexdigest()
    rows = _finished(storage, folder, digest)
    if rows is None:
        storage.remove_tree(folder)
        with storage.stage(folder) as directory:
            work = directory / "work"
            work.mkdir()
            rows = write_rows(directory / _FILE, map(_with_bad, fill(work)))
            shutil.rmtree(work)
        # Last: a spool counts as finished once this says so.
        marker = {"corpus": digest, "rows": rows}
        storage.write(f"{folder}/{_MARKER}", orjson.dumps(marker))
    if not rows:
        raise ValueError(f"the corpus in {given.base} has no rows")
    root = storage.url if storage.path is None else str(storage.path.absolute())
    return SpooledSource(
        kind=given.kind,
        base=given.base,
        files=(
            InputFile(url=f"{root}/{folder}/{_FILE}", name=_FILE, start=0, stop=rows),
        ),
        schema=given.schema,
        default_columns=given.default_columns,
        prints=tuple(prints),
    )


def _with_bad(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with a column of bad cells, where it has none because none is."""
    if _BAD in batch.schema.names:
        return batch
    return batch.append_column(_BAD_FIELD, pa.nulls(batch.num_rows, _BAD_TYPE))


def _finished(storage: Storage, folder: str, digest: str) -> int | None:
    """Rows of a finished spool of the same corpus, else None."""
    try:
        marker = orjson.loads(storage.read(f"{folder}/{_MARKER}"))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return marker["rows"] if marker["corpus"] == digest else None


def write_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches as one Parquet file with small row groups; returns its rows."""
    writer: pq.ParquetWriter | None = None
    rows = 0
    for group in _groups(batches):
        if writer is None:
            writer = pq.ParquetWriter(path, group.schema)
        writer.write_table(group, row_group_size=_GROUP_ROWS)
        rows += group.num_rows
    if writer is not None:
        writer.close()
    return rows


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        n_rows = sum(each.num_rows for each in held)
        if n_rows >= _GROUP_ROWS or sum(each.nbytes for each in held) >= _GROUP_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def sort(work: Path, query: str) -> Iterator[pa.RecordBatch]:
    """Rows of an SQL query, which DuckDB sorts below `work` where memory ends.

    Raises:
        OSError: no room for the sort.
    """
    import duckdb

    settings: dict[str, Any] = {
        "threads": _THREADS,
        "memory_limit": _MEMORY,
        "temp_directory": str(work / "sort"),
        "arrow_large_buffer_size": True,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    try:
        with duckdb.connect(":memory:", config=settings) as database:
            yield from database.sql(query).to_arrow_reader(_SORTED_ROWS)
    except duckdb.Error as error:
        raise OSError(
            f"the rows could not be sorted ({str(error).splitlines()[0]}); make room "
            f"on the disk of {work}"
        ) from error


def literal(path: Path) -> str:
    """A path in SQL."""
    return "'" + str(path).replace("'", "''") + "'"
