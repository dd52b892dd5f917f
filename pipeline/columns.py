"""Which columns of a corpus hold what: as given, or by their usual names.

Owns finding columns, checking their types, and the errors that name the nearest one.
Does not own the tables themselves (`pipeline.sources`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import nearest
from pipeline.filters import Template
from pipeline.grouping import is_comparable
from pipeline.options import ColumnOptions, SplitOptions
from pipeline.shards import ROW_SCHEMA

# Metadata of a field whose text is the JSON of something else.
NESTED = {b"holds": b"json"}
# The usual names, best guess first.
_IMAGE_COLUMNS = (
    *("image", "image_path", "img", "img_path", "image_file", "filepath", "file_path"),
    *("filename", "file_name", "path", "file", "images", "jpg", "png", "bytes"),
    *("url", "image_url", "img_url", "link"),
)
_CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "title", "description", "sentence"),
    *("sentences", "alt", "alt_text", "txt"),
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that are read, all of them in the corpus."""

    image: str
    image_list: str
    captions: tuple[str, ...]
    template: str | None
    id: str | None
    url: str | None
    sha256: str | None
    keep: tuple[str, ...]
    split: str | None
    group: str | None

    @property
    def sample(self) -> tuple[str, ...]:
        """Columns that a sample is made of."""
        names = (self.image, *self.captions, self.url, self.sha256, *self.keep)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def identifying(self) -> frozenset[str]:
        """Columns whose values say which image or which part of the corpus it is."""
        names = (self.image, self.id, self.url, self.sha256, self.split, self.group)
        return frozenset(name for name in names if name)


def resolve_columns(
    schema: pa.Schema,
    given: ColumnOptions,
    split: SplitOptions,
    known: Mapping[str, Any] | None = None,
) -> Columns:
    """The columns to read: as given, else as the format knows (`known`, by the names of
    `ColumnOptions`), else by their usual names.

    Raises:
        ValueError: a column is missing (with the nearest that exists) or its type
            cannot be what it is given for.
    """
    given = _with_known(given, known or {})
    image = given.image or _usual(schema, _IMAGE_COLUMNS, "columns.image")
    if given.template:
        captions = Template(given.template, schema.names).columns
    else:
        usual = () if given.captions else (_usual_caption(schema),)
        captions = given.captions or usual
    _check_columns(schema, image, captions, given, split)
    return Columns(
        image=image,
        image_list=given.image_list,
        captions=tuple(captions),
        template=given.template,
        id=given.id,
        url=given.url,
        sha256=given.sha256,
        keep=given.kept,
        split=split.column,
        group=split.group,
    )


def _with_known(given: ColumnOptions, known: Mapping[str, Any]) -> ColumnOptions:
    default = ColumnOptions()
    fill = {
        name: value
        for name, value in known.items()
        if tuple(getattr(given, name) or ()) == tuple(getattr(default, name) or ())
        and not (name == "caption" and given.template)
    }
    return dataclasses.replace(given, **fill)


def _usual_caption(schema: pa.Schema) -> str:
    return _usual(schema, _CAPTION_COLUMNS, "columns.caption")


def _check_columns(
    schema: pa.Schema,
    image: str,
    captions: Sequence[str],
    given: ColumnOptions,
    split: SplitOptions,
) -> None:
    flags = {"columns.image": image, "columns.id": given.id, "columns.url": given.url}
    flags |= {"columns.sha256": given.sha256}
    flags |= {"split.column": split.column, "split.group": split.group}
    named = [(flag, name) for flag, name in flags.items() if name]
    named += [("columns.caption", name) for name in captions]
    named += [("columns.keep", name) for name in given.kept]
    for flag, name in named:
        if name not in schema.names:
            raise ValueError(
                f"--{flag}: no column {name!r}.{nearest(name, schema.names)} "
                f"The columns are: {', '.join(schema.names)}"
            )
    for flag, name in named:
        if schema.names.count(name) > 1:
            raise ValueError(
                f"--{flag} {name}: {schema.names.count(name)} columns have this name; "
                "rename all but one"
            )
        if flag in ("columns.id", "split.column", "split.group"):
            _check_key_type(flag, schema.field(name))
    _check_image_type(schema.field(image))
    for name in () if given.template else captions:
        _check_caption_type(schema.field(name))
    _refuse_taken_names(given.kept)


def holds_paths(schema: pa.Schema, columns: Columns) -> bool:
    """Whether the image column holds paths or URLs rather than bytes."""
    return is_text(schema.field(columns.image).type)


def _usual(schema: pa.Schema, names: Sequence[str], flag: str) -> str:
    lower = {name.lower(): name for name in reversed(schema.names)}
    for name in names:
        if name in lower:
            return lower[name]
    what = flag.removeprefix("columns.")
    raise ValueError(
        f"no {what} column found; name it with --{flag}. "
        f"The columns are: {', '.join(schema.names)}"
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )


def _check_image_type(field: pa.Field) -> None:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (binary or struct or is_text(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"--columns.image {field.name}: it holds {kind}, not image bytes or paths; "
            "encode the images (PNG, JPEG) or name another column"
        )


def _check_caption_type(field: pa.Field) -> None:
    kind = field.type
    if (field.metadata or {}).items() >= NESTED.items():
        raise ValueError(
            f"--columns.caption {field.name}: it holds JSON objects, or lists of more "
            "than text; write the text into a column of its own (jq), or name another "
            "column"
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"--columns.caption {field.name}: it holds {field.type}, not text or lists "
            "of text; name another column"
        )


def _check_key_type(flag: str, field: pa.Field) -> None:
    """Identities, groups and splits are compared, and written as text."""
    if is_comparable(field.type):
        return
    cure = "write them as text"
    if pa.types.is_nested(field.type):
        cure = "write what you need of it"
    raise ValueError(
        f"--{flag} {field.name}: it holds {field.type}, not text, numbers or dates; "
        f"{cure} into a column of its own"
    )


def _refuse_taken_names(keep: Sequence[str]) -> None:
    taken = sorted(set(keep) & set(ROW_SCHEMA.names))
    if taken:
        raise ValueError(
            f"--columns.keep {taken[0]}: every sample has a {taken[0]!r} of its own; "
            "rename the column in the corpus to keep it"
        )
