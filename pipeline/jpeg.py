"""JPEG: decoding at a fraction of the size, strictly first, and keeping coefficients.

Owns what happens to a JPEG's bytes. Does not own headers (`pipeline.image_header`),
colour (`pipeline.colour`) or sizes (`pipeline.resize`).
"""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.image_header import Header, ImageError, unreadable

_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# Fractions for which libjpeg-turbo has SIMD code: 3/8, 5/8, ... take longer than 1.
_FRACTIONS = (8, 4, 2)
# Complaints of libjpeg that no other decoder can do anything about, in its words.
_FATAL = {
    "premature end": "truncated",
    "Premature end": "truncated",
    "bad Huffman code": "corrupt",
    "bad arithmetic code": "corrupt",
    "instead of RST": "corrupt",
    "Insufficient memory": "memory_limit",
}
# Compressed data that are left over when all blocks are there.
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0x(..)")
_AT_THE_END = "d9"
# So many bytes of what looks like padding may belong to the last block.
_SLACK = 8

_JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DHT, _SOS, _DQT, _DRI, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP = range(0xE0, 0xF0)
# Restarts, start, end, and a byte of 1 bits that fills.
_NO_SEGMENT = (*range(0xD0, 0xDA), 0xFF)
_KEPT = (_SOF0, _DHT, _SOS, _DQT, _DRI)
# The first marker after compressed data that is neither stuffing nor a restart.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
# Inserted where compressed data end; long enough to fill what is missing.
_PROBE = bytes.fromhex("5aa53cc369961ee1") * 8


def decode_strictly(
    data: bytes | memoryview, header: Header, least: tuple[int, int]
) -> np.ndarray | None:
    """Pixels (height, width, channels) with sides of at least `least`, width and
    height; None where the decoder complains about something that may do no harm.

    A source at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size in the
    DCT domain: the largest single saving, and it averages as it shrinks.

    Raises:
        ImageError: truncated, corrupt or memory_limit.
    """
    fraction = dct_fraction(header.size, least)
    width, height = (-(-side // fraction) for side in header.size)
    space = _COLOUR_SPACES.get(header.mode, "RGB")
    try:
        return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height)
    except ValueError as error:
        _refuse_fatal(str(error))
    return None


def decode_tolerantly(data: bytes, header: Header) -> Image.Image:
    """The loaded image, where the strict decoder refuses it.

    Pillow asks libjpeg for the same pixels and ignores its complaints, those about
    compressed data included: these are asked for again, and data that end early are
    found by adding to them.

    Raises:
        ImageError: truncated, corrupt, memory_limit or unreadable.
    """
    _refuse_contradictions(data, header)
    image = _load(data)
    end = _end_of_image(data)
    if end is not None:
        longer = data[:end] + _PROBE + data[end:]
        if _load(longer).tobytes() != image.tobytes():
            raise ImageError("truncated", "compressed data end early")
    return image


def dct_fraction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Largest of 8, 4, 2 and 1 by which `size` can be divided and be `least`."""
    factor = min(size[0] // least[0], size[1] // least[1])
    return next((fraction for fraction in _FRACTIONS if fraction <= factor), 1)


def without_metadata(data: bytes) -> bytes | None:
    """A baseline JPEG with nothing but a plain JFIF header and its coefficients, or
    None where it is of another kind.

    Expects what the strict decoder has accepted, in YCbCr with chroma at half size.
    """
    parts = [_SOI, _JFIF]
    place = len(_SOI)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if data[place : place + 2] == _EOI:
            return b"".join([*parts, _EOI])
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SOS:
            found = _MARKER.search(data, end)
            end = found.start() if found else len(data)
        if marker == _DQT and data[place + 4] >> 4:
            return None
        if marker in _KEPT:
            parts.append(data[place:end])
        elif marker not in _APP and marker != _COM:
            return None
        if marker == _SOS and data[end : end + 2] == _EOI:
            return b"".join([*parts, _EOI])
        place = end
    return None


def is_plain(data: bytes | memoryview) -> bool:
    """Whether pixels are stored as YCbCr with chroma at half size."""
    return simplejpeg.decode_jpeg_header(data)[2:] == ("YCbCr", "420")


def _refuse_fatal(complaint: str) -> None:
    for words, reason in _FATAL.items():
        if words in complaint:
            raise ImageError(reason, complaint)


def _refuse_contradictions(data: bytes, header: Header) -> None:
    """Raise ImageError for what libjpeg says about compressed data. It speaks once: a
    complaint about what stands before them, which may do no harm, would be all.
    """
    bare = _bare(data)
    if bare is None:
        return
    least = {
        "min_width": -(-header.size[0] // _FRACTIONS[0]),
        "min_height": -(-header.size[1] // _FRACTIONS[0]),
    }
    try:
        simplejpeg.decode_jpeg(bare, _COLOUR_SPACES.get(header.mode, "RGB"), **least)
    except ValueError as error:
        complaint = str(error)
    else:
        return
    _refuse_fatal(complaint)
    left_over = _LEFT_OVER.search(complaint)
    if left_over and not _is_padding(bare, *left_over.groups()):
        raise ImageError("corrupt", complaint)


def _bare(data: bytes) -> bytes | None:
    """The segments before the first scan that decoding needs, and all from there on."""
    parts, place = [_SOI], len(_SOI)
    scan = _first_scan(data)
    if scan is None:
        return None
    while place < scan:
        if data[place] != 0xFF or not _is_segment(data[place + 1]):
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] not in _APP and data[place + 1] != _COM:
            parts.append(data[place:end])
        place = end
    return b"".join([*parts, data[scan:]])


def _is_padding(data: bytes, size: str, marker: str) -> bool:
    """Whether bytes that are left over before the end stand there on purpose. Blocks
    that were lost, or read wrongly, leave data; a hole leaves what was read, too.
    """
    end = _end_of_image(data) if marker == _AT_THE_END else None
    if end is None:
        return False
    before = data[:end]
    alike = len(before) - len(before.rstrip(before[-1:]))
    return int(size) <= alike <= int(size) + _SLACK


def _load(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
    except Image.UnidentifiedImageError:
        # Its message names an object, not what is wrong.
        raise ImageError("unreadable", "a JPEG with a broken header") from None
    except Exception as error:  # decoders raise anything on hostile data
        raise unreadable(error) from error
    return image


def _end_of_image(data: bytes) -> int | None:
    """Where the end marker after the first scan stands."""
    scan = _first_scan(data)
    end = data.find(_EOI, scan) if scan is not None else -1
    return end if end >= 0 else None


def _first_scan(data: bytes) -> int | None:
    """Where the first scan starts; one inside a segment is a thumbnail's."""
    place = len(_SOI)
    while (place := data.find(0xFF, place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == _SOS:
            return place
        # Anything but a marker is skipped byte by byte, as libjpeg does.
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        place += 2 + length if _is_segment(marker) else 1
    return None


def _is_segment(marker: int) -> bool:
    return marker >= _SOF0 and marker not in _NO_SEGMENT
