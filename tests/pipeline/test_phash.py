"""Near-equal pictures have near hashes, unrelated ones do not, flat ones have none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.images import encode_image
from pipeline.options import ImageOptions
from pipeline.phash import SIDE, perceptual_hashes
from tests.pipeline.corpora import encoded

OPTIONS = ImageOptions(size=64)


def photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Noise of every scale, the coarser the stronger, as photographs have it."""
    total = np.zeros((*size[::-1], 3))
    for place, cells in enumerate((3, 6, 12, 24, 48)):
        noise = np.random.default_rng((seed, place)).random((cells, cells, 3))
        image = Image.fromarray((noise * 255).astype(np.uint8)).resize(size)
        total += np.asarray(image, float) / 1.6**place
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def hash_of(image: Image.Image, **options: object) -> int:
    return int(encode_image(encoded(image, **options), OPTIONS).phash, 16)


def of(thumbnail: np.ndarray) -> str:
    return perceptual_hashes([thumbnail.tobytes()])[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_same_picture_smaller_or_recompressed_is_near(seed: int) -> None:
    image = photo(seed)
    first = hash_of(image)
    for other in (
        hash_of(image.resize((200, 150))),
        hash_of(image, quality=30),
        hash_of(image.convert("L")),
    ):
        assert (first ^ other).bit_count() <= 4


def test_unrelated_pictures_are_far() -> None:
    hashes = [hash_of(photo(seed)) for seed in range(24)]
    far = [(a ^ b).bit_count() for a in hashes for b in hashes if a != b]
    assert len(far) == 24 * 23
    assert min(far) > 8


def test_pictures_of_one_layout_differ() -> None:
    """Objects in the middle of a white ground: what a difference hash takes for one."""
    hashes = []
    for seed in range(6):
        page = Image.new("RGB", (240, 320), "white")
        page.paste(photo(seed, (120, 160)), (60, 80))
        hashes.append(hash_of(page))
    far = [(a ^ b).bit_count() for a in hashes for b in hashes if a is not b]
    assert min(far) > 4


def test_brightness_and_one_colour_say_nothing() -> None:
    flat = np.full((SIDE, SIDE, 3), 130, np.uint8)
    assert of(flat) == "0" * 16
    noise = np.random.default_rng(1).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    assert of(noise) == of(noise + 50)


def test_the_hash_of_a_known_picture_never_changes() -> None:
    """Stored in every dataset, and compared across them."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([x * 7 % 256, (x * y) % 251, y * y % 239], axis=-1)
    assert of(pixels.astype(np.uint8)) == KNOWN


def test_a_hash_does_not_depend_on_its_company() -> None:
    draw = np.random.default_rng(2)
    pixels = draw.integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)
    assert perceptual_hashes([one.tobytes() for one in pixels]) == [*map(of, pixels)]
    assert perceptual_hashes([]) == []


KNOWN = "7cf1c6d992a42a50"
