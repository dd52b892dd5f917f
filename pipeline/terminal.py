"""Text of the corpus on a terminal.

Owns making untrusted text safe to print. Does not own text in HTML, which is escaped
where the page is made.
"""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with everything a terminal could obey written as an escape (`\x1b`).

    That is control characters (so no line ends either), characters that reverse or hide
    text, separators other than blanks, lone surrogates, and characters that Unicode
    does not know. The result is one line, and can be encoded as UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
