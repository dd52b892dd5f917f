"""Image folders: every image is a row, with the text and json files of the same name.

Owns listing a folder in order, whatever its size, and reading the files beside images:
`a/b.txt` has the captions of `a/b.jpg`, one a line; the fields of `a/b.json` are
columns; `captions` has whichever of the two an image has. They are read when a range
is, not when the folder is listed. Does not own the sort and the spool
(`pipeline.sources.spool`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.sources.base import Block, BlockSource, NeedsSpool, Source, as_type
from pipeline.sources.detect import IMAGE_SUFFIXES, suffix
from pipeline.sources.fields import (
    BAD,
    CAPTIONS,
    MAX_TEXT,
    TEXT,
    TEXTS,
    captions_of,
    column_names,
    field_column,
    field_types,
    has_captions,
    nested_fields,
    parse_object,
    parse_text,
    schema_of,
)
from pipeline.sources.files import find, in_threads
from pipeline.sources.spool import (
    SpooledSource,
    literal,
    sort,
    spooled_source,
    write_rows,
)
from pipeline.storage import Storage, open_file
from pipeline.storage_local import local_path

IMAGE, TXT = "image", "txt"
_BESIDE = ("txt", "json")
_KNOWN = (*IMAGE_SUFFIXES, *_BESIDE)
# Columns of the spool: names of the files beside the image.
_TXT, _JSON = "__txt__", "__json__"
_LISTED = pa.schema([("image", TEXT), (_TXT, TEXT), (_JSON, TEXT)])
_NAMES = pa.schema([("stem", TEXT), ("ending", TEXT), ("name", TEXT)])
_BATCH = 16_384
_SAMPLED = 64
# Files beside images that are looked at to find those that are.
_CANDIDATES = 100 * _SAMPLED


@dataclass(frozen=True, kw_only=True)
class FolderSource(NeedsSpool):
    """A folder, whose images are not listed yet."""

    base: str
    schema: pa.Schema
    fields: Mapping[str, str]
    """Columns that are fields of the json, and what they are called there."""
    default_columns: Mapping[str, Any]
    digest: Mapping[str, Any]
    kind: str = "folder"

    def fingerprint(self) -> list[dict[str, Any]]:
        """Number of files, and a digest of their names and sizes."""
        return [dict(self.digest)]

    def spooled(self, storage: Storage, name: str) -> Source:
        """As `NeedsSpool.spooled`."""
        listed = dataclasses.replace(self, schema=_LISTED)
        spool = spooled_source(listed, storage, name, self._listed)
        return ListedFolder(spool=spool, schema=self.schema, fields=self.fields)

    def _listed(self, work: Path) -> Iterator[pa.RecordBatch]:
        names = work / "names.parquet"
        write_rows(names, _names(self.base))
        images = ", ".join(f"'{ending}'" for ending in IMAGE_SUFFIXES)
        table = f"read_parquet({literal(names)})"
        beside = [
            f"""LEFT JOIN (
                SELECT stem, min(name) AS name FROM {table}
                WHERE ending = '{ending}' GROUP BY stem
            ) AS {ending} ON images.stem = {ending}.stem"""
            for ending in _BESIDE
        ]
        query = f"""
            SELECT images.name, txt.name, json.name FROM {table} AS images
            {" ".join(beside)}
            WHERE images.ending IN ({images}) ORDER BY images.name
        """
        for batch in sort(work, query):
            columns = [as_type(column, TEXT) for column in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, schema=_LISTED)


@dataclass(frozen=True, kw_only=True)
class ListedFolder(BlockSource):
    """A folder's images in order, with what stands beside them."""

    spool: SpooledSource
    schema: pa.Schema
    fields: Mapping[str, str]

    @property
    def kind(self) -> str:
        """As `Source.kind`."""
        return self.spool.kind

    @property
    def base(self) -> str:
        """As `Source.base`."""
        return self.spool.base

    @property
    def end(self) -> int:
        """Images of the folder."""
        return self.spool.end

    @property
    def default_columns(self) -> Mapping[str, Any]:
        """As `Source.default_columns`."""
        return self.spool.default_columns

    def fingerprint(self) -> list[dict[str, Any]]:
        """As `Source.fingerprint`."""
        return self.spool.fingerprint()

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        wanted = [self.fields[name] for name in columns if name in self.fields]
        texts = TXT in columns or CAPTIONS in columns
        jsons = bool(wanted) or CAPTIONS in columns
        read = [IMAGE] if IMAGE in columns else []
        read += [_TXT] if texts else []
        read += [_JSON] if jsons else []
        for listed in self.spool.blocks(read, start, stop):
            block = listed.cut(start, stop)
            cells: dict[str, list[Any]] = {}
            lines = self._read(block, _TXT, _lines) if texts else []
            objects = self._read(block, _JSON, _object) if jsons else []
            for name in columns:
                if name in self.fields:
                    cells[name] = [_field(each, self.fields[name]) for each in objects]
            cells[TXT] = lines
            if CAPTIONS in columns:
                cells[CAPTIONS] = list(map(captions_of, lines, objects))
            yield self._block(block, columns, cells)

    def _block(
        self, block: Block, columns: Sequence[str], cells: Mapping[str, list[Any]]
    ) -> Block:
        arrays, bad = [], {}
        for name in columns:
            if name == IMAGE:
                arrays.append(block.batch.column(IMAGE))
                continue
            array, wrong = field_column(cells[name], self.schema.field(name).type)
            arrays.append(array)
            if wrong is not None:
                bad[name] = wrong
        batch = pa.RecordBatch.from_arrays(arrays, list(columns))
        return Block(batch=batch, cursors=block.cursors, bad=bad)

    def _read(
        self, block: Block, column: str, parse: Callable[[bytes], Any]
    ) -> list[Any]:
        """The parsed files that a column names; None where there is none."""

        def call(name: str | None) -> Any:
            data = None if name is None else _content(self.base, name)
            return data if data is None or data is BAD else parse(data)

        return in_threads(call, block.batch.column(column).to_pylist())


