"""WebDataset tars: adjacent members with one key are a row.

Owns which members make which columns: the image, the text, and the fields of the json,
so that img2dataset's metadata is kept; `captions` has whichever of text and json a
sample has. Does not own walking tars (`pipeline.archive`).
Other members (arrays, pickles) are never read. A tar that is damaged or cut short is
refused when it is scanned: nobody can tell which samples it lost.

A scan touches headers only; a remote tar is read through for them, once.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from pipeline.archive import Archive, Member, TarSample
from pipeline.sources.base import Block, BlockSource
from pipeline.sources.detect import image_members
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
from pipeline.sources.files import (
    Found,
    InputFile,
    in_threads,
    laid_end_to_end,
    overlapping,
    sampled_fingerprint,
    sizes,
)
from pipeline.storage import open_file

KEY, IMAGE, TXT = "__key__", "image", "txt"
_TEXT_SUFFIXES = ("txt", "caption", "cap")
# Larger members are no image (or no text) of a training corpus.
_MAX_IMAGE = 256 << 20
_MAX_KEY = 1024
# A block ends with the first of these.
_BLOCK_ROWS = 1024
_BLOCK_BYTES = 16 << 20
_HEADER_BYTES = 2048
# Types of json fields are found in so many samples of so many tars.
_SAMPLED_TARS = 16
_SAMPLED = 64


@dataclass(frozen=True, kw_only=True)
class TarSource(BlockSource):
    """Tars, their bytes laid end to end."""

    base: str
    files: tuple[InputFile, ...]
    schema: pa.Schema
    fields: Mapping[str, str]
    """Columns that are fields of the json, and what they are called there."""
    default_columns: Mapping[str, Any]
    kind: str = "webdataset"

    @property
    def end(self) -> int:
        """Bytes of all tars."""
        return self.files[-1].stop

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name and size of every tar, and a digest of pieces of it."""
        return in_threads(sampled_fingerprint, self.files)

    def blocks(self, columns: Sequence[str], start: int, stop: int) -> Iterator[Block]:
        """As `BlockSource.blocks`."""
        for file in overlapping(self.files, start, stop):
            first, last = max(start - file.start, 0), stop - file.start
            with closing(_Tar(file, first)) as tar:
                rows: list[dict[str, Any]] = []
                cursors: list[int] = []
                held = 0
                for sample in tar.samples():
                    if first + sample.start >= last:
                        break
                    row = self._row(tar, sample, columns)
                    held += len(row.get(IMAGE) or b"")
                    rows.append(row)
                    cursors.append(file.start + first + sample.start)
                    if len(rows) == _BLOCK_ROWS or held >= _BLOCK_BYTES:
                        yield self._block(rows, cursors, columns)
                        rows, cursors, held = [], [], 0
                if rows:
                    yield self._block(rows, cursors, columns)

    def _row(
        self, tar: _Tar, sample: TarSample, columns: Sequence[str]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {}
        key = _key(tar.file, sample)
        if KEY in columns:
            row[KEY] = key
        if IMAGE in columns:
            usable = sample.damage is None and key is not BAD
            row[IMAGE] = tar.image(sample) if usable else None
        if TXT in columns:
            row[TXT] = tar.text(sample)
        wanted = [name for name in columns if name in self.fields]
        values: Any = tar.json(sample) if wanted or CAPTIONS in columns else None
        for name in wanted:
            known = isinstance(values, dict)
            row[name] = values.get(self.fields[name]) if known else values
        if CAPTIONS in columns:
            text = tar.text(sample)
            row[CAPTIONS] = captions_of(
                [text] if isinstance(text, str) else text, values
            )
        return row

    def _block(
        self, rows: list[dict[str, Any]], cursors: list[int], columns: Sequence[str]
    ) -> Block:
        arrays, bad = [], {}
        for name in columns:
            cells = [row[name] for row in rows]
            kind = self.schema.field(name).type
            wrong = None
            if name == IMAGE:
                array = pa.array(cells, kind)
            else:
                array, wrong = field_column(cells, kind)
            arrays.append(array)
            if wrong is not None:
                bad[name] = wrong
        return Block(
            batch=pa.RecordBatch.from_arrays(arrays, list(columns)),
            cursors=np.array(cursors, np.int64),
            bad=bad,
        )


def open_tars(found: Sequence[Found], base: str) -> TarSource:
    """Open tars; types of json fields are those of the first samples.

    Raises:
        ValueError: damaged where its first samples are.
    """
    files = laid_end_to_end(zip(found, sizes(found), strict=True))
    objects: list[dict[str, Any]] = []
    has_text = False
    for file in files[:: -(-len(files) // _SAMPLED_TARS)]:
        with closing(_Tar(file, 0)) as tar:
            for sample, _ in zip(tar.samples(), range(_SAMPLED), strict=False):
                has_text |= any(name in sample.members for name in _TEXT_SUFFIXES)
                values = tar.json(sample)
                if isinstance(values, dict):
                    objects.append(values)
    types, nested = field_types(objects), nested_fields(objects)
    names = column_names(types, (KEY, IMAGE, TXT))
    columns = {KEY: TEXT, IMAGE: pa.large_binary()}
    if has_text:
        columns[TXT] = TEXT
    if has_text or has_captions(types, nested):
        columns[CAPTIONS] = TEXTS
    columns |= {names[field]: kind for field, kind in types.items()}
    return TarSource(
        base=base,
        files=files,
        schema=schema_of(columns, {names[field] for field in nested}),
        fields={column: field for field, column in names.items()},
        default_columns=_default_columns(types, names, CAPTIONS in columns),
    )


def _default_columns(
    types: Mapping[str, pa.DataType], names: Mapping[str, str], captioned: bool
) -> dict[str, Any]:
    columns: dict[str, Any] = {"image": IMAGE, "id": KEY, "keep": tuple(names.values())}
    if types.get("url") == TEXT:
        columns["url"] = names["url"]
    return columns | ({"caption": CAPTIONS} if captioned else {})


def _key(file: InputFile, sample: TarSample) -> Any:
    key = f"{posixpath.splitext(file.name)[0]}/{sample.key.removeprefix('./')}"
    try:
        too_long = len(key.encode()) > _MAX_KEY
    except UnicodeEncodeError:
        return BAD
    return BAD if too_long else key


class _Tar:
    """The samples of a tar from byte `start` on, where a sample begins."""

    def __init__(self, file: InputFile, start: int) -> None:
        self.file = file
        self._start = start
        self._bytes = _Bytes(open_file(file.url), start, file.stop - file.start)

    def close(self) -> None:
        """Close the file."""
        self._bytes.file.close()

    def samples(self) -> Iterator[TarSample]:
        """Samples in order; offsets are relative to `start`.

        Raises:
            ValueError: a damaged header, or no end.
        """
        # Not mapped into memory: a file that is cut meanwhile would kill the process.
        archive = Archive(cast(memoryview, self._bytes))
        for sample in archive.samples():
            if sample.damage not in (None, "duplicate_member"):
                raise ValueError(self._damaged(f"{sample.damage} at", sample.start))
            # `dir/._0001.jpg`, which is no sample: what macOS adds to files.
            if not sample.key.endswith("/"):
                yield sample
        if not archive.ended:
            end = len(self._bytes)
            raise ValueError(self._damaged("it ends without an end mark at", end))

    def _damaged(self, what: str, offset: int) -> str:
        return (
            f"{self.file.name} is damaged or was cut short ({what} byte "
            f"{self._start + offset}); fetch it again or leave it out"
        )

    def image(self, sample: TarSample) -> bytes | None:
        """The image of a sample; None where it has none or one of absurd size."""
        names = image_members(sample.members)
        return self._payload(sample.members[names[0]], _MAX_IMAGE) if names else None

    def text(self, sample: TarSample) -> Any:
        """The text of a sample; None without one."""
        for name in _TEXT_SUFFIXES:
            if name in sample.members:
                data = self._payload(sample.members[name], MAX_TEXT)
                return BAD if data is None else parse_text(data)
        return None

    def json(self, sample: TarSample) -> Any:
        """The fields of a sample's json; None without one."""
        if "json" not in sample.members:
            return None
        data = self._payload(sample.members["json"], MAX_TEXT)
        fields = None if data is None else parse_object(data)
        return BAD if fields is None else fields

    def _payload(self, member: Member, most: int) -> bytes | None:
        if member.size > most:
            return None
        return self._bytes[member.data : member.data + member.size]


class _Bytes:
    """A file from `start` on, sliced like the bytes that it holds."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file = file
        self._start, self._size = start, size
        self._held, self._held_from = b"", 0

    def __len__(self) -> int:
        return self._size - self._start

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(len(self))
        if stop - start > _HEADER_BYTES:
            return self._read(start, stop)
        # A header is looked at several times, and a small member stands after it.
        if start < self._held_from or stop > self._held_from + len(self._held):
            end = min(start + _HEADER_BYTES, len(self))
            self._held, self._held_from = self._read(start, end), start
        return self._held[start - self._held_from : max(stop, start) - self._held_from]

    def _read(self, start: int, stop: int) -> bytes:
        self.file.seek(self._start + start)
        return self.file.read(max(stop - start, 0))
