"""Damaged and hostile images go through the decoder: each a picture or a reason."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from pipeline.decoder import Decoder, Request
from pipeline.images import EncodedImage, ImageError
from pipeline.options import FilterOptions, ImageOptions
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.test_images import bomb, chunk, webp_canvas

REASONS = {
    *("not_an_image", "unreadable", "truncated", "corrupt", "unsupported_mode"),
    *("too_many_pixels", "too_long", "too_large", "too_elongated", "memory_limit"),
}
OPTIONS = ImageOptions(size=32, max_pixels=1 << 22, memory_limit_mb=512)
# What a length, count or offset in a header may be changed to.
EXTREMES = (b"\0\0", b"\xff\xff", b"\x7f\xff", b"\0\1", b"\xff\xd9", b"\xff\0")


def originals() -> list[bytes]:
    """Small files of every format and of the kinds that take another path in it."""
    image = picture(1, (72, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return [
        encoded(image, exif=exif.tobytes(), comment=b"a comment"),
        encoded(image, progressive=True, quality=60),
        encoded(image, subsampling=0, restart_marker_rows=1),
        *(encoded(image.convert(mode)) for mode in ("L", "CMYK")),
        *(
            encoded(image.convert(mode), "PNG")
            for mode in ("RGB", "P", "LA", "1", "I;16")
        ),
        encoded(image.convert("P"), "PNG", transparency=3),
        *(encoded(image.convert(mode), "GIF") for mode in ("P", "L")),
        encoded(image, "GIF", save_all=True, append_images=[picture(2, (72, 48))]),
        *(encoded(image, "WEBP", lossless=lossless) for lossless in (False, True)),
        encoded(image.convert("RGBA"), "WEBP", exif=exif.tobytes()),
        *(encoded(image.convert(mode), "BMP") for mode in ("RGB", "P", "1")),
        encoded(image, "TIFF", exif=exif),
        *(
            encoded(image, "TIFF", compression=kind)
            for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        encoded(image.convert("1"), "TIFF", compression="group4"),
    ]


def cut(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    return data[: generator.integers(0, len(data))]


def flip_bits(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    changed = bytearray(data)
    for place in generator.integers(0, len(data), generator.integers(1, 9)):
        changed[place] ^= 1 << generator.integers(0, 8)
    return bytes(changed)


def damage_header(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    changed = bytearray(data)
    for place in generator.integers(0, min(len(data), 200) - 2, 2):
        changed[place : place + 2] = generator.choice(EXTREMES)
    return bytes(changed)


def fill(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    start, end = sorted(generator.integers(0, len(data) + 1, 2))
    filling = (
        generator.bytes(end - start) if generator.random() < 0.5 else bytes(end - start)
    )
    return data[:start] + filling + data[end:]


def splice(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    place = generator.integers(0, len(data))
    return data[:place] + other[generator.integers(0, len(other)) :]


def repeat(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    start, end = sorted(generator.integers(0, len(data) + 1, 2))
    return data[:end] + data[start:end] * int(generator.integers(1, 20)) + data[end:]


MUTATIONS: tuple[Callable[[bytes, np.random.Generator, bytes], bytes], ...] = (
    *(cut, flip_bits, damage_header, fill, splice, repeat),
)


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged files: every original and mutation in turn, places at random."""
    generator = np.random.default_rng(seed)
    files = originals()
    for number in range(count):
        data = files[number % len(files)]
        mutate = MUTATIONS[number // len(files) % len(MUTATIONS)]
        yield mutate(data, generator, files[generator.integers(len(files))])


def hostile() -> list[bytes]:
    """Files that claim or inflate to far more than they are, and files of no image."""
    end = chunk(b"IEND", b"")
    sound = encoded(picture(1), "PNG")
    tiff = bytearray(encoded(picture(1), "TIFF"))
    directory = struct.unpack("<I", tiff[4:8])[0]
    looped = tiff[:directory] + struct.pack("<H", 0xFFFF) + tiff[directory + 2 :]
    return [
        *(b"", b"\0", bytes(100_000), b"GIF89a", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"),
        *(b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89HDF\r\n\x1a\n", b"8BPS\0\1"),
        *("<html>404</html>".encode("utf-16"), b"text " * 1000, b"MM\0*\0\0\0\x08"),
        *(bomb(1 << 30, 1 << 30), bomb(65_000, 65_000), bomb(2048, 2048), bomb(0, 9)),
        *(webp_canvas(1 << 24, 1 << 24), webp_canvas(2048, 2048), webp_canvas(1, 1)),
        encoded(Image.new("RGB", (2048, 2048)), "PNG"),
        encoded(Image.new("1", (2048, 2048)), "TIFF", compression="group4"),
        sound[:33] + chunk(b"IHDR", sound[16:29]) * 100 + end,
        sound[:33] + chunk(b"tEXt", b"k\0" + b"v" * 1_000_000) * 70 + sound[33:],
        bytes(looped),
    ]


def check(images: list[bytes]) -> Counter[str]:
    """Decode all; how many became what. Every one must have become something."""
    outcomes: Counter[str] = Counter()
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        results = decoder.encode([Request(data=data) for data in images])
        assert len(results) == len(images)
        for result in results:
            if isinstance(result, EncodedImage):
                assert min(result.width, result.height) == 32
                outcomes["image"] += 1
                continue
            assert isinstance(result, ImageError)
            assert result.reason in REASONS
            # An address of an object in a message would differ between runs.
            assert "0x7" not in result.detail
            outcomes[result.reason] += 1
    assert outcomes.total() == len(images)
    return outcomes


def test_a_sample_of_mutants_and_every_hostile_file_has_an_outcome() -> None:
    outcomes = check([*originals(), *hostile(), *mutants(300, seed=1)])
    assert outcomes["image"] >= len(originals())
    assert {"truncated", "unreadable", "not_an_image", "too_many_pixels"} <= {*outcomes}


def test_outcomes_do_not_depend_on_what_came_before() -> None:
    images = list(mutants(100, seed=2))
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        forwards = decoder.encode([Request(data=data) for data in images])
        backwards = decoder.encode([Request(data=data) for data in images[::-1]])[::-1]
    assert [str(each) for each in forwards] == [str(each) for each in backwards]


@pytest.mark.soak
def test_six_thousand_mutants_have_an_outcome() -> None:
    outcomes = check([*hostile(), *mutants(6_000, seed=3)])
    print(dict(outcomes))
    assert outcomes.total() > 6_000
    assert min(outcomes[kind] for kind in ("image", "truncated", "unreadable")) > 100
