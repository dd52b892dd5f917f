"""Colour: every kind of pixels becomes sRGB on white.

Owns colour profiles, CMYK, alpha, palettes and deep greys. Does not own decoding
(`pipeline.jpeg`, Pillow) or sizes (`pipeline.resize`).
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

from pipeline.image_header import MAX_PROFILE, ImageError

_WHITE = (255, 255, 255, 255)
_GREY = 1
_CMYK = 4
# Transforms kept; most corpora have a handful of profiles.
_TRANSFORMS = 16
# What a profile of sRGB may do to a colour: its curves are tables that were rounded.
_SAME = 2
_STEPS = 9
_DEEP_GREY = "I;16"
_TIFF_WHITE_IS_0 = (262, 0)


def image_to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as sRGB on white, of mode RGB.

    Raises:
        ImageError: unsupported_mode.
    """
    return _on_white(_to_srgb(_plain(image)))


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


def _plain(image: Image.Image) -> Image.Image:
    """The image with a byte a channel, and what is transparent in a channel of its own:
    what a profile speaks of. Raises ImageError: unsupported_mode.
    """
    if image.mode.startswith(_DEEP_GREY):
        return _shallow(image)
    if image.mode in ("I", "F", "LAB"):
        raise ImageError("unsupported_mode", f"pixels of kind {image.mode}")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return image.convert("LA" if image.mode == "L" else "RGBA")
    return image


def _shallow(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow's own conversion clips."""
    values = np.asarray(image).astype(np.uint16)
    clear = image.info.get("transparency")
    tag, white = _TIFF_WHITE_IS_0
    grey = (values // 257).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(tag) == white:
        grey = 255 - grey
    shallow = Image.fromarray(grey)
    if isinstance(clear, int):
        shallow.putalpha(
            Image.fromarray(np.where(values == clear, 0, 255).astype("u1"))
        )
    return _with_profile(shallow, image.info.get("icc_profile"))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; a profile that does not parse is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    transform = _transform(profile, "L" if image.mode == "LA" else image.mode, mode)
    if transform is None:
        return image
    alpha = image.getchannel("A") if image.mode == "LA" else None
    source = image.getchannel("L") if alpha else image
    converted = ImageCms.applyTransform(source, transform) or source
    if alpha:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=_TRANSFORMS)
def _transform(
    profile: bytes, from_mode: str, to_mode: str
) -> ImageCms.ImageCmsTransform | None:
    """Transform of a profile to sRGB, or None where there is nothing to do."""
    if len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, from_mode, to_mode)
        return None if _changes_nothing(transform, from_mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, from_mode: str) -> bool:
    """Whether colours come out as they were. Names tell nothing: many a profile has
    "sRGB" in its own and other curves.
    """
    if from_mode == "CMYK":
        return False
    steps = np.linspace(0, 255, _STEPS).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    colours = Image.fromarray(grid)
    if from_mode == "L":
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    colours = colours.convert(from_mode)
    found = ImageCms.applyTransform(colours, transform)
    if found is None:
        return False
    before, after = (
        np.asarray(one.convert("RGB")).astype(int) for one in (colours, found)
    )
    return bool(np.abs(before - after).max() <= _SAME)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        # Converting to the same mode copies every pixel.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, _WHITE)
    return Image.alpha_composite(white, rgba).convert("RGB")
