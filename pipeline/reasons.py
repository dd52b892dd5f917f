"""The codes under which inputs are counted, and what kind of outcome each is.

Owns the one table of statuses and reasons. Does not own what they mean
(`pipeline/README.md`) or who counts them (`pipeline.manifest.Accounting`). Imports
nothing: the decoder's process reads it too.
"""

from __future__ import annotations

# What an input is in the end: column `status` of the tables.
STATUSES = ("success", "failed", "filtered", "duplicate")

FILTERED = frozenset(
    (
        *("empty_caption", "placeholder_caption", "short_caption", "long_caption"),
        *("repetitive_caption", "caption_repetition", "too_small", "aspect"),
        *("where", "denied", "not_allowed"),
    )
)
# Failures before there is an image to decode; `http_` and a status code is one too.
NOT_READ = frozenset(
    (
        *("missing_image", "missing_file", "missing_split", "path_outside_input"),
        *("several_images", "images_differ", "too_many_rows", "bad_text"),
        *("timeout", "connection", "dns", "tls", "bad_answer", "content_encoding"),
        *("too_many_redirects", "address_refused", "bad_url", "opted_out"),
        *("hash_mismatch", "duplicate_key", "duplicate_member", "damaged_header"),
        "truncated_tar",
    )
)
# Failures of the image itself.
NOT_DECODED = frozenset(
    (
        *("not_an_image", "unreadable", "truncated", "corrupt", "unsupported_mode"),
        *("too_many_pixels", "too_long", "too_large", "too_elongated"),
        *("memory_limit", "time_limit", "killed_decoder"),
    )
)
DUPLICATE = frozenset(("identity", "split", "exact", "near"))
_HTTP = "http_"


def is_not_read(reason: str) -> bool:
    """Whether an input that failed for this reason gave no image to decode."""
    return reason in NOT_READ or reason.startswith(_HTTP)


def is_taken(word: str) -> bool:
    """Whether a word says something already, so that no user may count under it."""
    table = FILTERED | NOT_READ | NOT_DECODED | DUPLICATE
    return word in STATUSES or word in table or is_not_read(word)
