"""A terminal shows the corpus's text, and never obeys it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.terminal import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a plain \u00e9 \U0001f600 caption", "a plain \u00e9 \U0001f600 caption"),
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("two\nlines\r\x85\u2028", r"two\nlines\r\x85\u2028"),
        ("\u202eexe.jpg\u2066\u200b", r"\u202eexe.jpg\u2066\u200b"),
        ("\x9b31m \ud800", r"\x9b31m \ud800"),
    ],
)
def test_what_a_terminal_could_obey_is_an_escape(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text(st.characters()))
def test_any_text_becomes_one_line_that_can_be_written(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown
