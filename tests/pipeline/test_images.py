"""Images of every supported kind become the contract's JPEG; the rest has a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.decoder import Decoder, Request
from pipeline.image_header import _bare_jpeg, read_header
from pipeline.images import FORMATS, EncodedImage, ImageError, encode_image
from pipeline.options import FilterOptions, ImageOptions
from tests.pipeline.corpora import REPOSITORY, encoded, picture

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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_shows_the_same_corner(orientation: int, kind: str) -> None:
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
    data = encoded(stored, kind, exif=exif.tobytes(), quality=100)
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
    data = encoded(red)
    # The colour transform of Adobe's marker says whether the inks are stored as YCCK.
    assert data.count(b"Adobe") == 1
    shown = pixels(encode_image(data, OPTIONS)).mean((0, 1))
    assert shown[0] > 240
    assert shown[1] < 15


def test_ycck_is_what_it_is_to_pillow() -> None:
    inks = picture(4, (64, 48)).convert("CMYK")
    data = bytearray(encoded(inks, quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    shown = pixels(encode_image(bytes(data), ImageOptions(resize="none", format="png")))
    assert np.abs(shown - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_pixels_is_shown_as_pillow_converts_it(mode: str) -> None:
    image = picture(7, (40, 40)).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "PA") else "PNG"
    options = ImageOptions(resize="none", format="png")
    assert (pixels(encode_image(encoded(image, kind), options)) == expected).all()


def test_colour_without_a_rule_has_a_reason() -> None:
    assert reason(encoded(Image.new("LAB", (40, 40)), "TIFF")) == "unsupported_mode"
    assert reason(encoded(Image.new("F", (40, 40)), "TIFF")) == "unsupported_mode"


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


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")]
)
def test_a_huge_image_looks_as_if_resized_at_once(mode: str, kind: str) -> None:
    # No fraction divides these sides: rounding must not shift what is shown.
    image = picture(3, (1603, 1201)).convert(mode)
    options = ImageOptions(size=100, format="png")
    result = encode_image(encoded(image, kind, quality=95), options)
    size = (result.width, result.height)
    reference = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    assert size == (133, 100)
    assert np.abs(pixels(result) - np.asarray(reference)).mean() < 1


def test_smaller_images_are_enlarged_to_the_contract() -> None:
    result = encode_image(encoded(picture(1, (10, 20))), OPTIONS)
    assert (result.width, result.height) == (32, 64)


def test_equal_bytes_in_equal_bytes_out_and_near_images_have_near_hashes() -> None:
    image = picture(5, (200, 160))
    data = encoded(image)
    assert encode_image(data, OPTIONS) == encode_image(data, OPTIONS)
    hashes = [
        int(encode_image(encoded(other), OPTIONS).phash, 16)
        for other in (image, image.resize((150, 120)), picture(6, (200, 160)))
    ]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 4
    assert (hashes[0] ^ hashes[2]).bit_count() > 10


def as_shape(mode: str, size: tuple[int, int], **options: object) -> tuple[int, int]:
    image = encoded(picture(2, size), "PNG")
    result = encode_image(image, ImageOptions(size=32, resize=mode, **options))
    assert Image.open(io.BytesIO(result.data)).size == (result.width, result.height)
    assert (result.original_width, result.original_height) == size
    return result.width, result.height


@pytest.mark.parametrize(
    ("mode", "large", "small", "small_left_alone"),
    [
        ("shorter", (48, 32), (40, 32), (20, 16)),
        ("longer", (32, 21), (32, 26), (20, 16)),
        ("center_crop", (32, 32), (32, 32), (20, 16)),
        ("border", (32, 32), (32, 32), (20, 16)),
        ("none", (96, 64), (20, 16), (20, 16)),
    ],
)
def test_every_resize_mode_gives_the_size_that_it_promises(
    mode: str,
    large: tuple[int, int],
    small: tuple[int, int],
    small_left_alone: tuple[int, int],
) -> None:
    assert as_shape(mode, (96, 64)) == large
    assert as_shape(mode, (64, 96)) == large[::-1]
    assert as_shape(mode, (20, 16)) == small
    assert as_shape(mode, (20, 16), only_if_bigger=True) == small_left_alone
    assert as_shape(mode, (96, 64), only_if_bigger=True) == large


def test_a_crop_takes_the_middle_and_bars_are_white() -> None:
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = (0, 0, 255)
    data = encoded(Image.fromarray(stripes), "PNG")
    options = {"size": 40, "format": "png"}
    middle = pixels(encode_image(data, ImageOptions(resize="center_crop", **options)))
    assert middle.shape == (40, 40, 3)
    # The filter is cut after it was applied: it has seen a little of what is beside.
    assert (middle[:, 6:-6] == (0, 0, 255)).all()
    barred = pixels(encode_image(data, ImageOptions(resize="border", **options)))
    assert (barred[:13] == 255).all()
    assert (barred[27:] == 255).all()
    assert not (barred[14:26] == 255).all(axis=2).any()


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_the_format_is_what_was_asked_for_and_carries_no_metadata(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret"
    data = encoded(picture(1, (90, 60)), exif=exif.tobytes(), comment=b"secret")
    result = encode_image(data, ImageOptions(size=32, format=kind))
    written = Image.open(io.BytesIO(result.data))
    assert written.format == {"jpg": "JPEG"}.get(kind, kind.upper())
    assert b"secret" not in result.data
    assert "secret" in result.exif


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("more", [{}, {"comment": b"c"}, {"exif": b"Exif\0\0"}])
def test_a_header_is_read_without_pillow_where_it_says_nothing_else(
    mode: str, progressive: bool, more: dict[str, bytes]
) -> None:
    image = picture(1, (90, 60)).convert(mode)
    data = encoded(image, progressive=progressive, **more)
    known = Image.open(io.BytesIO(data))
    bare = _bare_jpeg(data)
    assert (bare is None) == (mode == "CMYK" or "exif" in more)
    for header in (read_header(data, OPTIONS), *([bare] if bare else ())):
        assert (header.size, header.mode) == (known.size, known.mode)
        assert (header.image, header.orientation, header.exif) == (None, 1, "{}")
        assert (header.profile, header.inverted) == (None, mode == "CMYK")
    # Where the file ends early, Pillow says why.
    assert all(
        _bare_jpeg(data[:end]) is None for end in range(0, data.index(b"\xff\xda"))
    )


def test_pixels_are_hashed_only_where_that_is_asked_for() -> None:
    data = encoded(picture(1, (90, 60)))
    whole = encode_image(data, OPTIONS)
    for hash_pixels in (True, False):
        with Decoder(OPTIONS, FilterOptions(), hash_pixels=hash_pixels) as decoder:
            (found,) = decoder.encode([Request(data=data)])
        expected = whole.pixels_sha256 if hash_pixels else None
        assert found == dataclasses.replace(whole, pixels_sha256=expected)


def test_the_pixel_hash_is_of_the_written_pixels_and_their_shape() -> None:
    options = ImageOptions(size=32, format="png")
    result = encode_image(encoded(picture(1, (90, 60))), options)
    shown = np.asarray(Image.open(io.BytesIO(result.data)))
    start = b"%d %d " % (result.width, result.height)
    digest = hashlib.sha256(start + shown.tobytes()).hexdigest()
    assert result.pixels_sha256 == digest
    flat = [encoded(Image.new("RGB", size), "PNG") for size in ((64, 32), (32, 64))]
    hashes = {encode_image(data, OPTIONS).pixels_sha256 for data in flat}
    assert len(hashes) == 2


_WITHOUT_SIMD = """
import sys
from cykooz_resizer import CpuExtensions
from pipeline import resize
from pipeline.images import encode_image
from pipeline.options import ImageOptions
resize._resizer().cpu_extensions = CpuExtensions.none
with open(sys.argv[1], "rb") as file:
    print(encode_image(file.read(), ImageOptions(size=100)))
