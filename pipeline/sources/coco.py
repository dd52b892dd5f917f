"""COCO captions: one JSON document of images and of annotations that name them.

Owns reading the document piece by piece and joining captions to images, which stand
apart in it. Does not own the sort and the spool (`pipeline.sources.spool`). Rows are
captions in the order of their images; an image without a caption is one row, and so is
a caption whose image is not in the document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.sources.base import NeedsSpool, Source, as_type
from pipeline.sources.files import Found, InputFile, content_fingerprint, sizes
from pipeline.sources.spool import literal, sort, spooled_source, write_rows
from pipeline.storage import Storage, open_file

_TEXT, _NUMBER = pa.large_string(), pa.int64()
_IMAGES = pa.schema(
    [
        ("id", _TEXT),
        ("file_name", _TEXT),
        ("width", _NUMBER),
        ("height", _NUMBER),
        ("license", _TEXT),
        ("coco_url", _TEXT),
    ]
)
_CAPTIONS = pa.schema([("image_id", _TEXT), ("caption", _TEXT)])
_SCHEMA = _IMAGES.append(_CAPTIONS.field("caption"))
_PLACE = pa.field("place", _NUMBER)
_BATCH = 16_384
_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, kw_only=True)
class CocoSource(NeedsSpool):
    """A captions file."""

    file: InputFile
    base: str
    default_columns: Mapping[str, Any]
    kind: str = "coco"
    schema: pa.Schema = _SCHEMA

    def fingerprint(self) -> list[dict[str, Any]]:
        """As `Source.fingerprint`."""
        return [content_fingerprint(self.file)]

    def spooled(self, storage: Storage, name: str) -> Source:
        """As `NeedsSpool.spooled`."""
        return spooled_source(self, storage, name, self._joined)

    def _joined(self, work: Path) -> Iterator[pa.RecordBatch]:
        images, captions = work / "images.parquet", work / "captions.parquet"
        write_rows(images, _records(self.file, "images", _IMAGES))
        write_rows(captions, _records(self.file, "annotations", _CAPTIONS))
        fields = [f"images.{field.name}" for field in _IMAGES]
        fields[0] = "coalesce(images.id, captions.image_id) AS id"
        query = f"""
            SELECT {", ".join(fields)}, captions.caption
            FROM read_parquet({literal(images)}) AS images
            FULL JOIN read_parquet({literal(captions)}) AS captions
            ON images.id = captions.image_id
            ORDER BY images.place NULLS LAST, captions.image_id, captions.place
        """
        for batch in sort(work, query):
            columns = [
                as_type(batch.column(field.name), field.type) for field in _SCHEMA
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def open_coco(found: Found, base: str) -> CocoSource:
    """Open a captions file.

    Raises:
        ValueError: no COCO document, or one whose annotations are no captions.
    """
    image = next(_items(found, "images"), None)
    annotation = next(_items(found, "annotations"), None)
    if image is None or annotation is None:
        missing = "images" if image is None else "annotations"
        raise ValueError(f"it has no {missing}: a COCO document lists both")
    if not isinstance(annotation, dict) or "caption" not in annotation:
        raise ValueError(
            "its annotations are no captions; give the document that has them "
            "(captions_train2017.json, not instances_train2017.json)"
        )
    columns = {"image": "file_name", "caption": "caption", "id": "id"}
    if isinstance(image, dict) and image.get("coco_url"):
        columns["url"] = "coco_url"
    (size,) = sizes([found])
    return CocoSource(
        file=InputFile(url=found.url, name=found.name, start=0, stop=size),
        base=base,
        default_columns={**columns, "keep": ("license",)},
    )


def _items(document: Found | InputFile, name: str) -> Iterator[Any]:
    """Entries of a list of the document, in bounded memory.

    Raises:
        ValueError: the document is damaged.
    """
    import ijson

    with open_file(document.url) as file:
        try:
            yield from ijson.items(file, f"{name}.item", use_float=True)
        except ijson.JSONError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{document.name} is no whole JSON document ({reason}); fetch it again"
            ) from error


def _records(
    document: InputFile, name: str, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Fields of a list's entries, and their places in it. Always one batch at least."""
    items = _items(document, name)
    first = 0
    while True:
        entries = [
            entry if isinstance(entry, dict) else {} for entry in islice(items, _BATCH)
        ]
        columns = [
            pa.array(
                [_cell(entry.get(field.name), field.type) for entry in entries],
                field.type,
            )
            for field in schema
        ]
        places = pa.array(range(first, first + len(entries)), _NUMBER)
        yield pa.RecordBatch.from_arrays(
            [*columns, places], schema=schema.append(_PLACE)
        )
        first += len(entries)
        if len(entries) < _BATCH:
            return


def _cell(value: Any, kind: pa.DataType) -> Any:
    """A value of the document as text or number; null where it is neither."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    if kind == _NUMBER:
        return value if value in _INT64 else None
    # JSON can write halves of surrogate pairs, which are no text.
    return str(value).encode("utf-8", "replace").decode()
