"""Does an image that stays as it is open, and how large is it?

Owns the checks of images that are indexed, not written. Does not own decoding
(`pipeline.images`) or the process that it is done in (`pipeline.decoder`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from PIL import ExifTags, Image

from pipeline.decoder import Decoder, Request
from pipeline.filters import Filtered
from pipeline.images import FORMATS, EncodedImage, ImageError
from pipeline.options import FilterOptions, ImageOptions

CHECKS = ("full", "header")
# The index stores sides in 16 bits.
_MAX_SIDE = (1 << 16) - 1
# As an image is, so that decoding checks it and nothing else is done to it.
_AS_IT_IS = ImageOptions(resize="none")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sound image as a viewer shows it, and its hashes where it was decoded."""

    width: int
    height: int
    phash: str | None = None
    pixels_sha256: str | None = None
    exif: str | None = None


class PictureCheck:
    """Checks images, decoding them in a process of their own or by header alone."""

    def __init__(self, check: str) -> None:
        self._decoder = Decoder(_AS_IT_IS, FilterOptions()) if check == "full" else None

    def __enter__(self) -> PictureCheck:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._decoder is not None:
            self._decoder.__exit__(kind, error, trace)

    def check(self, images: Sequence[bytes]) -> list[Picture | ImageError]:
        """One answer for each image, in order."""
        if self._decoder is None:
            return [_by_header(data) for data in images]
        requests = [Request(data=data, captions=[], columns={}) for data in images]
        return [_answer(answer) for answer in self._decoder.encode(requests)]


def _answer(answer: EncodedImage | ImageError | Filtered) -> Picture | ImageError:
    if isinstance(answer, ImageError):
        return answer
    if isinstance(answer, Filtered):
        return ImageError(answer.reason, answer.detail)
    return _sized(
        Picture(
            width=answer.width,
            height=answer.height,
            phash=answer.phash,
            pixels_sha256=answer.pixels_sha256,
            exif=answer.exif,
        )
    )


def _by_header(data: bytes) -> Picture | ImageError:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
    except Image.UnidentifiedImageError:
        return ImageError("not_an_image", f"none of {', '.join(FORMATS)}")
    except Exception as error:  # decoders raise anything on a hostile header
        return ImageError("unreadable", type(error).__name__)
    if turned:
        width, height = height, width
    return _sized(Picture(width=width, height=height))


def _sized(picture: Picture) -> Picture | ImageError:
    size = f"{picture.width}x{picture.height}"
    if max(picture.width, picture.height) > _MAX_SIDE:
        return ImageError("too_elongated", size)
    if picture.width * picture.height > _AS_IT_IS.max_pixels:
        return ImageError("too_many_pixels", size)
    return picture
