"""Captions: cleaned the same way every time, dropped only by rules, with a reason."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions import BadText, CaptionCleaner, clean_caption
from pipeline.options import TextOptions

# Everything a JSON file can hold, halves of surrogate pairs included.
ANYTHING = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cc", "Cf", "Cs", "Mn", "Zs", "Zl", "Zp"]),
        st.sampled_from("\u200d\u200c\u212a\u0301\u0338e&;#x"),
    )
)


def cleaned(*cells: object, **options: object) -> tuple[list[str], str | None]:
    return CaptionCleaner(TextOptions(**options)).clean(cells)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A\tdog\r\n e\u0301\u0007! ", "A dog \u00e9 !"),
        ("fish &amp; chips &#233; &lt;b&gt;", "fish & chips \u00e9 <b>"),
        ("once &amp;lt; only", "once &lt; only"),
        ("a&nbsp;\u3000b\u2028c", "a b c"),
        ("evil\u202etxt.exe\u2066", "eviltxt.exe"),
        ("\ufeffsoft\u00adware\u200b", "software"),
        ("hidden\U000e0041\U000e0042", "hidden"),
        ("in\u200dner", "inner"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("\u0646\u0645\u06cc\u200c\u062e", "\u0646\u0645\u06cc\u200c\u062e"),
        ("e\u200d\u0301", "\u00e9"),
        ("half \ud83d", "half \ufffd"),
        ("pair \ud83d\ude00", "pair \U0001f600"),
        ("\u0600 12", "\u0600 12"),
        ("&#" + "9" * 5000 + "; x", "\ufffd x"),
    ],
)
def test_what_only_steers_rendering_goes_and_what_is_seen_stays(
    text: str, expected: str
) -> None:
    assert clean_caption(text) == expected


@given(ANYTHING)
def test_cleaned_text_is_normal_and_stays_as_it_is(text: str) -> None:
    once = clean_caption(text, unescape_html=False)
    assert clean_caption(once, unescape_html=False) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert "  " not in once
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in once)
    clean_caption(text).encode()


def test_html_stays_where_it_is_not_to_be_unescaped() -> None:
    assert cleaned("a &amp; b", unescape_html=False) == (["a &amp; b"], None)


def test_a_caption_of_marks_is_bounded() -> None:
    # Sorting these takes the Unicode database a quarter of a minute.
    caption = clean_caption("a" + "\u0315\u0300" * 80_000)
    assert len(caption) < 40


def test_cells_are_text_lists_numbers_or_nothing() -> None:
    cells = ["one", None, ["two", "", None, " three "], "  ", 4, BadText()]
    assert cleaned(*cells) == (["one", "two", "three", "4"], None)


def test_long_captions_are_cut_at_a_word() -> None:
    text = "seven words make up this long caption"
    assert cleaned(text, max_chars=18) == (["seven words make"], None)
    assert cleaned(text, max_chars=16) == (["seven words make"], None)
    assert cleaned(text, max_chars=16 + 3) == (["seven words make up"], None)


@given(st.text("ab \u0301\u200d\U0001f468.\u4e00", max_size=90), st.data())
def test_a_caption_that_is_kept_has_a_length_within_the_limits(
    text: str, data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, 30))
    least = data.draw(st.integers(0, most))
    options = TextOptions(min_chars=least, max_chars=most, placeholders=[])
    captions, reason = CaptionCleaner(options).clean([text])
    assert (reason is None) == (len(captions) == 1)
    assert all(max(least, 1) <= len(caption) <= most for caption in captions)
    if least <= 1:
        assert bool(captions) == bool(clean_caption(text))


def test_a_cut_inside_a_word_keeps_characters_whole_and_the_least_length() -> None:
    assert cleaned("x" * 50, max_chars=20) == (["x" * 20], None)
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert cleaned("ab" + family, max_chars=5) == (["ab"], None)
    assert cleaned("ab" + "q\u0323\u0307" * 4, max_chars=7) == (
        ["abq\u0323\u0307"],
        None,
    )
    text = "aaaa " + "b" * 40
    assert cleaned(text, max_chars=8, min_chars=8) == (["aaaa bbb"], None)


@pytest.mark.parametrize(
    "caption", ["Untitled", "  (no caption)... ", "N/A", "nan", "\u00abIMAGE\u00bb"]
)
def test_placeholders_are_compared_without_case_and_outer_marks(caption: str) -> None:
    assert cleaned(caption) == ([], "placeholder_caption")


def test_words_that_only_contain_a_placeholder_stay() -> None:
    captions = ["an image of a dog", "images", "n.a", "---"]
    assert cleaned(captions) == (captions, None)


def test_a_placeholder_between_slashes_is_a_regular_expression() -> None:
    rules = [r"/^img_\d+$/", "STRASSE", "/"]
    captions = ["IMG_0042", "my img_42", "stra\u00dfe!", "/", "a / b"]
    assert cleaned(captions, placeholders=rules) == (["my img_42", "a / b"], None)


@pytest.mark.parametrize("rule", ["/(/", "//"])
def test_a_bad_rule_names_itself_and_the_cure(rule: str) -> None:
    with pytest.raises(ValueError, match=r"--text\.placeholders '.*' is no regular"):
        CaptionCleaner(TextOptions(placeholders=rule))


def test_captions_of_one_word_again_and_again_are_dropped() -> None:
    spam = "Sale, SALE sale! sale sale sale cheap sale"
    fine = "the dog and the cat and the bird"
    assert cleaned(spam, max_word_share=0.5) == ([], "repetitive_caption")
    assert cleaned(fine, max_word_share=0.5) == ([fine], None)
    assert cleaned("no no no", max_word_share=0.1) == (["no no no"], None)
    assert cleaned(spam) == ([spam], None)


def test_captions_beyond_the_most_are_dropped_after_the_bad_ones() -> None:
    cells = ["image", "one", "", "two", "three"]
    assert cleaned(cells, max_captions=2) == (["one", "two"], None)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([], "empty_caption"),
        ([None, " \u200b", BadText()], "empty_caption"),
        (["", "ab", "untitled"], "short_caption"),
        (["untitled", "ab"], "placeholder_caption"),
    ],
)
def test_the_reason_is_that_of_the_first_caption_with_text(
    cells: list[object], reason: str
) -> None:
    assert cleaned(*cells, min_chars=3) == ([], reason)


def test_an_empty_caption_is_dropped_whatever_the_least_length() -> None:
    assert cleaned("", "\u0007", min_chars=0) == ([], "empty_caption")
