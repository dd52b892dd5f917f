"""What an image's header says, and failures' reasons. Limits come before any pixel.

Owns the list of formats, the limits that a header alone can break, orientation, EXIF
text, and `ImageError`. Does not own pixels (`pipeline.jpeg`, `pipeline.colour`) or the
chain of steps (`pipeline.images`).

Reasons of failures, as they are counted:

| reason | the image |
|---|---|
| not_an_image | is of none of the formats |
| unreadable | is refused by every decoder of its format |
| truncated | ends before its last pixel |
| corrupt | is a JPEG whose compressed data contradict themselves |
| too_many_pixels | claims more than `image.max_pixels` |
| too_long | claims a side of more than `image.max_side` |
| too_large | is a file of more than `image.max_bytes` |
| too_elongated | would be longer than its format or `image.max_pixels` allows |
| unsupported_mode | has pixels that no rule turns into sRGB |
| memory_limit | took more than `image.memory_limit_mb` (`pipeline.decoder`) |
| time_limit | took more than `image.time_limit_s` (`pipeline.decoder`) |
| killed_decoder | killed its process twice (`pipeline.decoder`) |
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from pipeline import png
from pipeline.options import ImageOptions

# Formats with a maintained decoder and no external interpreter behind it (Pillow hands
# EPS to Ghostscript, for one).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Bytes that decoding a WebP may need, per pixel of its canvas.
_WEBP_BYTES = 20
# Profiles of printing presses have up to 3 MB; more is an attack on memory.
MAX_PROFILE = 8 << 20
_EXIF_CHARS = 256
_EXIF_TAGS = 100
_ORIENTATION = ExifTags.Base.Orientation.value
# Segments of a JPEG: frames of the kinds that every decoder knows; those that say
# nothing about pixels but how to decode them (tables, restarts, comments, JFIF); scans.
_FRAMES = (b"\xc0", b"\xc1", b"\xc2")
_SILENT = (b"\xc4", b"\xdb", b"\xdd", b"\xe0", b"\xfe")
_SOS = b"\xda"
_BITS = 8
_MODES = {b"\x01": "L", b"\x03": "RGB"}


class ImageError(Exception):
    """An image that cannot be used. `reason` is the code it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        # Both are arguments, because unpickling calls the class with them.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """An image that was opened, and no more unless EXIF may stand behind its pixels."""

    image: Image.Image | None
    """As Pillow opened it, unless it is a JPEG: `load()` decodes, unless that is done
    (of a PNG)."""
    mode: str
    """Kind of pixels, in Pillow's words."""
    size: tuple[int, int]
    """Width and height as `image.load()` gives them."""
    orientation: int
    """EXIF orientation that is still to be applied, 1 to 8."""
    exif: str = "{}"
    """JSON text of the main EXIF tags; `{}` without any."""
    profile: bytes | None = None
    """ICC profile of a JPEG."""
    inverted: bool = False
    """Whether ink of a CMYK JPEG is stored as Adobe's programs do, full as 0."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height as a viewer shows them: orientation applied."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


def read_header(data: bytes | memoryview, options: ImageOptions) -> Header:
    """Open an image and check its claims against the limits. A bare JPEG is read where
    it lies, every other image as a copy.

    Raises:
        ImageError: not_an_image, unreadable, truncated, too_large, too_long,
            too_many_pixels or memory_limit.
    """
    if len(data) > options.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes")
    # The checks here are the limit; Pillow's own is a fixed one.
    Image.MAX_IMAGE_PIXELS = None
    # Pillow's limit for a profile or text of a PNG, which it refuses the image for.
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE
    bare = _bare_jpeg(data)
    if bare is not None:
        _check_size(bare.size, options)
        return bare
    data = bytes(data)
    canvas = _webp_canvas(data)
    if canvas:
        _check_size(canvas, options)
    image = _open(data, canvas)
    _check_size(image.size, options)
    if image.format == "PNG":
        # Its EXIF may stand behind the pixels. What fails among them must not pass for
        # broken EXIF: Pillow would then take half an image for a whole one.
        try:
            image = png.load(data, image)
        except Exception as error:  # decoders raise anything on hostile data
            raise unreadable(error) from error
    exif = _exif(image)
    orientation: Any = None if exif is None else _exif_value(exif, _ORIENTATION)
    # Pillow applies a TIFF's orientation itself, and gives its size accordingly.
    if orientation not in range(2, 9) or image.format == "TIFF":
        orientation = 1
    return Header(
        image=None if image.format in ("JPEG", "MPO") else image,
        mode=image.mode,
        size=image.size,
        orientation=orientation,
        exif=_exif_text(exif),
        profile=image.info.get("icc_profile"),
        inverted="adobe" in image.info,
    )


def unreadable(error: Exception) -> ImageError:
    """The failure that a decoder's exception stands for."""
    # Some messages print an object with its address, which no two runs share.
    text = re.sub(r"0x[0-9a-f]+", "0x", str(error))
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return ImageError("memory_limit", text or "out of memory")
    # In Pillow's words: `image file is truncated`, `Truncated File Read`.
    reason = "truncated" if "truncated" in text.lower() else "unreadable"
    return ImageError(reason, text)


