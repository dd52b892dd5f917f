"""Images of every supported kind become the contract's JPEG; the rest has a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.images import FORMATS, EncodedImage, ImageError, encode_image
from pipeline.options import ImageOptions
from tests.pipeline.corpora import encoded, picture

OPTIONS = ImageOptions(size=32)


def pixels(result: EncodedImage) -> np.ndarray:
    """Decoded (height, width, 3) int16 pixels."""
    return np.asarray(Image.open(io.BytesIO(result.data))).astype(np.int16)


def reason(data: bytes, options: ImageOptions = OPTIONS) -> str:
    with pytest.raises(ImageError) as caught:
        encode_image(data, options)
    return caught.value.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_picture(kind: str) -> None:
    image = picture(1, (64, 48))
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    result = encode_image(encoded(image, kind, **options), OPTIONS)
    assert (result.width, result.height) == (43, 32)
    reference = pixels(encode_image(encoded(image, "PNG"), OPTIONS))
    # A GIF has 256 colours.
    assert np.abs(pixels(result) - reference).mean() < (12 if kind == "GIF" else 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_shows_the_same_corner(orientation: int) -> None:
    upright = np.full((40, 64, 3), 128, np.uint8)
    upright[:20, :32] = (255, 0, 0)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    data = encoded(stored, exif=exif.tobytes(), quality=100)
    result = encode_image(data, OPTIONS)
    assert (result.original_width, result.original_height) == (64, 40)
    shown = pixels(result)
    red = (shown[..., 0] - shown[..., 1]) > 120
    assert red[2:12, 2:20].all()
    assert not red[20:].any()
    assert not red[:, 30:].any()


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    data = encoded(picture(1), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert encode_image(data, OPTIONS).width == 48


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert pixels(encode_image(encoded(image, "PNG"), OPTIONS)).min() > 250
    palette = Image.new("P", (40, 40), 0)
    data = encoded(palette, "PNG", transparency=0)
    assert pixels(encode_image(data, OPTIONS)).min() > 250


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65_535, 64).astype(np.uint16), (64, 1))
    shown = pixels(encode_image(encoded(Image.fromarray(ramp), "PNG"), OPTIONS))
    assert shown[16, 0, 0] < 10
    assert abs(int(shown[16, 16, 0]) - 130) < 12
    assert shown[16, -1, 0] > 245


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    shown = pixels(encode_image(encoded(red), OPTIONS)).mean((0, 1))
    assert shown[0] > 240
    assert shown[1] < 15


def profile_with_red_and_green_exchanged() -> bytes:
    """sRGB under another name, the offsets of two of its tags exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(
        srgb.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    )
    red, green = (data.index(tag) + 4 for tag in (b"rXYZ", b"gXYZ"))
    data[red : red + 8], data[green : green + 8] = (
        data[green : green + 8],
        data[red : red + 8],
    )
    return bytes(data)


def test_an_embedded_profile_is_applied_and_dropped() -> None:
    image = Image.new("RGB", (40, 40), (200, 30, 30))
    profile = profile_with_red_and_green_exchanged()
    result = encode_image(encoded(image, icc_profile=profile), OPTIONS)
    assert abs(pixels(result).mean((0, 1)) - (30, 200, 30)).max() < 6
    assert "icc_profile" not in Image.open(io.BytesIO(result.data)).info


def test_a_profile_of_another_kind_does_not_cost_the_image() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (40, 40), (200, 30, 30))
    for profile in (lab, b"nonsense"):
        result = encode_image(encoded(image, icc_profile=profile), OPTIONS)
        assert abs(pixels(result).mean((0, 1)) - (200, 30, 30)).max() < 4


def test_a_huge_jpeg_is_decoded_small_and_looks_the_same() -> None:
    image = picture(3, (1600, 1200))
    small = pixels(encode_image(encoded(image, quality=95), OPTIONS))
    reference = pixels(encode_image(encoded(image, "PNG"), OPTIONS))
    assert small.shape == reference.shape
    assert np.abs(small - reference).mean() < 3


def test_smaller_images_are_enlarged_to_the_contract() -> None:
    result = encode_image(encoded(picture(1, (10, 20))), OPTIONS)
    assert (result.width, result.height) == (32, 64)


def test_equal_bytes_in_equal_bytes_out_and_near_images_have_near_hashes() -> None:
    image = picture(5, (200, 160))
    data = encoded(image)
    assert encode_image(data, OPTIONS) == encode_image(data, OPTIONS)
    hashes = [
        int(encode_image(encoded(other), OPTIONS).dhash, 16)
        for other in (image, image.resize((150, 120)), picture(6, (200, 160)))
    ]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 4
    assert (hashes[0] ^ hashes[2]).bit_count() > 10


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert reason(bomb(60_000)) == "too_many_pixels"
    assert (
        reason(bomb(100), ImageOptions(size=32, max_pixels=9_999)) == "too_many_pixels"
    )
    assert reason(bomb(100)) != "too_many_pixels"


def test_a_sliver_is_refused() -> None:
    assert reason(encoded(Image.new("RGB", (1, 5000)), "PNG")) == "too_elongated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_cut_file_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert reason(data[: len(data) // 2]) in ("truncated", "unreadable", "not_an_image")


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_bytes_are_not_an_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


def grey_tiff(mode: str) -> bytes:
    if mode == "I;16":
        ramp = np.tile(np.linspace(0, 65_535, 40).astype(np.uint16), (40, 1))
        return encoded(Image.fromarray(ramp), "TIFF")
    return encoded(picture(8).convert(mode), "TIFF")


def with_two_photometrics(data: bytes) -> bytes:
    """A little-endian TIFF whose tag 262, photometric interpretation, has two values:
    Pillow then names the tag and has none for it.
    """
    tags = struct.unpack("<I", data[4:8])[0]
    place = data.index(struct.pack("<HHI", 262, 3, 1), tags) + 4
    return data[:place] + struct.pack("<I", 2) + data[place + 4 :]


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_a_damaged_tag_of_a_tiff_does_not_cost_the_image(mode: str) -> None:
    result = encode_image(with_two_photometrics(grey_tiff(mode)), OPTIONS)
    assert min(result.width, result.height) == 32
    assert "PhotometricInterpretation" not in result.exif
    assert "ImageWidth" in result.exif


def test_nothing_but_image_error_comes_out_of_damaged_files() -> None:
    generator = np.random.default_rng(7)
    details = []
    originals = [encoded(picture(8), kind) for kind in FORMATS]
    originals += [grey_tiff(mode) for mode in ("L", "1", "I;16")]
    for original in originals:
        whole = np.frombuffer(original, np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(0, len(whole), 8)
            damaged[places] = generator.integers(0, 256, 8)
            try:
                result = encode_image(damaged.tobytes(), OPTIONS)
            except ImageError as error:
                details.append(error.detail)
                continue
            assert min(result.width, result.height) == 32
    # An object's address in a message would differ between runs.
    assert details
    assert not [detail for detail in details if "0x7" in detail]
