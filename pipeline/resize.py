"""Sizes and geometry: from decoded pixels to those that are written.

Owns the resize modes, the resampling filter, orientation and thumbnails. Does not own
decoding at a fraction of the size (`pipeline.jpeg`) or colour (`pipeline.colour`).

Shapes: pixels are C-contiguous uint8 arrays (height, width, channels), with 1 channel
(grey), 3 (RGB) or 4 (CMYK).

The filter is Lanczos with three lobes, widened by the factor (antialiased), in integer
arithmetic: the same bytes with any SIMD instructions or none. It is measured against
Pillow and OpenCV in `benchmarks/image_quality.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from PIL import Image

from pipeline.image_header import ImageError
from pipeline.options import ImageOptions

# Longest side that each format can hold.
_MAX_SIDE = {"jpg": 65_500, "png": 65_500, "webp": 16_383}
_PIXEL_TYPES = {1: PixelType.U8, 3: PixelType.U8x3, 4: PixelType.U8x4}
_WHITE = 255
_THUMBNAIL_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an image of one size becomes what is written, before orientation."""

    crop: bool
    """Cut to the central square first."""
    target: tuple[int, int]
    """Width and height to resample to."""
    pad: bool
    """Add white bars to a square at the end."""

    def changes(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size comes out any different."""
        square = self.target[0] == self.target[1]
        return self.target != size or (self.pad and not square)


def plan_geometry(size: tuple[int, int], options: ImageOptions) -> Geometry:
    """What to do to an image of `size`, width and height.

    Raises:
        ImageError: too_elongated.
    """
    mode, side = options.resize, options.size
    by_longer = mode in ("longer", "border")
    low, high = min(size), max(size)
    if options.only_if_bigger and (high if by_longer else low) <= side:
        mode = "none"
    crop = mode == "center_crop"
    if mode == "none":
        target = size
    else:
        target = (
            (side, side) if crop else _scaled(size, side, high if by_longer else low)
        )
    pixels = target[0] * target[1]
    if max(target) > _MAX_SIDE[options.format] or pixels > options.max_pixels:
        raise ImageError("too_elongated", f"{size[0]}x{size[1]}")
    return Geometry(crop=crop, target=target, pad=mode == "border")


def reduced(image: Image.Image, least: tuple[int, int]) -> tuple[Image.Image, int]:
    """`image` averaged over squares of pixels, with sides of at least twice `least`,
    and the side of the squares.

    What a JPEG has done while it is decoded: the filter then sees far fewer pixels, and
    megapixels are not held three times over.
    """
    factor = min(image.width // (2 * least[0]), image.height // (2 * least[1]))
    return (image.reduce(factor), factor) if factor > 1 else (image, 1)


def resized(
    pixels: np.ndarray, size: tuple[int, int], fraction: int, geometry: Geometry
) -> np.ndarray:
    """An image of `size` cut and resampled to `geometry.target`, given its pixels at
    1/`fraction` of that.
    """
    if fraction == 1 and size == geometry.target:
        return np.ascontiguousarray(pixels)
    width, height = size
    left = top = 0
    if geometry.crop:
        side = min(size)
        left, top = (width - side) // 2, (height - side) // 2
        width = height = side
    # Sides that the fraction does not divide were rounded up: the last pixel stands for
    # less, and without the box all would be shifted.
    x, y, right, bottom = (
        place / fraction for place in (left, top, left + width, top + height)
    )
    box = CropBox(x, y, right - x, bottom - y)
    return _resample(pixels, geometry.target, FilterType.lanczos3, box)


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`pixels` as a viewer shows them, given their EXIF orientation."""
    if orientation == 1:
        return pixels
    # Mirrored kinds first exchange left and right.
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    quarters = {2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def padded(pixels: np.ndarray) -> np.ndarray:
    """`pixels` in the middle of a white square."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    if height == width:
        return pixels
    square = np.full((side, side, pixels.shape[2]), _WHITE, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """RGB pixels averaged to a square (side, side, 3), whatever their shape."""
    # A few rows of each cell say as much as all of them, and are there sooner.
    rows = pixels[:: max(1, pixels.shape[0] // (_THUMBNAIL_ROWS * side))]
    return _resample(rows, (side, side), FilterType.box)


def _scaled(size: tuple[int, int], side: int, of: int) -> tuple[int, int]:
    """`size` times side / of, rounded half up, no side under one pixel."""
    width, height = ((2 * length * side + of) // (2 * of) for length in size)
    return max(1, width), max(1, height)


def _resample(
    pixels: np.ndarray,
    target: tuple[int, int],
    kind: FilterType,
    box: CropBox | None = None,
) -> np.ndarray:
    height, width, channels = pixels.shape
    pixel_type = _PIXEL_TYPES[channels]
    source = ImageData(width, height, pixel_type, pixels.tobytes())
    result = ImageData(*target, pixel_type)
    # Four channels are CMYK here, never alpha.
    options = ResizeOptions(_algorithm(kind), use_alpha=False, crop_box=box)
    _resizer().resize(source, result, options)
    flat = np.frombuffer(result.get_buffer(), np.uint8)
    return flat.reshape(target[1], target[0], channels)


@functools.cache
def _resizer() -> Resizer:
    # It keeps its scratch memory between images.
    return Resizer()


@functools.cache
def _algorithm(kind: FilterType) -> ResizeAlg:
    return ResizeAlg.convolution(kind)
