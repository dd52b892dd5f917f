"""Every kind of pixels is shown as its profile and transparency say, whatever it is."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.colour import is_srgb
from pipeline.images import encode_image
from pipeline.options import ImageOptions
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.test_images import chunk

OPTIONS = ImageOptions(resize="none", format="png")
# What the linear profile makes of a grey of 90.
DARK, SHOWN = 90, 160
_PRIMARIES = {
    b"rXYZ": (0.43607, 0.22249, 0.01392),
    b"gXYZ": (0.38515, 0.71687, 0.09708),
    b"bXYZ": (0.14307, 0.06061, 0.71410),
}
_WHITE_POINT = (0.9642, 1.0, 0.8249)


def linear_profile(space: bytes, name: bytes = b"linear") -> bytes:
    """An ICC profile of version 2 with curves that are straight."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return struct.pack(">4s4x3i", b"XYZ ", *(round(v * 65536) for v in values))

    curve = struct.pack(">4s4xI", b"curv", 0)
    text = struct.pack(">4s4xI", b"desc", len(name) + 1) + name + bytes(1 + 12 + 67)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz(_WHITE_POINT)}
    if space == b"RGB ":
        tags |= {tag: xyz(values) for tag, values in _PRIMARIES.items()}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags[b"kTRC"] = curve
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, place + len(body), len(data))
        body += data
    size = place + len(body)
    kinds = struct.pack(
        ">I4sI4s4s4s", size, b"test", 0x02100000, b"mntr", space, b"XYZ "
    )
    dates = struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp")
    white = b"".join(struct.pack(">i", round(v * 65536)) for v in _WHITE_POINT)
    head = (kinds + dates).ljust(68, b"\0") + white
    return head.ljust(128, b"\0") + table + body


def shown(data: bytes) -> np.ndarray:
    """What is written of an image, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(encode_image(data, OPTIONS).data)))


def of_kind(mode: str) -> Image.Image:
    """A flat grey picture."""
    grey = Image.new("L", (24, 16), DARK)
    if mode == "I;16":
        return Image.fromarray(np.full((16, 24), DARK * 257, np.uint16))
    if mode == "P":
        return grey.convert("RGB").quantize(4)
    return grey.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB", "RGBA", "P"])
def test_a_profile_is_applied_to_every_kind_of_pixels(mode: str, kind: str) -> None:
    space = b"RGB " if mode in ("RGB", "RGBA", "P") else b"GRAY"
    image = of_kind(mode)
    assert np.all(shown(encoded(image, kind)) == DARK)
    found = shown(encoded(image, kind, icc_profile=linear_profile(space)))
    assert np.abs(found.astype(int) - SHOWN).max() <= 1


def test_a_profile_is_known_by_what_it_does_and_not_by_its_name() -> None:
    named = linear_profile(b"RGB ", b"sRGB-elle-V2-g10.icc")
    assert not is_srgb(named, "RGB")
    found = shown(encoded(of_kind("RGB"), "PNG", icc_profile=named))
    assert np.abs(found.astype(int) - SHOWN).max() <= 1
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert is_srgb(own, "RGB")
    assert is_srgb(own.replace(b"s\0R\0G\0B", b"x\0y\0z\0w"), "RGB")


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_transparent_of_a_grey_png_is_white(bits: int) -> None:
    scale = 257 if bits == 16 else 1
    values = np.full((16, 24), DARK * scale, f">u{bits // 8}")
    values[:8] = 200 * scale
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 24, 16, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 200 * scale))
    parts += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = shown(b"\x89PNG\r\n\x1a\n" + parts)
    assert (found[:8] == 255).all()
    assert (found[8:] == DARK).all()


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_tiff_whose_white_is_0_is_no_negative(mode: str) -> None:
    data = encoded(of_kind(mode), "TIFF")
    tags = struct.unpack("<I", data[4:8])[0]
    place = data.index(struct.pack("<HHI", 262, 3, 1), tags) + 8
    negative = data[:place] + struct.pack("<H", 0) + data[place + 2 :]
    assert (shown(data) == DARK).all()
    assert (shown(negative) == 255 - DARK).all()


def test_pixels_of_unknown_scale_are_refused() -> None:
    numbers = Image.fromarray(np.full((16, 24), 200, np.int32))
    with pytest.raises(Exception, match="unsupported_mode"):
        encode_image(encoded(numbers, "TIFF"), OPTIONS)


@pytest.mark.parametrize("tag", [b"zTXt", b"iCCP"])
def test_megabytes_of_metadata_do_not_cost_a_png(tag: bytes) -> None:
    data = encoded(picture(1), "PNG")
    large = chunk(tag, b"x\0\0" + zlib.compress(bytes(3 << 20)))
    whole = data[:33] + large + data[33:]
    assert np.array_equal(shown(whole), shown(data))
