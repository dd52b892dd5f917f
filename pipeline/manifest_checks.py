"""Kinds and bounds of what a manifest says, checked before anything is done with it.

Owns single values, of a manifest and of the records that it is made of: a dataset may
be anybody's, and its seal proves no more than that nobody changed it since. Does not
own how values belong together (`pipeline.manifest`). Needs the standard library alone,
as everything that `pipeline.manifest` imports.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Counts and bytes; numpy's sums of a million such still fit.
_MOST = 1 << 42
_MOST_TOKENS = 1 << 24
_MOST_CHARS = 4096
# `transform` has four levels; walking it recurses.
_MOST_LEVELS = 16
_SPECIAL = {"pad", "unk", "cls", "sep", "mask"}
_IMAGE_FORMATS = ("jpg", "png", "webp")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Check = Callable[[Any], bool]


def read_json(text: bytes, name: str) -> Any:
    """Value of a JSON file.

    Raises:
        ValueError: it is none, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is no JSON that this code wrote ({error}): bring back a sound copy"
        ) from error


@contextlib.contextmanager
def understood(name: str) -> Iterator[None]:
    """Turn what a block raises over JSON of another shape into a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name} does not say what this code writes there ({error!r}): bring back "
            "a sound copy"
        ) from error


def check_fields(value: Any) -> None:
    """Raise ValueError where a field of a manifest's JSON is of the wrong kind. Fields
    that are missing or too many are not looked for.
    """
    _check(value, "manifest", _MANIFEST)
    _check(value.get("accounting", {}), "accounting", _ACCOUNTING)
    tokenizer = value.get("tokenizer", {})
    _check(tokenizer, "tokenizer", _TOKENIZER)
    for shard in value.get("shards", ()):
        _check(shard, "shard", _SHARD)
    ids = tokenizer.get("special_ids", {}).values()
    if ids and max(ids) >= tokenizer.get("vocab_size", 0):
        raise _wrong("tokenizer", "special_ids", dict(tokenizer["special_ids"]))


def is_inside(name: Any) -> bool:
    """Is it the path of a file inside the dataset, on any system?"""
    if not _is_text(name) or "\\" in name:
        return False
    return not set(name.split("/")) & {"", ".", ".."}


def _check(value: Any, what: str, checks: Mapping[str, Check]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{what} is a {type(value).__name__}, not names with values: {_CURE}"
        )
    for name, check in checks.items():
        if name in value and not check(value[name]):
            raise _wrong(what, name, value[name])


_CURE = (
    "the manifest does not follow the schema; preprocess the corpus, or index the "
    "folder, again"
)


def _wrong(what: str, name: str, value: Any) -> ValueError:
    return ValueError(f"{what} has {name} {_shown(value)}: {_CURE}")


def _shown(value: Any) -> str:
    text = json.dumps(value) if _levels(value) else "nested too deep"
    return text if len(text) <= 80 else text[:79] + "…"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    # Neither line ends nor halves of surrogate pairs, which cannot be printed.
    return isinstance(value, str) and value.isprintable() and len(value) <= _MOST_CHARS


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1e18 and math.isfinite(value)


def _is_vocabulary(value: Any) -> bool:
    return _is_count(value) and 0 < value <= _MOST_TOKENS


def _mapping(name: Check, value: Check) -> Check:
    return lambda given: (
        isinstance(given, Mapping)
        and all(name(key) and value(item) for key, item in given.items())
    )


def _is_special(value: Any) -> bool:
    return _mapping(_is_text, _is_count)(value) and value.keys() == _SPECIAL


def _is_transform(value: Any) -> bool:
    """What of it is read again; the rest is shown only."""
    if not isinstance(value, Mapping) or not _levels(value):
        return False
    image = value.get("image", {})
    return isinstance(image, Mapping) and image.get("format", "jpg") in _IMAGE_FORMATS


def _levels(value: Any) -> bool:
    """Is it nested no deeper than a manifest is?"""
    layer = [value]
    for _ in range(_MOST_LEVELS):
        layer = [item for one in layer for item in _items(one)]
        if not layer:
            return True
    return False


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


_MANIFEST: Mapping[str, Check] = {
    "complete": _is_flag,
    "shards": _is_list,
    "sources": _mapping(_is_text, _is_weight),
    "rows": _is_count,
    "transform": _is_transform,
    "transform_sha256": _is_digest,
    "files": _mapping(is_inside, _is_digest),
    "indexed": _is_flag,
}
_ACCOUNTING: Mapping[str, Check] = {
    **dict.fromkeys(("inputs", "written", "duplicates"), _is_count),
    **dict.fromkeys(("filtered", "failed"), _mapping(_is_text, _is_count)),
}
_TOKENIZER: Mapping[str, Check] = {
    "path": is_inside,
    "sha256": _is_digest,
    "vocab_size": _is_vocabulary,
    "special_ids": _is_special,
}
_SHARD: Mapping[str, Check] = {
    **dict.fromkeys(("name", "split", "source"), _is_text),
    **dict.fromkeys(("range", "samples", "captions", "tokens", "bytes"), _is_count),
    "sha256": _mapping(_is_text, _is_digest),
}
