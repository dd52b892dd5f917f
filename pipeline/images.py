"""One image: encoded bytes of any supported format in, the contract's JPEG out.

Owns decoding, orientation, colour, size, encoding and the reason of every failure.
Does not own where bytes come from (`pipeline.sources`) or where they go
(`pipeline.shards`). Pure functions of (bytes, options): law 4 rests on that.
"""

from __future__ import annotations

import functools
import io
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from pipeline.options import ImageOptions

# Formats with a maintained decoder and no external interpreter behind it (Pillow hands
# EPS to Ghostscript, for one).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# libjpeg refuses sides above this.
_MAX_JPEG_SIDE = 65_500
_WHITE = (255, 255, 255, 255)
_EXIF_TEXT = 256


class ImageError(Exception):
    """An image that cannot be used. `reason` is the code it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """A JPEG as the contract wants it, and what is worth knowing about its source."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    """Of the source as a viewer shows it: orientation applied."""
    original_height: int
    exif: str
    """JSON text of the source's main EXIF tags; `{}` without any."""
    dhash: str
    """64-bit difference hash, 16 hex digits: near-equal images differ in few bits."""


def encode_image(data: bytes, options: ImageOptions) -> EncodedImage:
    """Decode, orient, convert to sRGB on white, resize, and encode as baseline JPEG.

    Raises:
        ImageError: with the reason code of the failure.
    """
    # The header check below is the limit; Pillow's own is a fixed one.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = _open(data)
        stored = source.size
        _check_size(stored, options)
        exif = _exif(source)
        exif_text = _exif_text(exif)
        image = _resized(_decoded(source, options.size), stored, options)
    image, turned = _oriented(image, exif)
    original = stored[::-1] if turned else stored
    return EncodedImage(
        jpeg=_jpeg(image, options.quality),
        width=image.width,
        height=image.height,
        original_width=original[0],
        original_height=original[1],
        exif=exif_text,
        dhash=_dhash(image),
    )


def codec_versions() -> dict[str, str]:
    """Versions of everything that decides pixels; part of the transform hash."""
    names = ("jpg", "libjpeg_turbo", "webp", "zlib", "libtiff", "littlecms2")
    found = {name: features.version(name) or "none" for name in names}
    return {"pillow": Image.__version__, **found}


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError("not_an_image", f"none of {known}") from None
    except Exception as error:  # decoders raise anything on a hostile header
        raise _unreadable(error) from error


def _check_size(size: tuple[int, int], options: ImageOptions) -> None:
    """Refuse by the header alone, before any pixel is decoded."""
    width, height = size
    if width * height > options.max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height}")
    if not width or not height:
        raise ImageError("unreadable", f"{width}x{height} pixels")
    new_width, new_height = _target(size, options.size)
    too_long = max(new_width, new_height) > _MAX_JPEG_SIDE
    if too_long or new_width * new_height > options.max_pixels:
        raise ImageError("too_elongated", f"{width}x{height}")


def _decoded(image: Image.Image, size: int) -> Image.Image:
    """Pixels as RGB on white, in the colour space of the file.

    JPEGs much larger than needed are decoded at a fraction of their size in the DCT
    domain: the largest single saving, and a good antialiasing filter.
    """
    try:
        if image.format in ("JPEG", "MPO"):
            image.draft(None, _target(image.size, size))
        image.load()
        return _on_white(_to_srgb(image))
    except ImageError:
        raise
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "unreadable"
        raise _unreadable(error, reason) from error
    except Exception as error:  # decoders raise anything on hostile data
        raise _unreadable(error) from error


def _unreadable(error: Exception, reason: str = "unreadable") -> ImageError:
    # Some messages print an object with its address, which no two runs share.
    return ImageError(reason, re.sub(r"0x[0-9a-f]+", "0x", str(error)))


def _target(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Size with the shorter side at `shorter`, the other rounded half up."""
    width, height = size
    low = min(width, height)
    return (
        max(shorter, (2 * width * shorter + low) // (2 * low)),
        max(shorter, (2 * height * shorter + low) // (2 * low)),
    )


def _resized(
    image: Image.Image, stored: tuple[int, int], options: ImageOptions
) -> Image.Image:
    # The target follows the stored size: draft decoding rounds its sides up.
    target = _target(stored, options.size)
    if image.size == target:
        return image
    return image.resize(target, Image.Resampling.BICUBIC)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; a profile that does not parse is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    transform = _profile_transform(profile, image.mode, mode)
    if transform is None:
        return image
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=64)
def _profile_transform(
    profile: bytes, from_mode: str, to_mode: str
) -> ImageCms.ImageCmsTransform | None:
    """Transform of a profile to sRGB, or None where there is nothing to do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, from_mode, to_mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips instead of scaling.
        grey = np.asarray(image).astype(np.int64).clip(0, 65_535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("unsupported_mode", "floating-point pixels have no white")
    if not image.has_transparency_data:
        # Converting to the same mode copies every pixel.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, _WHITE)
    return Image.alpha_composite(white, rgba).convert("RGB")


def _exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # a broken EXIF block does not make the pixels unusable
        return Image.Exif()


def _oriented(image: Image.Image, exif: Image.Exif) -> tuple[Image.Image, bool]:
    """The image as a viewer shows it, and whether its sides were exchanged."""
    # Only the tag, in a block of its own: the rest of a source's EXIF may be damaged.
    orientation = _exif_value(exif, ExifTags.Base.Orientation)
    if orientation not in range(2, 9):
        return image, False
    only = Image.Exif()
    only[ExifTags.Base.Orientation] = orientation
    image.info = {"exif": only.tobytes()}
    return ImageOps.exif_transpose(image), orientation >= 5


def _exif_text(exif: Image.Exif) -> str:
    tags = {}
    for tag in exif:
        value = _exif_value(exif, tag)
        if isinstance(value, (str, int, float)) or "Rational" in type(value).__name__:
            name = ExifTags.TAGS.get(tag, str(tag))
            tags[name] = str(value).replace("\0", "").strip()[:_EXIF_TEXT]
    return json.dumps(tags, sort_keys=True)


def _exif_value(exif: Image.Exif, tag: int) -> Any:
    """One tag's value, None where it cannot be had: tags are parsed when asked for, and
    one without a sound value (a TIFF names some that it lacks) costs only itself.
    """
    try:
        return exif.get(tag)
    except Exception:  # parsers of tags raise anything on hostile data
        return None


def _jpeg(image: Image.Image, quality: int) -> bytes:
    # Pillow would carry comments and profiles over from the source.
    image.info = {}
    file = io.BytesIO()
    image.save(
        file,
        "JPEG",
        quality=quality,
        subsampling="4:2:0",
        optimize=False,
        progressive=False,
    )
    return file.getvalue()


def _dhash(image: Image.Image) -> str:
    """Signs of the horizontal gradients of a 9 x 8 thumbnail."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX, reducing_gap=2.0)
    pixels = np.asarray(small)
    return np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes().hex()
