"""JPEGs: fractions, coefficients that are kept, damage that no decoder may hide."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.image_header import read_header
from pipeline.images import encode_image
from pipeline.jpeg import dct_fraction, decode_strictly
from pipeline.options import ImageOptions
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.test_images import OPTIONS, noisy, reason


def test_a_jpeg_that_fits_keeps_its_coefficients_and_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret"
    extras = {"exif": exif.tobytes(), "comment": b"secret", "subsampling": "4:2:0"}
    data = encoded(picture(5, (48, 32)), quality=80, **extras) + b"trailing secret"
    result = encode_image(data, OPTIONS)
    assert b"secret" not in result.data
    assert np.array_equal(
        simplejpeg.decode_jpeg(result.data), simplejpeg.decode_jpeg(data)
    )
    scan = data.index(b"\xff\xda")
    assert (
        data[scan : -len(b"trailing secret")]
        == result.data[-len(data) :][result.data.index(b"\xff\xda") :]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0"},
        {"subsampling": "4:4:4", "keep_rgb": True},
    ],
)
def test_other_jpegs_are_encoded_anew(options: dict[str, object]) -> None:
    data = encoded(picture(5, (48, 32)), **{"subsampling": "4:2:0", **options})
    result = encode_image(data, ImageOptions(size=32, quality=90))
    assert result == encode_image(
        data, ImageOptions(size=32, quality=90, reencode=True)
    )
    written = Image.open(io.BytesIO(result.data))
    assert "progressive" not in written.info
    assert simplejpeg.decode_jpeg_header(result.data)[2:] == ("YCbCr", "420")


def test_reencode_is_obeyed() -> None:
    data = encoded(picture(5, (48, 32)), quality=60, subsampling="4:2:0")
    kept = encode_image(data, OPTIONS)
    anew = encode_image(data, ImageOptions(size=32, reencode=True))
    assert len(anew.data) > len(kept.data)
    assert anew.pixels_sha256 == kept.pixels_sha256


@pytest.mark.parametrize(
    ("size", "fraction"),
    [((63, 63), 1), ((64, 99), 2), ((127, 64), 2), ((128, 128), 4), ((999, 257), 8)],
)
def test_jpegs_at_least_twice_as_large_are_decoded_at_a_fraction(
    size: tuple[int, int], fraction: int
) -> None:
    assert dct_fraction(size, (32, 32)) == fraction
    data = encoded(picture(3, size))
    decoded = decode_strictly(data, read_header(data, OPTIONS), (32, 32))
    assert decoded is not None
    assert decoded.shape[:2] == (-(-size[1] // fraction), -(-size[0] // fraction))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_whose_data_end_early_is_refused(options: dict[str, object]) -> None:
    data = noisy("JPEG", **options)
    scan = data.rindex(b"\xff\xda")
    early = data[: (scan + len(data)) // 2].rstrip(b"\xff") + b"\xff\xd9"
    assert reason(early) == "truncated"
    assert reason(early[:-2]) == "truncated"
    # Bytes between segments are what the strict decoder refuses and browsers ignore.
    place = data.index(b"\xff\xda")
    complaint = data[:place] + b"junk" + data[place:]
    whole = ImageOptions(resize="none", format="png")
    result = encode_image(complaint, whole)
    assert result == encode_image(data, whole)
    # A thumbnail has scans and ends of its own.
    thumbnail = struct.pack(">BBH", 0xFF, 0xE5, len(data) + 2) + data
    assert encode_image(data[:2] + thumbnail + complaint[2:], whole) == result
    assert reason(early[:place] + b"junk" + early[place:]) == "truncated"


def test_a_jpeg_whose_data_contradict_themselves_is_refused() -> None:
    data = bytearray(noisy("JPEG", quality=100, restart_marker_rows=1))
    first = data.index(b"\xff\xd0")
    data[first + 1] = 0xD5
    assert reason(bytes(data)) == "corrupt"


@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_blocks": 3}, {"progressive": True}]
)
def test_whatever_a_strict_decoder_hears_of_damaged_data_refuses_the_jpeg(
    options: dict[str, object],
) -> None:
    data = noisy("JPEG", quality=90, **options)
    scan = data.index(b"\xff\xda") + 16
    chance = np.random.default_rng(5)
    heard = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(chance.integers(scan, len(data) - 2))] ^= 1 << chance.integers(8)
        try:
            simplejpeg.decode_jpeg(bytes(damaged))
        except ValueError:
            heard += 1
            # Nor does a harmless complaint that comes first hide it.
            place = data.index(b"\xff\xda")
            junk = bytes(damaged[:place]) + b"junk" + bytes(damaged[place:])
            for image in (bytes(damaged), junk):
                assert reason(image) in ("corrupt", "truncated", "unreadable")
    assert heard > 10


@pytest.mark.parametrize("padding", [b"\0" * 300, b"\xaa", b"\xff" * 9])
def test_padding_before_the_end_does_no_harm(padding: bytes) -> None:
    data = noisy("JPEG")
    assert data.endswith(b"\xff\xd9")
    whole = ImageOptions(resize="none", format="png")
    padded = data[:-2] + padding + data[-2:]
    assert encode_image(padded, whole) == encode_image(data, whole)


def test_a_hole_is_no_padding() -> None:
    data = noisy("JPEG")
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    assert reason(data[:middle] + b"\0" * 40_000 + data[-2:]) == "corrupt"
