"""A terminal shows the corpus's text, and never obeys it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import indexing, preprocess, progress, validate
from pipeline.config import run
from pipeline.manifest import Accounting, Manifest, TokenizerInfo
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


HOSTILE = "\x1b]0;owned\x07\u202e\nspoofed"
MANIFEST = Manifest(
    schema_version=1,
    complete=True,
    shards=(),
    sources={HOSTILE: 1.0},
    accounting=Accounting(inputs=1, failed={HOSTILE: 1}),
    rows=1,
    tokenizer=TokenizerInfo(path="t", sha256="", vocab_size=5, special_ids={}),
    transform={},
    transform_sha256="",
    files={},
)


@pytest.mark.parametrize("summary", [preprocess._summary, indexing.summary])
def test_summaries_of_runs_quote_reasons(
    summary: Callable[[Manifest, str], str],
) -> None:
    lines = summary(MANIFEST, f"out{HOSTILE}").split("\n")
    assert all(map(str.isprintable, lines))
    assert sum(r"\x1b]0;owned" in line for line in lines) == 2


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for say in (progress.say, indexing._say, validate._say):
        say(HOSTILE)
    line = r"\x1b]0;owned\x07\u202e\nspoofed"
    assert capsys.readouterr().err == f"{line}\n" * 3


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_an_error_is_one_line(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise kind(HOSTILE)

    with pytest.raises(SystemExit):
        run(main, "prog")
    assert capsys.readouterr().err == (
        "prog: error: \\x1b]0;owned\\x07\\u202e\\nspoofed\n"
    )
