"""What the fast path of images costs in quality: PSNR and SSIM, before encoding.

The reference is a full-size decode and Pillow's Lanczos. Against it stand what
`pipeline.images` writes (a decode at 1/2, 1/4 or 1/8 of the size where that is large
enough, then Lanczos in integers) and, after a full-size decode, Pillow's bicubic and
OpenCV's INTER_AREA (img2dataset's default; left out where OpenCV is not installed).

    python -m benchmarks.image_quality [FOLDER] [--limit 40] [--shares 0.9 0.6 ...]

FOLDER holds JPEGs; without it, pictures with the spectrum of photographs are made. Each
is written with its shorter side at every share of what it was. Owns no code that others
use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.images import decode_image
from pipeline.jpeg import dct_fraction
from pipeline.options import ImageOptions

# Just above and below 1/2, 1/4 and 1/8, where the fraction of the decode changes.
SHARES = (0.9, 0.6, 0.5, 0.35, 0.25, 0.15, 0.125, 0.1)
_WINDOW = 8
_LUMA = np.array([0.299, 0.587, 0.114])
# Wang et al. 2004: (0.01 * 255)^2 and (0.03 * 255)^2.
_C1, _C2 = 6.5025, 58.5225

Resize = Callable[[bytes, tuple[int, int]], np.ndarray]


@dataclass
class Figures:
    """What was measured of one way at one share."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        psnr, ssim = np.array(self.psnr), np.array(self.ssim)
        return (
            f"{psnr.mean():6.1f} {psnr.min():6.1f} {ssim.mean():7.4f} {ssim.min():7.4f}"
            f" {np.median(self.milliseconds):7.2f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each share and way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    given = parser.parse_args(argv)
    images = list(_images(given.folder, given.limit))
    ways = _ways()
    print(f"{len(images)} images; decode and resize, one thread")
    print(
        f"{'share':>6} {'decode':>6} {'way':<12}   PSNR    min    SSIM     min      ms"
    )
    for share in given.shares:
        figures = {name: Figures() for name in ways}
        for data in images:
            _measure(data, share, ways, figures)
        fraction = _fraction(images[0], share)
        for name, figure in figures.items():
            decode = f"1/{fraction}" if name == "ours" else "1/1"
            print(f"{share:6.3f} {decode:>6} {name:<12} {figure}")


def _images(folder: Path | None, limit: int) -> Iterator[bytes]:
    if folder is None:
        yield from (_picture(seed) for seed in range(min(limit, 8)))
        return
    paths = sorted(path for path in folder.rglob("*.jp*g") if path.is_file())
    for path in paths[:limit]:
        yield path.read_bytes()


def _picture(seed: int, width: int = 1600, height: int = 1200) -> bytes:
    """A JPEG whose amplitudes fall with frequency, as those of photographs do."""
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    bands = []
    for _ in range(3):
        spectrum = np.fft.rfft2(generator.normal(size=(height, width))) * falloff
        band = np.fft.irfft2(spectrum, (height, width))
        bands.append(band / band.std())
    # Colours of photographs go mostly together.
    grey = bands[0]
    pixels = np.stack([grey, grey + 0.3 * bands[1], grey + 0.3 * bands[2]], axis=2)
    image = (128 + 50 * pixels).clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(image, 92, "RGB", "420")


def _ways() -> dict[str, Resize]:
    ways: dict[str, Resize] = {
        "ours": _ours,
        "bicubic": lambda data, size: _pillow(data, size, Image.Resampling.BICUBIC),
    }
    try:
        import cv2
    except ImportError:
        return ways
    cv2.setNumThreads(1)

    def area(data: bytes, size: tuple[int, int]) -> np.ndarray:
        full = simplejpeg.decode_jpeg(data)
        return np.asarray(cv2.resize(full, size, interpolation=cv2.INTER_AREA))

    return {**ways, "INTER_AREA": area}


def _ours(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return decode_image(data, ImageOptions(size=min(size))).pixels


def _pillow(data: bytes, size: tuple[int, int], kind: int) -> np.ndarray:
    full = Image.fromarray(simplejpeg.decode_jpeg(data))
    return np.asarray(full.resize(size, kind))


def _measure(
    data: bytes, share: float, ways: dict[str, Resize], figures: dict[str, Figures]
) -> None:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    side = round(min(width, height) * share)
    written = decode_image(data, ImageOptions(size=side)).pixels
    size = written.shape[1], written.shape[0]
    reference = _pillow(data, size, Image.Resampling.LANCZOS).astype(float)
    for name, resize in ways.items():
        start = time.thread_time()
        pixels = resize(data, size)
        figures[name].milliseconds.append(1e3 * (time.thread_time() - start))
        figures[name].psnr.append(_psnr(pixels, reference))
        figures[name].ssim.append(_ssim(pixels @ _LUMA, reference @ _LUMA))


def _fraction(data: bytes, share: float) -> int:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    picture = decode_image(data, ImageOptions(size=round(min(width, height) * share)))
    return dct_fraction((width, height), picture.pixels.shape[1::-1])


def _psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Decibels over all channels."""
    error = np.mean((pixels - reference) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two grey images, uniform window of 8 x 8."""
    mean_a, mean_b = _mean(a), _mean(b)
    variance_a, variance_b = _mean(a * a) - mean_a**2, _mean(b * b) - mean_b**2
    covariance = _mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    size = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float((likeness / size).mean())


def _mean(values: np.ndarray) -> np.ndarray:
    """Means of all windows of a two-dimensional array."""
    for axis in (0, 1):
        sums = np.insert(np.cumsum(values, axis), 0, 0, axis)
        high = np.take(sums, range(_WINDOW, sums.shape[axis]), axis)
        low = np.take(sums, range(sums.shape[axis] - _WINDOW), axis)
        values = (high - low) / _WINDOW
    return values


if __name__ == "__main__":
    main()
