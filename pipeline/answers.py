"""What HTTP answers ask of a client, and how little of it is believed.

Owns the headers X-Robots-Tag, Retry-After, Location and Content-Encoding. Does not own
requests (`pipeline.download`). Pure functions of what servers sent, but for dates.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
import zlib
from collections.abc import Collection, Iterable

from yarl import URL

from pipeline.images import ImageError

_AGENT = re.compile(r"[\w*.\-]+")
# Directives that have a value: what stands before their colon names no agent.
_VALUED = (
    *("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"),
)
# Statuses below 500 that ask to come back.
_LATER = (408, 425, 429)
# Gzip or zlib, whichever the data begins as.
_ANY_WINDOW = zlib.MAX_WBITS | 32


def asks_again(status: int) -> bool:
    """Whether a status may be another one a little later."""
    return status in _LATER or 500 <= status <= 599


def pause_asked_for(header: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; else 0."""
    text = header.strip()
    if text.isascii() and text.isdecimal():
        # More digits than a float holds are as good as never.
        return float(text) if len(text) < 10 else math.inf
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
    return max(0.0, moment - time.time())


def next_hop(url: URL, location: str) -> str:
    """The URL that a Location header leads to; its scheme and host are unchecked.

    Raises:
        ImageError: `bad_url`.
    """
    try:
        return str(url.join(URL(location.strip())))
    except Exception as error:  # the parser raises anything on hostile text
        raise ImageError("bad_url", "a redirect that is no URL") from error


def opted_out(
    headers: Iterable[str], *, agent: str, refused: Collection[str]
) -> str | None:
    """The first directive of X-Robots-Tag headers that is refused and speaks to
    everybody, or to a name in `agent` (`palimpsest/1.0` has one). In a header,
    `name: directive` also holds for the directives after it until the next name.
    """
    mine = {"*", *re.findall(r"[\w.\-]+", agent.lower())}
    tags = {tag.lower() for tag in refused}
    for header in headers:
        name = "*"
        for item in header.lower().split(","):
            before, colon, after = item.partition(":")
            if colon and before.strip() in _VALUED:
                continue
            if colon and _AGENT.fullmatch(before.strip()):
                name = before.strip()
            directive = (after if colon else item).strip()
            if name in mine and directive in tags:
                return directive
    return None


class Inflater:
    """Decodes a body piece by piece, never past a limit: a gzip bomb stops there.

    Some servers compress although the request asks them not to.

    Args:
        encoding: the Content-Encoding header, empty where there is none.

    Raises:
        ImageError: `content_encoding`, neither gzip nor deflate.
    """

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ImageError("content_encoding", f"{name[:40]!a}: not gzip or deflate")
        plain = name in ("", "identity")
        self._stream = None if plain else zlib.decompressobj(_ANY_WINDOW)

    def add(self, piece: bytes, limit: int) -> bytes:
        """The next plain bytes; at most `limit` of them where they are encoded.

        Raises:
            ImageError: `content_encoding`, the data is something else.
        """
        if self._stream is None:
            return piece
        try:
            return self._stream.decompress(piece, limit)
        except zlib.error as error:
            raise ImageError("content_encoding", "damaged, or no gzip") from error

    @property
    def finished(self) -> bool:
        """Whether all that was encoded has come."""
        return self._stream is None or self._stream.eof
