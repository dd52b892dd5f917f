"""Images in folders, as published data sets have them: found, and read into arrays.

Owns where an image may lie, what is done about those that are missing or damaged, and
decoding on threads. Does not own boxes and decoders (`trainer.geometry`) or images in
shards (`trainer.dataset`).

Shapes: N images of S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.geometry import decode_file
from trainer.options import ImageConfig

Unreadable = Literal["refuse", "leave_out"]

# The pipeline's own: where Pillow begins to warn of decompression bombs.
_MAX_PIXELS = 89_478_485
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How images are read: the whole image or its centre square, as the run has it,
    never cropped by chance.
    """

    image: ImageConfig
    threads: int = 2
    max_pixels: int = _MAX_PIXELS

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}: it must be 1 or more")

    def read(self, paths: Sequence[Path]) -> np.ndarray:
        """Pixels (N, S, S, 3) uint8 of the images at `paths`; one that comes several
        times is decoded once.

        Raises:
            ValueError: one that is missing, damaged or too large, with its path.
        """
        distinct = list(dict.fromkeys(paths))
        side = self.image.size
        pixels = np.empty((len(distinct), side, side, 3), dtype=np.uint8)
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(self._read, distinct, pixels))
        if len(distinct) == len(paths):
            return pixels
        number = {path: place for place, path in enumerate(distinct)}
        return pixels[[number[path] for path in paths]]

    def readable(self, path: Path) -> bool:
        """Does an image decode?"""
        side = self.image.size
        try:
            self._read(path, np.empty((side, side, 3), dtype=np.uint8))
        except ValueError:
            return False
        return True

    def _read(self, path: Path, out: np.ndarray) -> None:
        try:
            data = memoryview(path.read_bytes())
            plain = self.image.geometry == "resize"
            shown = ImageConfig(
                size=self.image.size, geometry="resize" if plain else "center_crop"
            )
            decode_file(out, data, shown, max_pixels=self.max_pixels)
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(
                f"image {path} {said}: fetch it again, or go on without the examples "
                "that show such images: --images.unreadable leave_out"
            ) from error


def first_file(candidates: Sequence[Path]) -> Path:
    """The first of the paths where there is a file; without one the first path."""
    return next((path for path in candidates if path.is_file()), candidates[0])


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Examples of a file that are not used, by reason; `used` are."""

    used: int
    missing_image: int = 0
    damaged_image: int = 0

    @property
    def plain(self) -> dict[str, Any]:
        """As results have it."""
        return {
            "examples": self.used + self.missing_image + self.damaged_image,
            "used": self.used,
            "left_out": {
                "missing_image": self.missing_image,
                "damaged_image": self.damaged_image,
            },
        }
