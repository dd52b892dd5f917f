"""What the members of a sample in anybody's tar say: image, captions, metadata.

Owns reading the one image, finding captions in text and json, and recognising samples
that this pipeline wrote. Does not own where members lie (`pipeline.archive`), which of
them are images (`pipeline.sources.detect`), cleaning (`pipeline.captions`) or decoding
(`pipeline.pictures`).
Only members with text or image extensions are ever read: pickles are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.archive import TarSample
from pipeline.captions import CaptionCleaner
from pipeline.filters import Filtered
from pipeline.images import ImageError
from pipeline.manifest import sample_uid
from pipeline.options import IMAGE_FORMATS, ImageOptions
from pipeline.shards import members
from pipeline.sources.detect import image_members
from pipeline.sources.fields import parse_json

_TEXTS = ("txt", "caption", "cap")
_JSON_CAPTIONS = ("captions", "caption", "text")
_MAX_TEXT = 16 << 20
_OWN = tuple(members(image_format) for image_format in IMAGE_FORMATS)
_UID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """What a sample says about itself, its image not looked at."""

    uid: int
    source: str
    captions: Sequence[str]
    fields: Mapping[str, Any]
    """Its json; empty without one."""
    own: bool
    """Whether this pipeline wrote it, and its captions stay as they are."""
    caption_field: str
    """Where the first caption stands, in the words of Energon's field maps."""


class SampleReader:
    """Reads the text of samples.

    Args:
        cleaner: for captions of samples that this pipeline did not write.
        source: name of the source of those.
        tar: path of the tar below the dataset directory: part of their identity.
    """

    def __init__(self, cleaner: CaptionCleaner, *, source: str, tar: str) -> None:
        self._cleaner, self._source, self._tar = cleaner, source, tar

    def text(self, sample: TarSample, data: memoryview) -> SampleText:
        """Captions and metadata of a sample of the tar `data`.

        Raises:
            ImageError: it cannot be used: bad_text, or its damage.
            Filtered: it has no caption that is worth keeping.
        """
        if sample.damage:
            raise ImageError(sample.damage, f"offset {sample.start}")
        fields = _json_fields(sample, data)
        if own := _own(sample, fields):
            return own
        texts, place = _captions(sample, data, fields)
        captions, reason = self._cleaner.clean(texts)
        if reason:
            raise Filtered(reason, "")
        return SampleText(
            uid=sample_uid(self._source, f"{self._tar}/{printable_key(sample.key)}"),
            source=self._source,
            captions=captions,
            fields=fields,
            own=False,
            caption_field=place,
        )


def image_of(sample: TarSample, data: memoryview) -> tuple[str, bytes]:
    """What follows the key in the name of a sample's image, and its bytes.

    Raises:
        ImageError: missing_image, several_images or too_large.
    """
    found = image_members(sample.members)
    if len(found) != 1:
        reason = "several_images" if found else "missing_image"
        names = printable_key(", ".join(found or sample.members))
        raise ImageError(reason, f"{'images' if found else 'members'}: {names}")
    member = sample.members[found[0]]
    if member.size > ImageOptions().max_bytes:
        raise ImageError("too_large", f"{member.size} bytes")
    return found[0], bytes(data[member.data : member.data + member.size])


def printable_key(key: str) -> str:
    """A key as text that can be stored, names in tars being bytes."""
    return key.encode("utf-8", "backslashreplace").decode()


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """A field of a json as text, empty where it has none."""
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _member(sample: TarSample, data: memoryview, name: str) -> str:
    member = sample.members[name]
    if member.size > _MAX_TEXT:
        raise ImageError("bad_text", f"{name} has {member.size} bytes")
    try:
        return bytes(data[member.data : member.data + member.size]).decode()
    except UnicodeDecodeError as error:
        raise ImageError("bad_text", f"{name} is not UTF-8") from error


def _json_fields(sample: TarSample, data: memoryview) -> Mapping[str, Any]:
    if "json" not in sample.members:
        return {}
    try:
        fields = parse_json(_member(sample, data, "json").encode())
    except ValueError as error:
        raise ImageError("bad_text", "json does not parse") from error
    return fields if isinstance(fields, dict) else {}


def _own(sample: TarSample, fields: Mapping[str, Any]) -> SampleText | None:
    """The text of a sample that has the contract's members and fields."""
    captions = fields.get("captions")
    if tuple(sample.members) not in _OWN or fields.get("key") != sample.key:
        return None
    if not isinstance(captions, list) or not captions:
        return None
    uid, source = text_field(fields, "uid"), text_field(fields, "source")
    texts = all(isinstance(caption, str) for caption in captions)
    if not (texts and source and _UID.fullmatch(uid)):
        return None
    return SampleText(
        uid=int(uid, 16),
        source=source,
        captions=captions,
        fields=fields,
        own=True,
        caption_field="txt",
    )


def _captions(
    sample: TarSample, data: memoryview, fields: Mapping[str, Any]
) -> tuple[list[Any], str]:
    """Cells with captions: a json's list, else text, else one of the json's fields."""
    several = fields.get("captions")
    for name in _TEXTS:
        if name in sample.members and not (isinstance(several, list) and several):
            return [_member(sample, data, name)], name
    for name in _JSON_CAPTIONS:
        value = fields.get(name)
        cells = value if isinstance(value, list) else [value]
        texts = [cell for cell in cells if isinstance(cell, str)]
        if texts:
            place = f"json[{name}]" + ("[0]" if isinstance(value, list) else "")
            return texts, next((n for n in _TEXTS if n in sample.members), place)
    return [], ""
