"""Captions: what is kept of the corpus's text.

Owns the cleaning that every caption goes through before it is stored or tokenized.
Does not own tokens (`pipeline.tokenizer`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any


class BadText:
    """Stands in a row for text that is not UTF-8."""


def clean_caption(text: str) -> str:
    """NFC, control characters gone, whitespace collapsed to single blanks."""
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        # Tabs and line ends are control characters too, and separate words.
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def clean_captions(values: Iterable[Any]) -> list[str]:
    """Cleaned captions of an input's cells, each a string, a list of them, or null;
    empty ones are dropped.
    """
    captions = []
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            cleaned = clean_caption(str(text)) if text is not None else ""
            if cleaned:
                captions.append(cleaned)
    return captions