def open_folder(path: str) -> FolderSource:
    """Look through a folder of images.

    Raises:
        ValueError: no images.
    """
    local = local_path(path)
    base = path.rstrip("/") if local is None else str(local)
    listing = _Listing(base)
    read = [_object(_content(base, name)) for name in listing.samples]
    objects = [each for each in read if isinstance(each, dict)]
    types, nested = field_types(objects), nested_fields(objects)
    names = column_names(types, (IMAGE, TXT))
    columns: dict[str, pa.DataType] = {IMAGE: TEXT}
    default_columns = {"image": IMAGE}
    if listing.has_text:
        columns[TXT] = TEXTS
    if listing.has_text or has_captions(types, nested):
        columns[CAPTIONS] = TEXTS
        default_columns["caption"] = CAPTIONS
    columns |= {names[field]: kind for field, kind in types.items()}
    return FolderSource(
        base=base,
        schema=schema_of(columns, {names[field] for field in nested}),
        fields={column: field for field, column in names.items()},
        default_columns=default_columns,
        digest=listing.digest,
    )


class _Listing:
    """What walking through a folder tells, in bounded memory."""

    def __init__(self, base: str) -> None:
        beside: dict[str, list[str]] = {ending: [] for ending in _BESIDE}
        count = total = 0
        for name in _below(base):
            ending = suffix(name)
            if ending in _KNOWN:
                count += 1
                entry = f"{name}\0{_size(base, name)}".encode("utf-8", "replace")
                # A sum, because it does not depend on the order.
                total += int.from_bytes(hashlib.sha256(entry).digest(), "big")
            if ending in beside:
                beside[ending].append(name)
                if len(beside[ending]) > 2 * _CANDIDATES:
                    beside[ending] = sorted(beside[ending])[:_CANDIDATES]
        # The first by name: the walk has no order.
        texts, jsons = (sorted(beside[ending])[:_CANDIDATES] for ending in _BESIDE)
        stems = _stems_of_images(base, {_stem(name) for name in (*texts, *jsons)})
        self.has_text = any(_stem(name) in stems for name in texts)
        """Is there a text of an image? A licence is none."""
        self.samples = [name for name in jsons if _stem(name) in stems][:_SAMPLED]
        """The first json files of images."""
        digest = f"{total % (1 << 256):064x}"
        self.digest = {"file": ".", "files": count, "sha256": digest}


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _stems_of_images(base: str, wanted: Collection[str]) -> set[str]:
    """Which of the wanted stems are those of images."""
    if not wanted:
        return set()
    images = (name for name in _below(base) if suffix(name) in IMAGE_SUFFIXES)
    return {stem for stem in map(_stem, images) if stem in wanted}


def _below(base: str) -> Iterator[str]:
    root = base.rstrip("/") + "/"
    return (url.removeprefix(root) for url in find(base))


def _size(base: str, name: str) -> int | None:
    """Bytes of a local file; remote ones would be asked for one by one."""
    local = local_path(base)
    try:
        return None if local is None else os.lstat(local / name).st_size
    except FileNotFoundError:
        return None


def _names(base: str) -> Iterator[pa.RecordBatch]:
    """Names below a folder of what a row is made of. Always one batch at least."""
    names = (name for name in _below(base) if suffix(name) in _KNOWN)
    while True:
        part = [
            # Apart from each other, where they are not UTF-8 and cannot be read.
            name.encode("utf-8", "backslashreplace").decode()
            for name in islice(names, _BATCH)
        ]
        stems = [_stem(name) for name in part]
        endings = [suffix(name) for name in part]
        arrays = [pa.array(cells, TEXT) for cells in (stems, endings, part)]
        yield pa.RecordBatch.from_arrays(arrays, schema=_NAMES)
        if len(part) < _BATCH:
            return


def _content(base: str, name: str) -> Any:
    """A file's bytes; `BAD` where it is too large, gone, or a link out of the folder.

    Raises:
        OSError: storage failed.
    """
    local = local_path(base)
    url = f"{base.rstrip('/')}/{name}"
    if local is not None:
        root, real = os.path.realpath(local), os.path.realpath(url)
        if os.path.commonpath([root, real]) != root or not os.path.isfile(real):
            return BAD
    try:
        with open_file(url) as file:
            data = file.read(MAX_TEXT + 1)
    except FileNotFoundError:
        return BAD
    return BAD if len(data) > MAX_TEXT else data


def _field(fields: Any, name: str) -> Any:
    """A field of an object; None or `BAD` where that is what there is instead."""
    return fields.get(name) if isinstance(fields, dict) else fields


def _lines(data: bytes) -> Any:
    """The lines of a text that say something."""
    text = parse_text(data)
    if text is BAD:
        return BAD
    return [line.strip() for line in text.split("\n") if line.strip()]


def _object(data: Any) -> Any:
    fields = None if data is BAD else parse_object(data)
    return BAD if fields is None else fields
