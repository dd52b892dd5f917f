"""Captions: what is kept of the corpus's text.

Owns the cleaning that every caption goes through before it is stored or tokenized, and
the rules by which captions say nothing. Does not own which columns captions come from
(`pipeline.columns`), captions made of several (`pipeline.filters.Template`) or tokens
(`pipeline.tokenizer`).

What cleaning does, in this order: halves of surrogate pairs are joined, or become
U+FFFD where the other half is missing; HTML entities are resolved once (`&amp;lt;` is
the text `&lt;`); control characters become blanks; characters that only steer
rendering (text direction, zero-width space, soft hyphen, byte order mark, invisible
tags) go; zero-width joiners stay only between characters outside ASCII, where emoji
and several scripts need them; NFC; whitespace collapses to single blanks. Visible
characters are never dropped. The result depends on the version of Unicode that Python
knows, `unicodedata.unidata_version`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from pipeline.options import TextOptions

EMPTY = "empty_caption"
PLACEHOLDER = "placeholder_caption"
SHORT = "short_caption"
REPETITIVE = "repetitive_caption"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0001\U000e0020-\U000e007f\ufffe\uffff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_JOINERS = re.compile("[\u200c\u200d]+")
# Python refuses to read longer numbers; the largest character has seven digits.
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{16,}|[xX][0-9a-fA-F]{16,});?")
# Unicode's own bound (UAX #15, Stream-Safe Text Format): sorting the marks of one
# character takes quadratic time, and a corpus is untrusted.
_MAX_MARKS = 30
# Text is cut to this many times `max_chars` before anything slow looks at it.
_RAW_SHARE = 16
# Longest word that is given up whole where a caption is cut.
_CUT_CHARS = 64
_FEWEST_WORDS = 8


class BadText:
    """Stands in a row for text that is not UTF-8."""


class CaptionCleaner:
    """Turns the cells of an input into its captions."""

    def __init__(self, options: TextOptions) -> None:
        """Compile the rules of `options`.

        Regular expressions among them are the user's own: they see at most
        `max_chars` characters, but are not guarded against running away on those.

        Raises:
            ValueError: a rule is no regular expression.
        """
        self._options = options
        self._placeholders = _Placeholders(options.dropped)

    def clean(self, cells: Iterable[Any]) -> tuple[list[str], str | None]:
        """Captions of an input, and the reason where none is left.

        A cell is text, a list of texts, a number or null; text that could not be read
        counts as null. The reason is that of the first caption with any text in it.
        """
        captions: list[str] = []
        reason = EMPTY
        for text in _texts(cells):
            caption = self._cleaned(text)
            dropped = self._reason(caption)
            if dropped is None:
                captions.append(caption)
            elif reason == EMPTY:
                reason = dropped
            if len(captions) == self._options.max_captions:
                break
        return captions, None if captions else reason

    def first(self, cells: Iterable[Any]) -> str:
        """The first caption with any text in it, whatever `clean` thinks of it."""
        return next(filter(None, map(self._cleaned, _texts(cells))), "")

    def _cleaned(self, text: str) -> str:
        limit = self._options.max_chars
        text = text[: limit * _RAW_SHARE]
        text = clean_caption(text, unescape_html=self._options.unescape_html)
        return _cut(text, limit, self._options.min_chars)

    def _reason(self, caption: str) -> str | None:
        """Why a caption is dropped, if it is."""
        if not caption:
            return EMPTY
        if self._placeholders.match(caption):
            return PLACEHOLDER
        if len(caption) < self._options.min_chars:
            return SHORT
        share = self._options.max_word_share
        if share < 1 and _word_share(caption) > share:
            return REPETITIVE
        return None


def clean_caption(text: str, *, unescape_html: bool = True) -> str:
    """`text` cleaned as the module's docstring says; without `unescape_html` the result
    stays the same when it is cleaned again.
    """
    if _SURROGATES.search(text):
        text = whole_characters(text)
    if unescape_html and "&" in text:
        text = html.unescape(_HUGE_REFERENCE.sub("\ufffd", text))
    if not text.isprintable():
        # Tabs and line ends are control characters too, and separate words.
        text = _INVISIBLE.sub("", _CONTROL.sub(" ", text))
    if not text.isascii():
        text = _normalised(text)
        if "\u200c" in text or "\u200d" in text:
            text = _normalised(_JOINERS.sub(_joiner, text))
    return " ".join(text.split())


def whole_characters(text: str) -> str:
    """`text` with halves of a character joined, or U+FFFD where there is one alone."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Placeholders:
    """Captions that say nothing, as listed."""

    def __init__(self, rules: Iterable[str]) -> None:
        words, self._patterns = set(), []
        for rule in rules:
            if len(rule) > 1 and rule[0] == rule[-1] == "/":
                self._patterns.append(_pattern(rule))
            else:
                words.add(_core(clean_caption(rule, unescape_html=False)).casefold())
        self._words = frozenset(words)
        self._longest = max(map(len, words), default=0)

    def match(self, caption: str) -> bool:
        core = _core(caption)
        # Folding case never makes a text shorter.
        if len(core) <= self._longest and core.casefold() in self._words:
            return True
        return any(pattern.search(caption) for pattern in self._patterns)


