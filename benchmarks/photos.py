"""Photos to measure with, in two sizes, and the table that names them.

Owns what the files of a benchmark look like: real photos enlarged, or made-up ones with
structure at every scale, with the noise of a sensor on top, so that a JPEG of them has
as many bytes per pixel as a camera's. Does not own what is measured
(`benchmarks.preprocess`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

_WORDS = (
    *("a", "the", "two", "small", "large", "red", "blue", "old", "quiet", "bright"),
    *("dog", "child", "boat", "street", "field", "tree", "bird", "house", "river"),
    *("runs", "stands", "plays", "waits", "jumps", "near", "under", "beside", "with"),
)
_CAPTION_WORDS = 11
# Standard deviation of a sensor's noise, in steps of 8 bits, and the quality of a
# camera's JPEG: together about 0.3 bytes a pixel.
_NOISE = 3.0
_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class PhotoSet:
    """Photos of given sizes, which take turns."""

    name: str
    title: str
    sizes: tuple[tuple[int, int], ...]
    """Width and height."""
    per_shard: int
    """Inputs of a shard: fewer than is usual, to make several in a run, and enough that
    what a shard costs whatever is in it does not count."""


SETS = {
    chosen.name: chosen
    for chosen in (
        PhotoSet(
            name="small",
            title="640x480",
            sizes=((640, 480), (480, 640)),
            per_shard=1000,
        ),
        PhotoSet(
            name="large",
            title="2 to 12 megapixels",
            sizes=(
                *((1632, 1224), (2448, 3264), (2048, 1536)),
                *((4000, 3000), (1944, 2592), (3264, 2448)),
            ),
            per_shard=192,
        ),
    )
}


def make_photos(
    folder: Path, chosen: PhotoSet, count: int, originals: Sequence[Path]
) -> None:
    """Write `count` distinct photos to `folder`, those that are there already left
    alone; from `originals`, or made up where there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        (
            folder / f"{number:06d}.jpg",
            number,
            chosen.sizes[number % len(chosen.sizes)],
            originals[number % len(originals)] if originals else None,
        )
        for number in range(count)
    ]
    todo = [job for job in todo if not job[0].exists()]
    if todo:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(lambda job: _make(*job), todo):
                pass


def write_table(folder: Path, count: int) -> Path:
    """A Parquet table with the `file://` URLs and captions of the first `count` photos
    of a folder, beside them.
    """
    table = folder / f"first-{count}.parquet"
    urls = [(folder / f"{number:06d}.jpg").as_uri() for number in range(count)]
    captions = [caption(number) for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), table)
    return table


def caption(number: int) -> str:
    """About as many words as people write."""
    chance = np.random.default_rng(number)
    return " ".join(chance.choice(_WORDS, _CAPTION_WORDS))


def _make(
    path: Path, number: int, size: tuple[int, int], original: Path | None
) -> None:
    picture = _made_up(number) if original is None else Image.open(original)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    width, height = size
    chance = np.random.default_rng(number)
    top, left = chance.integers(0, 64, 2)
    noise = _noise()[top : top + height, left : left + width, None]
    noisy = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    data = simplejpeg.encode_jpeg(noisy, _QUALITY, "RGB", "420")
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.replace(path)


@functools.cache
def _noise() -> np.ndarray:
    """Grey noise (rows, columns) larger than any photo; every photo takes a part."""
    sizes = [size for chosen in SETS.values() for size in chosen.sizes]
    side = max(max(size) for size in sizes) + 64
    chance = np.random.default_rng(0)
    return (_NOISE * chance.standard_normal((side, side), np.float32)).astype(np.int16)


def _made_up(number: int) -> Image.Image:
    """Octaves of noise: amplitudes fall with frequency, as those of photos do."""
    chance = np.random.default_rng(number)
    total = np.zeros((256, 256, 3), np.float32)
    for side in (2, 4, 8, 16, 32, 64, 128, 256):
        grey = chance.standard_normal((side, side, 1))
        colour = chance.standard_normal((side, side, 3))
        octave = (128 + 40 * grey + 12 * colour).clip(0, 255).astype(np.uint8)
        enlarged = Image.fromarray(octave).resize((256, 256), Image.Resampling.BICUBIC)
        total += (np.asarray(enlarged, np.float32) - 128) * (2 / side) ** 0.5
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))
