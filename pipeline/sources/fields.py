"""Fields of JSON objects as columns: one type each, found in a sample of the objects.

Owns the types that JSON values become, fitting values to them, and which of an image's
text and JSON are its captions. Does not own where the objects stand
(`pipeline.sources.jsonl`, `pipeline.sources.tars`, `pipeline.sources.folder`). Objects
and lists other than of text become JSON text, and so do values of a field whose types
disagree; but nobody means JSON where he names a caption, so such values are bad there.
What does not fit a type that was found in the sample is bad, as text that is not UTF-8
is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipeline.captions import whole_characters
from pipeline.columns import NESTED
from pipeline.shards import ROW_SCHEMA

TEXT, TEXTS = pa.large_string(), pa.large_list(pa.large_string())
_TYPES = {
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
    frozenset({"texts"}): TEXTS,
    # One caption or several.
    frozenset({"text", "texts"}): TEXTS,
}
_JSON = "json"
_INT64 = range(-(1 << 63), 1 << 63)
# Numbers that are integers where they have neither point nor exponent, and how many
# digits and signs those have at most.
_INTEGERS, _DIGITS = range(-(1 << 63), 1 << 64), 20
# The column of `captions_of`, a name that no field's column gets.
CAPTIONS = "captions"
# Where captions stand in objects, best first.
_CAPTION_FIELDS = ("captions", "caption", "text")
# Stands among values for one that cannot be used.
BAD = object()
# Longer texts are none of an image.
MAX_TEXT = 16 << 20


def parse_json(data: bytes) -> Any:
    """The value that `data` is as JSON. Nesting is limited.

    What Python writes as JSON and the standard does not know is taken as well: `NaN`
    and `Infinity` are null, half a character is U+FFFD.

    Raises:
        ValueError: torn, not UTF-8, or no JSON at all.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _pythons(data)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that `data` is, as `parse_json` reads it; None for anything
    else.
    """
    try:
        value = parse_json(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _pythons(data: bytes) -> Any:
    try:
        value = json.loads(
            data.decode(),
            parse_constant=lambda name: None,
            parse_int=_integer,
            parse_float=_finite,
        )
        return _whole(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int | float | None:
    """As the other parser gives it."""
    if len(digits) <= _DIGITS and (value := int(digits)) in _INTEGERS:
        return value
    return _finite(digits)


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(each) for name, each in value.items()}
    return value


def parse_text(data: bytes) -> Any:
    """The text that `data` is; `BAD` where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return BAD


def column_names(fields: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """A column for each field, by field. A name that every sample of ours has already
    (width, sha256, url, ...), or that is `taken`, gets `source_` before it: in the
    corpus it says something else.
    """
    used = {*ROW_SCHEMA.names, *taken}
    names: dict[str, str] = {}
    for field in fields:
        name = field
        while name in used:
            name = f"source_{name}"
        used.add(name)
        names[field] = name
    return names


def has_captions(types: Mapping[str, pa.DataType], nested: Set[str]) -> bool:
    """Whether objects with fields of these types, some of them `nested_fields`, say
    anything that may be a caption.
    """
    fields = set(_CAPTION_FIELDS) - nested
    return any(types.get(field) in (TEXT, TEXTS) for field in fields)


def captions_of(text: Any, fields: Any) -> Any:
    """Captions of one image, chosen for each anew because corpora are mixtures: its
    json's list of several, else its text, else what its json has. None without any.

    Args:
        text: texts beside the image, `BAD`, or None where there is none.
        fields: the object beside the image, `BAD`, or None where there is none.
    """
    known = fields if isinstance(fields, Mapping) else {}
    several = known.get("captions")
    if text is not None and not (isinstance(several, list) and several):
        return text
    for field in _CAPTION_FIELDS:
        value = known.get(field)
        cells = value if isinstance(value, list) else [value]
        if found := [cell for cell in cells if isinstance(cell, str)]:
            return found
    return BAD if fields is BAD else text


def field_types(objects: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Types of the fields of some objects, in the order in which they appear."""
    kinds = _kinds(objects)
    return {name: _TYPES.get(frozenset(seen), TEXT) for name, seen in kinds.items()}


def nested_fields(objects: Sequence[Mapping[str, Any]]) -> set[str]:
    """The fields of some objects that hold other objects, or lists of more than text,
    and no text at all.
    """
    nested = {name for name, seen in _kinds(objects).items() if _JSON in seen}
    return nested - _with_text(objects)


def caption_types(objects: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Types of the fields of some objects that hold text, where they are captions: a
    list of texts is one whatever the field has elsewhere.
    """
    texts = _with_text(objects)
    return {
        name: TEXTS if "texts" in seen else TEXT
        for name, seen in _kinds(objects).items()
        if name in texts
    }


def _with_text(objects: Iterable[Mapping[str, Any]]) -> set[str]:
    # What is empty says nothing about the other rows.
    return {
        name
        for fields in objects
        for name, value in fields.items()
        if value and _kind(value) in ("text", "texts")
    }


def schema_of(columns: Mapping[str, pa.DataType], nested: Set[str]) -> pa.Schema:
    """Columns with these types, those told that are `nested_fields`."""
    return pa.schema(
        [
            pa.field(name, kind, metadata=NESTED if name in nested else None)
            for name, kind in columns.items()
        ]
    )


def _kinds(objects: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for fields in objects:
        for name, value in fields.items():
            seen = kinds.setdefault(name, set())
            if value is not None:
                seen.add(_kind(value))
    return kinds


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "texts"
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        return "number"
    named = {bool: "bool", int: "int", float: "float"}
    return named.get(type(value), _JSON)


def field_column(
    values: Sequence[Any], kind: pa.DataType, *, captions: bool = False
) -> tuple[pa.Array, np.ndarray | None]:
    """Values of a field as a column (values,), and those (values,) bool that do not fit
    its type, which are null there; None where all do. Of `captions`, no list or object
    is written as JSON.
    """
    if kind == TEXT and set(map(type, values)) <= {str, type(None)}:
        return pa.array(values, kind), None
    if captions:
        values = [None if value in ([], {}) else value for value in values]
        if kind == TEXT:
            nested = (list, dict)
            values = [BAD if isinstance(value, nested) else value for value in values]
    fitted = [_fitted(value, kind) for value in values]
    bad = np.array([value is BAD for value in fitted], bool)
    if not bad.any():
        return pa.array(fitted, kind), None
    return pa.array([None if value is BAD else value for value in fitted], kind), bad


def _fitted(value: Any, kind: pa.DataType) -> Any:
    if value is None or value is BAD:
        return value
    found = _kind(value)
    if kind == TEXT:
        return value if found == "text" else _json_text(value)
    if kind == TEXTS:
        return [value] if found == "text" else value if found == "texts" else BAD
    if kind == pa.float64() and found == "int":
        return float(value)
    return value if _TYPES.get(frozenset({found})) == kind else BAD


def _json_text(value: Any) -> Any:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        # Nested more deeply than can be written, though not than can be read.
        return BAD
