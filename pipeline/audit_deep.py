"""Does a sample say the same thing everywhere? Image, captions, tokens, json, table.

Owns what `--deep` adds for one sample whose bytes are those that were written: the
image decodes to the stated size, the captions give the stored tokens again, and text,
json, index and table agree. Does not own finding changed bytes (`pipeline.audit_tar`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.images import FORMATS
from pipeline.tarwalk import Span, load_ids, span_json
from pipeline.tokenizer import CaptionEncoder, StoredTokenizer

_PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class SampleCheck:
    """The checks of samples of one dataset."""

    def __init__(
        self, tokenizer: StoredTokenizer, *, image: str, max_pixels: int
    ) -> None:
        self._encoder = CaptionEncoder(tokenizer)
        self._image, self._max_pixels = image, max_pixels

    def problems(
        self, span: Span, record: np.void, row: Mapping[str, Any] | None
    ) -> Iterator[str]:
        """What is wrong with a sample, in words.

        Args:
            record: its record in the index.
            row: its row in the table; None where there is no sound table.
        """
        try:
            fields = span_json(span)
        except ValueError as error:
            yield f"json cannot be read: {error}"
            return
        yield from _against_index(span, fields, record)
        if row is not None:
            yield from _against_row(span, fields, row)
        yield from self._captions(span, fields)
        size = int(record["width"]), int(record["height"])
        problem = self._picture(span.payload(self._image), size)
        if problem:
            yield problem

    def given_problems(
        self,
        image: bytes,
        ids: np.ndarray,
        record: np.void,
        row: Mapping[str, Any] | None,
    ) -> Iterator[str]:
        """What is wrong with a sample of a tar that `pipeline.index` describes: its
        captions are those of the table.

        Args:
            ids: tokens (n_tokens,) as stored.
        """
        size = int(record["width"]), int(record["height"])
        problem = self._any_picture(image, size)
        if problem:
            yield problem
        if row is not None:
            if int(row["uid"], 16) != record["uid"]:
                yield f"the table has uid {row['uid']} in its place"
            kept, right = self._encoder.encode(row["captions"])
            if len(kept) != record["n_captions"] or not np.array_equal(ids, right):
                yield "the tokens are not those of the captions"

    def _any_picture(self, data: bytes, size: tuple[int, int]) -> str | None:
        """As `_picture`, of any format that is read, as a viewer turns it."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # Turned by a quarter, a picture has its sides exchanged.
                if sorted(image.size) != sorted(size):
                    return f"the image is {image.size}, the index says {size}"
                if size[0] * size[1] <= self._max_pixels:
                    image.load()
        except Exception as error:  # decoders raise what they like
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            return f"the image does not decode: {reason}"
        return None

    def _captions(self, span: Span, fields: Mapping[str, Any]) -> Iterator[str]:
        captions = fields.get("captions")
        texts = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
        if not (captions and texts):
            yield "json has no captions"
            return
        if span.payload("txt") != captions[0].encode():
            yield "txt is not the first caption of the json"
        if fields.get("caption") != captions[0]:
            yield "caption of the json is not the first of its captions"
        try:
            stored = load_ids(span.payload("input_ids.npy"))
        except ValueError as error:
            yield str(error)
            return
        kept, ids = self._encoder.encode(captions)
        if len(kept) != len(captions) or not np.array_equal(ids, stored):
            yield "the tokens are not those of the captions"

    def _picture(self, data: bytes, size: tuple[int, int]) -> str | None:
        """What is wrong with an image, decoded whole; None where nothing is."""
        if size[0] * size[1] > self._max_pixels:
            return f"an image of {size[0]} x {size[1]} is beyond image.max_pixels"
        try:
            if self._image == "jpg":
                # Several times as fast as Pillow, and stricter.
                height, width, _, _ = simplejpeg.decode_jpeg_header(data)
                decoded = (width, height)
                if decoded == size:
                    simplejpeg.decode_jpeg(data, colorspace="RGB")
            else:
                with Image.open(
                    io.BytesIO(data), formats=[_PILLOW_NAMES[self._image]]
                ) as image:
                    decoded = image.size
                    if decoded == size:
                        image.load()
        except Exception as error:  # decoders raise what they like
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            return f"the image does not decode: {reason}"
        if decoded != size:
            return f"the image is {decoded[0]} x {decoded[1]}, the index says {size}"
        return None


def _against_index(
    span: Span, fields: Mapping[str, Any], record: np.void
) -> Iterator[str]:
    captions = fields.get("captions")
    expected = {
        "key": span.key,
        "uid": f"{int(record['uid']):016x}",
        "width": int(record["width"]),
        "height": int(record["height"]),
    }
    for name, value in expected.items():
        if fields.get(name) != value:
            yield f"json has {name} {fields.get(name)!r}, the index {value!r}"
    count = len(captions) if isinstance(captions, list) else 0
    if count != record["n_captions"]:
        yield f"json has {count} captions, the index {record['n_captions']}"


def _against_row(
    span: Span, fields: Mapping[str, Any], row: Mapping[str, Any]
) -> Iterator[str]:
    if row["key"] != span.key:
        yield f"the table has {row['key']!r} in its place"
        return
    for name, value in fields.items():
        if name in row and row[name] != value:
            yield f"json has {name} {value!r}, the table {row[name]!r}"
    if row["n_captions"] != len(row["captions"] or ()):
        yield f"the table counts {row['n_captions']} captions and lists others"
