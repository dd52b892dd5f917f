"""PNG: pixels that are all there, whatever stands behind them.

Owns what Pillow does not ask of a PNG: it never compares the checksums of compressed
pixels, and refuses an image for a broken chunk that nobody needs. Does not own headers
(`pipeline.image_header`) or what is made of the pixels (`pipeline.images`).
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">I4s")
_CRC = struct.Struct(">I")
_IEND = bytes.fromhex("0000000049454e44ae426082")


def load(data: bytes, image: Image.Image) -> Image.Image:
    """`image`, opened from `data`, with its pixels decoded; without what stands behind
    them where that is broken.

    Raises:
        OSError: a chunk of pixels is damaged.
        Exception: what Pillow raises on pixels that do not decode.
    """
    end = _end_of_pixels(data)
    try:
        image.load()
    except Exception:
        if end is None:
            raise
        image = Image.open(io.BytesIO(data[:end] + _IEND), formats=("PNG",))
        image.load()
    return image


def _end_of_pixels(data: bytes) -> int | None:
    """Where the last IDAT ends; None where the file does before. Raises OSError where
    the checksum of one is wrong.
    """
    place, end = len(_SIGNATURE), None
    while place + _HEAD.size <= len(data):
        length, kind = _HEAD.unpack_from(data, place)
        checked = place + _HEAD.size + length
        if kind == b"IDAT":
            if checked + _CRC.size > len(data):
                return None
            crc = zlib.crc32(memoryview(data)[place + 4 : checked])
            if _CRC.unpack_from(data, checked) != (crc,):
                raise OSError("wrong checksum of compressed pixels")
            end = checked + _CRC.size
        elif end is not None:
            return end
        place = checked + _CRC.size
    return end