"""


@pytest.mark.parametrize("size", [(160, 120), (640, 480)])
def test_bytes_are_the_same_without_simd_instructions(
    size: tuple[int, int], tmp_path: os.PathLike[str]
) -> None:
    noise = np.random.default_rng(0).normal(0, 9, (size[1], size[0], 3))
    image = np.asarray(picture(9, size)) + noise
    data = encoded(Image.fromarray(image.clip(0, 255).astype(np.uint8)))
    path = os.path.join(tmp_path, "image.jpg")
    with open(path, "wb") as file:
        file.write(data)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_SIMD, path],
        cwd=REPOSITORY,
        env={**os.environ, "JSIMD_FORCENONE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(encode_image(data, ImageOptions(size=100)))


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def webp_canvas(width: int, height: int) -> bytes:
    """A WebP with the canvas that it claims and a picture of 8 x 8."""
    still = encoded(picture(1, (8, 8)), "WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides + still
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert reason(bomb(60_000, 60_000)) == "too_many_pixels"
    few = ImageOptions(size=32, max_pixels=9_999)
    assert reason(bomb(100, 100), few) == "too_many_pixels"
    assert reason(bomb(100, 100)) != "too_many_pixels"
    assert reason(webp_canvas(16_000, 16_000)) == "too_many_pixels"
    gif = bytearray(encoded(picture(1), "GIF"))
    gif[6:10] = b"\xff" * 4
    assert reason(bytes(gif)) == "too_many_pixels"


def test_limits_of_sides_and_bytes_hold_before_decoding() -> None:
    assert reason(bomb(70_000, 10)) == "too_long"
    assert reason(bomb(10, 101), ImageOptions(size=32, max_side=100)) == "too_long"
    assert reason(bomb(10, 10), ImageOptions(size=32, max_bytes=50)) == "too_large"


def test_a_profile_that_inflates_beyond_reason_is_refused() -> None:
    data = encoded(picture(1), "PNG")
    profile = b"x\0\0" + zlib.compress(bytes(16 << 20))
    assert reason(data[:33] + chunk(b"iCCP", profile) + data[33:]) == "unreadable"


def test_a_sliver_is_refused_unless_it_is_cut() -> None:
    sliver = encoded(Image.new("RGB", (1, 5000)), "PNG")
    assert reason(sliver) == "too_elongated"
    assert encode_image(sliver, ImageOptions(size=32, resize="center_crop")).width == 32


def noisy(kind: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), kind, **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_file_is_refused(kind: str) -> None:
    data = noisy(kind)
    for share in (0.1, 0.5, 0.9):
        found = reason(data[: int(len(data) * share)])
        assert found in ("truncated", "unreadable", "not_an_image")


def smooth_pngs() -> list[bytes]:
    ramp = np.add.outer(np.arange(200), np.arange(300)) // 2
    image = Image.fromarray(np.stack([ramp] * 3, axis=2).astype(np.uint8))
    return [encoded(image, "PNG"), encoded(image.convert("P"), "PNG")]


@pytest.mark.parametrize("data", [noisy("PNG"), *smooth_pngs()])
def test_a_png_whose_pixels_are_damaged_is_refused(data: bytes) -> None:
    """Pillow decodes while it looks for EXIF, would give half an image later, and asks
    for no checksum."""
    start = data.index(b"IDAT") + 4
    for place in range(start, len(data) - 24, max(1, (len(data) - start) // 60)):
        flipped = bytearray(data)
        flipped[place] ^= 4
        assert reason(bytes(flipped)) == "unreadable"
        assert reason(data[:place] + b"damaged" + data[place + 7 :]) == "unreadable"


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"zTXt", b"words\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"iCCP", b"name\0\7rubbish"),
        chunk(b"gAMA", b"\0"),
        chunk(b"tEXt", b"cut short")[:-6],
    ],
)
def test_what_is_broken_behind_a_pngs_pixels_costs_no_pixel(broken: bytes) -> None:
    data = noisy("PNG")
    longer = data[:-12] + broken + data[-12:]
    assert encode_image(longer, OPTIONS).data == encode_image(data, OPTIONS).data


def test_failures_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "a detail")))
    assert (error.reason, error.detail) == ("truncated", "a detail")
    assert str(error) == "truncated: a detail"


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