def _bare_jpeg(data: bytes | memoryview) -> Header | None:
    """What a JPEG's frame says, where no segment before its data says any more; None
    for every other file. Pillow takes ten times as long to find that.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frame = b""
    place = 2
    while data[place : place + 1] == b"\xff":
        kind, length = data[place + 1 : place + 2], data[place + 2 : place + 4]
        if kind == _SOS:
            return _of_frame(frame)
        if kind in _FRAMES and not frame:
            frame = bytes(data[place + 4 : place + 10])
        elif kind not in _SILENT:
            return None
        place += 2 + int.from_bytes(length, "big")
    return None


def _of_frame(frame: bytes) -> Header | None:
    """Bits, height, width and number of components, as a frame has them."""
    mode = _MODES.get(frame[5:])
    if mode is None or frame[0] != _BITS:
        return None
    height, width = (int.from_bytes(frame[at : at + 2], "big") for at in (1, 3))
    return Header(image=None, mode=mode, size=(width, height), orientation=1)


def _open(data: bytes, webp_canvas: tuple[int, int] | None) -> Image.Image:
    try:
        if webp_canvas:
            # Opening one takes the memory of two canvases, decoding it of more; and
            # Pillow does not tell want of memory from damage, so it is asked for here.
            np.empty(webp_canvas[0] * webp_canvas[1] * _WEBP_BYTES, np.uint8)
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError("not_an_image", f"none of {known}") from None
    except Exception as error:  # decoders raise anything on a hostile header
        raise unreadable(error) from error


def _check_size(size: tuple[int, int], options: ImageOptions) -> None:
    width, height = size
    if width * height > options.max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height}")
    if max(size) > options.max_side:
        raise ImageError("too_long", f"{width}x{height}")
    if width < 1 or height < 1:
        raise ImageError("unreadable", f"{width}x{height} pixels")


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas of a WebP, as its extended, lossless or lossy
    header has it; None for other files.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        sides = _integer(data[24:27]) + 1, _integer(data[27:30]) + 1
    elif kind == b"VP8L":
        packed = _integer(data[21:25])
        sides = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        sides = _integer(data[26:28]) & 0x3FFF, _integer(data[28:30]) & 0x3FFF
    return sides


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _exif(image: Image.Image) -> Image.Exif | None:
    if image.format == "JPEG" and "exif" not in image.info:
        # Parsing nothing takes as long as opening the image.
        return None
    try:
        return image.getexif()
    except Exception:  # a broken EXIF block does not make the pixels unusable
        return None


def _exif_text(exif: Image.Exif | None) -> str:
    if exif is None:
        return "{}"
    tags = {}
    for tag in sorted(exif)[:_EXIF_TAGS]:
        value = _exif_value(exif, tag)
        if isinstance(value, (str, int, float)) or "Rational" in type(value).__name__:
            name = ExifTags.TAGS.get(tag, str(tag))
            tags[name] = str(value).replace("\0", "").strip()[:_EXIF_CHARS]
    return json.dumps(tags, sort_keys=True)


def _exif_value(exif: Image.Exif, tag: int) -> Any:
    """One tag's value, None where it cannot be had: tags are parsed when asked for, and
    one without a sound value (a TIFF names some that it lacks) costs only itself.
    """
    try:
        return exif.get(tag)
    except Exception:  # parsers of tags raise anything on hostile data
        return None
