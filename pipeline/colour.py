"""Colour: every kind of pixels becomes sRGB on white.

Owns colour profiles, CMYK, alpha, palettes and deep greys. Does not own decoding
(`pipeline.jpeg`, Pillow) or sizes (`pipeline.resize`).
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

from pipeline.image_header import ImageError

_WHITE = (255, 255, 255, 255)
_GREY = 1
_CMYK = 4
# Profiles of printing presses have up to 3 MB; more is an attack on memory.
_MAX_PROFILE = 8 << 20
# Transforms kept; most corpora have a handful of profiles.
_TRANSFORMS = 8


def image_to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as sRGB on white, of mode RGB.

    Raises:
        ImageError: unsupported_mode.
    """
    return _on_white(_to_srgb(image))


def jpeg_to_rgb(
    pixels: np.ndarray, profile: bytes | None, *, inverted: bool
) -> np.ndarray:
    """Pixels (height, width, 1, 3 or 4) of a JPEG as sRGB, (height, width, 3).

    `inverted` says that CMYK is stored as Adobe's programs do, full ink as 0.
    """
    channels = pixels.shape[2]
    if channels == _CMYK:
        pixels = 255 - pixels if inverted else pixels
        image = _with_profile(Image.fromarray(pixels, "CMYK"), profile)
        return np.asarray(image_to_rgb(image))
    mode = "L" if channels == _GREY else "RGB"
    if not is_srgb(profile, mode):
        image = Image.fromarray(pixels[..., 0] if channels == _GREY else pixels)
        return np.asarray(image_to_rgb(_with_profile(image, profile)))
    return np.repeat(pixels, 3, axis=2) if channels == _GREY else pixels


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether pixels of `mode` with this profile are shown right without it."""
    return not profile or _transform(profile, mode, "RGB") is None


def _with_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        image.info["icc_profile"] = profile
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; a profile that does not parse is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    transform = _transform(profile, image.mode, mode)
    if transform is None:
        return image
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=_TRANSFORMS)
def _transform(
    profile: bytes, from_mode: str, to_mode: str
) -> ImageCms.ImageCmsTransform | None:
    """Transform of a profile to sRGB, or None where there is nothing to do."""
    if len(profile) > _MAX_PROFILE:
        return None
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
    if image.mode in ("F", "LAB"):
        raise ImageError("unsupported_mode", f"pixels of kind {image.mode}")
    if not image.has_transparency_data:
        # Converting to the same mode copies every pixel.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, _WHITE)
    return Image.alpha_composite(white, rgba).convert("RGB")
