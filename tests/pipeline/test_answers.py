"""Headers of answers are read as the field reads them, and never trusted."""

from __future__ import annotations

import email.utils
import gzip
import math
import time
import zlib

import pytest
from yarl import URL

from pipeline.answers import Inflater, asks_again, next_hop, opted_out, pause_asked_for
from pipeline.images import ImageError

_REFUSED = ("noai", "noimageai", "noindex", "noimageindex")


@pytest.mark.parametrize(
    ("headers", "tag"),
    [
        (["noai"], "noai"),
        (["NoIndex, follow"], "noindex"),
        (["follow", " all , noimageai "], "noimageai"),
        (["palimpsest: noai"], "noai"),
        (["Palimpsest: follow, noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noai, noindex"], None),
        (["otherbot: noindex, palimpsest: noai"], "noai"),
        (["palimpsest: follow, otherbot: noai"], None),
        (["noai, otherbot: follow"], "noai"),
        (["otherbot: noai", "noindex"], "noindex"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Friday, 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["max-image-preview: large, noindex"], "noindex"),
        (["noarchive, nofollow", "", ":", ",,", "noaix", "no ai"], None),
        ([], None),
    ],
)
def test_opt_out_headers_are_honoured(headers: list[str], tag: str | None) -> None:
    for agent in ("palimpsest", "Mozilla/5.0 (compatible; Palimpsest/1.0; +https://a)"):
        assert opted_out(headers, agent=agent, refused=_REFUSED) == tag
    assert opted_out(headers, agent="palimpsest", refused=()) is None


def test_which_statuses_ask_to_come_again() -> None:
    again = [status for status in range(600) if asks_again(status)]
    assert again == [408, 425, 429, *range(500, 600)]


def test_pauses_are_read_from_numbers_and_dates() -> None:
    assert pause_asked_for("120") == 120
    assert pause_asked_for("9" * 5000) == math.inf
    later = email.utils.formatdate(time.time() + 1000, usegmt=True)
    assert 0 < pause_asked_for(later) <= 1000
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    for text in (past, "", "soon", "-5", "1e9", "٣", "Wed, 99 Oct 99999999 07:28 GMT"):
        assert pause_asked_for(text) == 0


def test_redirects_are_joined_to_where_they_come_from() -> None:
    url = URL("https://example.com/a/b.jpg?x=1")
    assert next_hop(url, "c.jpg") == "https://example.com/a/c.jpg"
    assert next_hop(url, "/c.jpg") == "https://example.com/c.jpg"
    assert next_hop(url, "//other.com/c") == "https://other.com/c"
    assert next_hop(url, " http://10.0.0.1/ ") == "http://10.0.0.1/"
    assert next_hop(url, "file:///etc/hostname").startswith("file:")
    for location in ("http://[::1", "http://a:99999999/", "http://a\ud800/"):
        with pytest.raises(ImageError, match="bad_url"):
            next_hop(url, location)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("", bytes),
        ("identity", bytes),
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("deflate", zlib.compress),
    ],
)
def test_encoded_bodies_are_decoded_piece_by_piece(encoding: str, encode: type) -> None:
    plain = bytes(range(256)) * 50
    data = encode(plain)
    inflater = Inflater(encoding)
    pieces = [data[start : start + 7] for start in range(0, len(data), 7)]
    assert b"".join(inflater.add(piece, len(plain) + 1) for piece in pieces) == plain
    assert inflater.finished


def test_a_bomb_gives_no_more_than_the_limit() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    inflater = Inflater("gzip")
    assert len(inflater.add(bomb, 1001)) == 1001
    assert not inflater.finished


def test_what_cannot_be_decoded_has_a_reason() -> None:
    for encoding in ("br", "gzip, gzip", "zstd", "x" * 1000, "\udcff"):
        with pytest.raises(ImageError, match="content_encoding") as caught:
            Inflater(encoding)
        assert len(caught.value.detail.encode()) < 100
    with pytest.raises(ImageError, match="content_encoding: damaged"):
        Inflater("gzip").add(b"\xff\xd8 a picture after all", 1000)
    cut = Inflater("gzip")
    cut.add(gzip.compress(b"a picture" * 100)[:-9], 10_000)
    assert not cut.finished
