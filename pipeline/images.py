"""One image: encoded bytes of any supported format in, what is written out.

Owns the chain: header and limits, decoding, size, colour, orientation, encoding. Its
steps live in `pipeline.image_header` (limits, and a table of every failure's reason),
`pipeline.jpeg`, `pipeline.colour` and `pipeline.resize`. Does not own limits of time
and memory (`pipeline.decoder`), where bytes come from (`pipeline.fetch`) or where they
go (`pipeline.shards`). Pure functions of (bytes, options): law 4 rests on that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, features

from pipeline import colour, jpeg, resize
from pipeline.image_header import FORMATS, Header, ImageError, read_header, unreadable
from pipeline.options import ImageOptions
from pipeline.phash import SIDE, perceptual_hashes

# Raised where any image comes out otherwise than before, or with another reason.
_CHAIN = "2"

__all__ = [
    "FORMATS",
    "EncodedImage",
    "ImageError",
    "Picture",
    "codec_versions",
    "decode_image",
    "encode_image",
    "encode_picture",
]


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it is written, and what is worth knowing about its source."""

    data: bytes
    """The file, in `image.format`."""
    width: int
    height: int
    original_width: int
    """Of the source as a viewer shows it: orientation applied."""
    original_height: int
    exif: str
    """JSON text of the source's main EXIF tags; `{}` without any."""
    thumbnail: bytes
    """RGB averaged to 32 x 32 pixels: what the perceptual hash is made of."""
    pixels_sha256: str | None
    """Hex, of width, height and the written pixels before they were encoded; None where
    nobody asked for it."""

    @property
    def phash(self) -> str:
        """64-bit perceptual hash, 16 hex digits: near-equal images differ in few bits.
        Of many images at once: `pipeline.phash.perceptual_hashes`.
        """
        return perceptual_hashes([self.thumbnail])[0]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded image that is about to be encoded."""

    pixels: np.ndarray
    """As written: sRGB on white, uint8 (height, width, 3), contiguous."""
    header: Header
    kept: bytes | None
    """The finished file, where the source's coefficients stay as they are."""

    def image(self) -> Image.Image:
        """The pixels for Pillow: a copy."""
        return Image.fromarray(self.pixels)


def encode_image(data: bytes, options: ImageOptions) -> EncodedImage:
    """Decode, resize, convert to sRGB on white, orient, and encode.

    Raises:
        ImageError: with the reason code of the failure.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_picture(decode_image(data, options), options)


def decode_image(
    data: bytes | memoryview,
    options: ImageOptions,
    check: Callable[[int, int], None] = lambda width, height: None,
) -> Picture:
    """Everything but the encoding. `check` is called with the source's width and
    height, orientation applied, before anything but a PNG is decoded; its exceptions
    pass.

    Raises:
        ImageError: with the reason code of the failure.
    """
    header = read_header(data, options)
    check(*header.shown_size)
    geometry = resize.plan_geometry(header.size, options)
    pixels, strict = _pixels(data, header, geometry)
    pixels = resize.oriented(pixels, header.orientation)
    if geometry.pad:
        pixels = resize.padded(pixels)
    kept = None
    if strict and not geometry.changes(header.size):
        kept = _kept(data, header, options)
    return Picture(pixels=pixels, header=header, kept=kept)


def encode_picture(
    picture: Picture, options: ImageOptions, *, hash_pixels: bool = True
) -> EncodedImage:
    """The file of a decoded image, and its hashes.

    Raises:
        ImageError: the encoder of `image.format` refuses it.
    """
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    original_width, original_height = picture.header.shown_size
    return EncodedImage(
        data=picture.kept or _encoded(pixels, options),
        width=width,
        height=height,
        original_width=original_width,
        original_height=original_height,
        exif=picture.header.exif,
        thumbnail=resize.thumbnail(pixels, SIDE).tobytes(),
        pixels_sha256=_pixels_sha256(pixels) if hash_pixels else None,
    )


def _pixels_sha256(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    # Flat images of different shapes have the same pixels.
    digest = hashlib.sha256(b"%d %d " % (width, height))
    digest.update(pixels.data)
    return digest.hexdigest()


def codec_versions() -> dict[str, str]:
    """Versions of everything that decides pixels, this chain's own included; part of
    the transform hash."""
    names = ("jpg", "libjpeg_turbo", "webp", "zlib", "libtiff", "littlecms2")
    packages = ("simplejpeg", "cykooz.resizer")
    return {
        "decode_chain": _CHAIN,
        "pillow": Image.__version__,
        **{name: features.version(name) or "none" for name in names},
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _pixels(
    data: bytes | memoryview, header: Header, geometry: resize.Geometry
) -> tuple[np.ndarray, bool]:
    """RGB pixels at their size, and whether a strict decoder vouches for them."""
    try:
        image = header.image
        if image is None:
            pixels = jpeg.decode_strictly(data, header, geometry.target)
            if pixels is not None:
                return _jpeg_pixels(pixels, header, geometry), True
            image = jpeg.decode_tolerantly(bytes(data), header)
        else:
            image.load()
        # Colour first: alpha must be gone before neighbours are mixed.
        size = image.size
        image, fraction = resize.reduced(colour.image_to_rgb(image), geometry.target)
        return resize.resized(np.asarray(image), size, fraction, geometry), False
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything on hostile data
        raise unreadable(error) from error


def _jpeg_pixels(
    pixels: np.ndarray, header: Header, geometry: resize.Geometry
) -> np.ndarray:
    # Size first: colour is converted for as few pixels as possible.
    fraction = jpeg.dct_fraction(header.size, geometry.target)
    return colour.jpeg_to_rgb(
        resize.resized(pixels, header.size, fraction, geometry),
        header.profile,
        inverted=header.inverted,
    )


def _kept(
    data: bytes | memoryview, header: Header, options: ImageOptions
) -> bytes | None:
    """The source without its metadata, where that is what would be written."""
    if options.format != "jpg" or options.reencode or header.orientation != 1:
        return None
    if not jpeg.is_plain(data) or not colour.is_srgb(header.profile, "RGB"):
        return None
    return jpeg.without_metadata(bytes(data))


def _encoded(pixels: np.ndarray, options: ImageOptions) -> bytes:
    try:
        if options.format == "jpg":
            return simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "420")
        file = io.BytesIO()
        image = Image.fromarray(pixels)
        if options.format == "png":
            image.save(file, "PNG", compress_level=min(options.quality, 9))
        else:
            image.save(file, "WEBP", quality=options.quality)
        return file.getvalue()
    except (OSError, ValueError) as error:
        raise unreadable(error) from error
