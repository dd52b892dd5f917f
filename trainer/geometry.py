"""Which box of an image the model sees, and its pixels.

Boxes and flips are a pure function of (seed, epoch, uid); decoding happens at a
fraction of the size in the DCT domain where the box is much larger than the target.
Shards that the pipeline wrote hold upright RGB JPEGs, which take the fast way; tars
that it only indexed hold whatever was in them.

The filter is bicubic (Catmull-Rom), widened by the factor, in integer arithmetic: the
same pixels with any SIMD instructions or none.
"""

from __future__ import annotations

import io
import math
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from trainer.options import ImageConfig

_ASPECT = math.log(4 / 3)
_WORD = float(1 << 32)
# Formats with a maintained decoder and no external interpreter behind it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class Box(NamedTuple):
    """Part of an image in pixels, edges as in Pillow."""

    left: float
    top: float
    right: float
    bottom: float


def box_of(config: ImageConfig, width: int, height: int, words: np.ndarray) -> Box:
    """Box of a (width, height) image for its four crop draws (4,), each 0..2^32-1."""
    if config.geometry == "resize":
        return Box(0, 0, width, height)
    if config.geometry == "center_crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return Box(left, top, left + side, top + side)
    scale, aspect, x, y = (float(word) / _WORD for word in words)
    area = width * height * (config.min_scale + (1 - config.min_scale) * scale)
    ratio = math.exp((2 * aspect - 1) * _ASPECT)
    box_width = max(min(round(math.sqrt(area * ratio)), width), 1)
    box_height = max(min(round(math.sqrt(area / ratio)), height), 1)
    left = math.floor(x * (width - box_width + 1))
    top = math.floor(y * (height - box_height + 1))
    return Box(left, top, left + box_width, top + box_height)


def flipped(words: np.ndarray) -> np.ndarray:
    """Which images (B,) are mirrored left to right, for their flip draws (B,)."""
    return words >> 31 == 1


def decode_into(
    out: np.ndarray,
    data: memoryview,
    size: tuple[int, int],
    box: Box,
    *,
    flip: bool = False,
    upright: bool = False,
) -> None:
    """Decode an image that shows `size` (width, height), and write its `box` to `out`
    (S, S, 3), mirrored left to right with `flip`. EXIF orientation is applied, alpha
    lies on white. An image that is known to be an `upright` JPEG is not looked through
    for its orientation.

    Raises:
        ValueError: not an image that decodes to `size`.
    """
    if not ((upright or _is_upright_jpeg(data)) and _fast(out, data, size, box)):

        def check(claimed: tuple[int, int]) -> None:
            if sorted(claimed) != sorted(size):
                raise ValueError(f"claims {claimed}, not {size}")

        image = _decoded(data, check)
        if image.size != size:
            raise ValueError(f"decodes to {image.size}, not {size}")
        _resize_into(out, np.asarray(image), box)
    if flip:
        out[:] = out[:, ::-1].copy()


def decode_file(
    out: np.ndarray, data: memoryview, config: ImageConfig, *, max_pixels: int
) -> None:
    """Decode an image that no index describes, and write to `out` (S, S, 3) its box
    under `config`, whose draws are 0.

    Raises:
        ValueError: not an image, or one that claims more than `max_pixels`.
    """

    def check(size: tuple[int, int]) -> None:
        if size[0] * size[1] > max_pixels:
            raise ValueError(f"claims {size}, more than {max_pixels:,} pixels")

    size = _jpeg_size(data)
    if size and _is_upright_jpeg(data):
        check(size)
        decode_into(out, data, size, box_of(config, *size, np.zeros(4)), upright=True)
        return
    image = _decoded(data, check)
    _resize_into(out, np.asarray(image), box_of(config, *image.size, np.zeros(4)))


def decode_whole(out: np.ndarray, jpeg: memoryview) -> bool:
    """Decode an upright JPEG that is to be shown whole and has just the size of `out`
    (S, S, 3). False for another one, and where `decode_into` has to say more.
    """
    try:
        # Into memory of the right size: one that claims more is refused.
        pixels = simplejpeg.decode_jpeg(jpeg, buffer=out)
    except ValueError:
        return False
    return pixels.shape == out.shape


