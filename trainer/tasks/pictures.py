"""Images in folders, as published data sets have them: found, and read into arrays.

Owns where an image may lie, what is done about those that are missing or damaged, and
decoding on threads. Does not own boxes and decoders (`trainer.geometry`) or images in
shards (`trainer.dataset`).

Shapes: N images of S pixels a side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from trainer.geometry import decode_file
from trainer.options import ImageConfig

Unreadable = Literal["refuse", "leave_out"]

# The pipeline's own: where Pillow begins to warn of decompression bombs.
_MAX_PIXELS = 89_478_485
_NAMED = 3
Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How images are read: the whole image or its centre square, as the run has it,
    never cropped by chance.
    """

    image: ImageConfig
    key: str
    """Whose value `leave_out` errors recommend."""
    threads: int = 2
    max_pixels: int = _MAX_PIXELS

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}: it must be 1 or more")

    @property
    def leave_out(self) -> str:
        """What else can be done about an image that cannot be read."""
        return (
            "leave out, and count, the examples that show such images: "
            f"--{self.key} leave_out"
        )

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

    def png(self, path: Path) -> bytes:
        """An image as the model sees it, for people."""
        out = io.BytesIO()
        Image.fromarray(self.read([path])[0]).save(out, "PNG")
        return out.getvalue()

    def damaged(self, paths: Collection[Path]) -> set[Path]:
        """Those of the images that cannot be read."""
        with ThreadPoolExecutor(self.threads) as pool:
            good = pool.map(self._readable, paths)
            return {path for path, one in zip(paths, good, strict=True) if not one}

    def _readable(self, path: Path) -> bool:
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
                f"image {path} {said}: fetch it again, or {self.leave_out}"
            ) from error


def first_file(candidates: Sequence[Path]) -> Path:
    """The first of the paths where there is a file; without one the first path."""
    return next((path for path in candidates if path.is_file()), candidates[0])


def with_images(
    examples: Sequence[Example],
    images: Callable[[Example], Sequence[Path]],
    pictures: Pictures,
    unreadable: Unreadable,
) -> tuple[list[Example], dict[str, int]]:
    """The examples whose images can be read, in their order, and how many others there
    are: `missing_image`, `damaged_image`.

    Args:
        images: of an example.
        unreadable: refuse looks for every file, and an image that does not decode is an
            error when it is read; leave_out decodes every image once, now.

    Raises:
        ValueError: refuse, and files are missing; or no example is left.
    """
    shown = {path for example in examples for path in images(example)}
    missing = {path for path in shown if not path.is_file()}
    damaged: set[Path] = set()
    if unreadable == "leave_out":
        damaged = pictures.damaged(shown - missing)
    elif missing:
        some = ", ".join(map(str, sorted(missing)[:_NAMED]))
        raise ValueError(
            f"{len(missing):,} of {len(shown):,} images are missing: {some}"
            f"{', ...' if len(missing) > _NAMED else ''}. Put them there, say where "
            f"they are, or {pictures.leave_out}"
        )
    kept, lost = [], 0
    for example in examples:
        if missing.intersection(images(example)):
            lost += 1
        elif not damaged.intersection(images(example)):
            kept.append(example)
    if not kept:
        raise ValueError(
            f"no image of {len(examples):,} examples can be read, such as "
            f"{min(missing | damaged)}: say where they are"
        )
    damaged_image = len(examples) - len(kept) - lost
    return kept, {"missing_image": lost, "damaged_image": damaged_image}
