"""Which box of an image the model sees, and its pixels.

Boxes are a pure function of (seed, epoch, uid); decoding happens at a fraction of the
size in the DCT domain where the box is much larger than the target.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from trainer.options import ImageConfig

_ASPECT = math.log(4 / 3)
_WORD = float(1 << 32)


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
    box_width = min(round(math.sqrt(area * ratio)), width)
    box_height = min(round(math.sqrt(area / ratio)), height)
    left = math.floor(x * (width - box_width + 1))
    top = math.floor(y * (height - box_height + 1))
    return Box(left, top, left + max(box_width, 1), top + max(box_height, 1))


def decode_into(
    out: np.ndarray, jpeg: memoryview, size: tuple[int, int], box: Box
) -> None:
    """Decode `jpeg` of `size` (width, height), and write its `box` to `out` (S, S, 3).

    Raises:
        ValueError: not a JPEG that decodes to `size`.
    """
    width, height = size
    side = out.shape[0]
    if box == (0, 0, width, height) == (0, 0, side, side):
        pixels = simplejpeg.decode_jpeg(jpeg, buffer=out)
        if pixels.shape != out.shape:
            raise ValueError(f"decodes to {pixels.shape}, not {out.shape}")
        return
    pixels = simplejpeg.decode_jpeg(
        jpeg,
        min_width=math.ceil(side * width / (box.right - box.left)),
        min_height=math.ceil(side * height / (box.bottom - box.top)),
    )
    scale_x, scale_y = pixels.shape[1] / width, pixels.shape[0] / height
    scaled = (
        box.left * scale_x,
        box.top * scale_y,
        min(box.right * scale_x, pixels.shape[1]),
        min(box.bottom * scale_y, pixels.shape[0]),
    )
    image = Image.fromarray(pixels).resize(
        (side, side), Image.Resampling.BICUBIC, box=scaled
    )
    out[:] = np.asarray(image)