def _fast(out: np.ndarray, jpeg: memoryview, size: tuple[int, int], box: Box) -> bool:
    """`decode_into` for most JPEGs; False for one with inks instead of colours, or
    damage that a strict decoder refuses.
    """
    try:
        _decode_jpeg_into(out, jpeg, size, box)
    except ValueError:
        return False
    return True


def _decode_jpeg_into(
    out: np.ndarray, jpeg: memoryview, size: tuple[int, int], box: Box
) -> None:
    width, height = size
    side = out.shape[0]
    if box == (0, 0, width, height) == (0, 0, side, side):
        if not decode_whole(out, jpeg):
            raise ValueError(f"does not decode, or not to {size}")
        return
    claimed = simplejpeg.decode_jpeg_header(jpeg)[1::-1]
    if claimed != size:
        raise ValueError(f"claims {claimed}, not {size}")
    pixels = simplejpeg.decode_jpeg(
        jpeg,
        buffer=_memory(width * height * 3),
        min_width=math.ceil(side * width / (box.right - box.left)),
        min_height=math.ceil(side * height / (box.bottom - box.top)),
    )
    scale_x, scale_y = pixels.shape[1] / width, pixels.shape[0] / height
    scaled = Box(
        box.left * scale_x,
        box.top * scale_y,
        min(box.right * scale_x, pixels.shape[1]),
        min(box.bottom * scale_y, pixels.shape[0]),
    )
    _resize_into(out, pixels, scaled)


def _resize_into(out: np.ndarray, pixels: np.ndarray, box: Box) -> None:
    """Resample the `box` of `pixels` (H, W, 3) to `out` (S, S, 3)."""
    side, (height, width, _) = out.shape[0], pixels.shape
    if box == (0, 0, width, height) == (0, 0, side, side):
        out[:] = pixels
        return
    source = ImageData(width, height, PixelType.U8x3, pixels.tobytes())
    result = ImageData(side, side, PixelType.U8x3)
    crop = CropBox(box.left, box.top, box.right - box.left, box.bottom - box.top)
    options = ResizeOptions(_ALGORITHM, use_alpha=False, crop_box=crop)
    _kept.resizer.resize(source, result, options)
    out[:] = np.frombuffer(result.get_buffer(), np.uint8).reshape(out.shape)


class _Kept(threading.local):
    """What each thread keeps between images."""

    def __init__(self) -> None:
        self.resizer = Resizer()
        self.memory = bytearray()


_ALGORITHM = ResizeAlg.convolution(FilterType.catmull_rom)
_kept = _Kept()


def _memory(size: int) -> bytearray:
    """At least `size` bytes that belong to this thread until it asks again."""
    if len(_kept.memory) < size:
        _kept.memory = bytearray(size)
    return _kept.memory


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Width and height by the header; None where the fast decoder sees no JPEG."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height


def _is_upright_jpeg(data: memoryview) -> bool:
    """A JPEG without an EXIF orientation, by the segments before its pixels."""
    if bytes(data[:2]) != b"\xff\xd8":
        return False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = struct.unpack_from(">H", data, at + 2)[0]
        if data[at + 1] == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            return _orientation(bytes(data[at + 4 : at + 2 + size])) == 1
        at += 2 + size
    return True


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block does not make the pixels unusable
        return 1


def _decoded(data: memoryview, check: Callable[[tuple[int, int]], None]) -> Image.Image:
    """RGB pixels as a viewer shows them, of an image whose claimed size, not turned
    yet, passes the `check`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Now, not after it took a thousand times the memory: files are anybody's.
            check(image.size)
            return _on_white(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        # Pillow's own words name an object in memory.
        raise ValueError(f"is damaged, or none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # decoders raise anything on hostile data
        raise ValueError(f"does not decode: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips instead of scaling.
        grey = np.asarray(image).astype(np.int64).clip(0, 65_535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