def _pattern(rule: str) -> re.Pattern[str]:
    try:
        if rule == "//":
            raise re.error("it is empty, so every caption would go")
        return re.compile(rule[1:-1], re.IGNORECASE)
    except re.error as error:
        raise ValueError(
            f"--text.placeholders {rule!r} is no regular expression ({error}); mend "
            "it, or leave the slashes out to compare words"
        ) from error


def _texts(cells: Iterable[Any]) -> Iterator[str]:
    for cell in cells:
        for value in cell if isinstance(cell, (list, tuple)) else (cell,):
            if value is not None and not isinstance(value, BadText):
                yield str(value)


def _normalised(text: str) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    runs = groupby(text, key=lambda c: unicodedata.combining(c) > 0)
    parts = (islice(run, _MAX_MARKS) if marks else run for marks, run in runs)
    return unicodedata.normalize("NFC", "".join("".join(part) for part in parts))


def _joiner(found: re.Match[str]) -> str:
    """The first of a run of joiners, where it has something to join."""
    text, start, end = found.string, found.start(), found.end()
    before, after = text[max(start - 1, 0) : start], text[end : end + 1]
    joins = all(c and not c.isascii() and not c.isspace() for c in (before, after))
    return found[0][0] if joins else ""


def _cut(text: str, limit: int, least: int) -> str:
    """`text` of at most `limit` characters, whole words where one ends near, and of at
    least `least` characters where it had as many.
    """
    if len(text) <= limit:
        return text
    end = text.rfind(" ", max(limit - _CUT_CHARS, limit // 2, least), limit + 1)
    if end < 0:
        end = limit
        # Marks and joined characters belong to the character before them.
        while end > max(limit - _MAX_MARKS, least, 1) and _continues(text, end):
            end -= 1
    return text[:end].rstrip()


def _continues(text: str, position: int) -> bool:
    joined = "\u200c\u200d"
    character = text[position]
    return (
        character in joined
        or text[position - 1] in joined
        or unicodedata.category(character)[0] == "M"
    )


def _core(text: str) -> str:
    """`text` without outer punctuation and symbols, unless it is nothing else."""
    start, end = 0, len(text)
    while start < end and not text[start].isalnum():
        start += 1
    while end > start and not text[end - 1].isalnum():
        end -= 1
    return text[start:end] or text


def _word_share(text: str) -> float:
    """Share of the commonest word among all, 0 where there are few."""
    words = [_core(word) for word in text.casefold().split()]
    if len(words) < _FEWEST_WORDS:
        return 0.0
    return Counter(words).most_common(1)[0][1] / len(words)
