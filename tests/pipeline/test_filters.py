"""Filters: every input that is left out has a reason, every mistake in one a cure."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions import BadText
from pipeline.filters import (
    Candidate,
    Filtered,
    Template,
    UidLists,
    check_source_size,
    check_tokens,
    load_function,
    load_uids,
)
from pipeline.options import FilterOptions
from tests.pipeline.corpora import picture

_FUNCTIONS = '''
"""Filters of a user."""
import sys
answer = 42

def keep(candidate):
    return None

def empty(candidate):
    return ""

def no_dogs(candidate):
    if candidate.columns["lang"] != "en" or candidate.image.getpixel((0, 0)) is None:
        return "other_language"
    small = candidate.image.width * 2 < candidate.width
    return "dog" if "dog" in candidate.captions[0] and small else None

def true(candidate):
    return True

def shout(candidate):
    return "Too Blue!"

def broken(candidate):
    return candidate.columns["no such"]

def hungry(candidate):
    raise MemoryError

def leaves(candidate):
    sys.exit(3)

def interrupts(candidate):
    raise KeyboardInterrupt
'''


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of an importable module of a user's functions."""
    (tmp_path / "users_filters.py").write_text(_FUNCTIONS)
    (tmp_path / "users_broken.py").write_text("1 / 0\n")
    (tmp_path / "users_script.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_filters"
    sys.modules.pop("users_filters", None)


def candidate(caption: str = "a dog", lang: str = "en") -> Candidate:
    return Candidate(
        image=picture(1),
        captions=[caption],
        width=600,
        height=400,
        columns={"lang": lang},
    )


def test_a_filtered_input_travels_between_processes() -> None:
    sent = pickle.loads(pickle.dumps(Filtered("aspect", "9x1")))
    assert (sent.reason, sent.detail, str(sent)) == ("aspect", "9x1", "aspect: 9x1")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((64, 64), None),
        ((63, 640), "too_small"),
        ((640, 63), "too_small"),
        ((64, 192), None),
        ((64, 193), "aspect"),
        ((193, 64), "aspect"),
    ],
)
def test_sizes_at_the_limit_are_kept(size: tuple[int, int], reason: str | None) -> None:
    check_source_size(*size, FilterOptions())
    options = FilterOptions(min_size=64, max_aspect=3)
    if reason is None:
        check_source_size(*size, options)
        return
    with pytest.raises(Filtered, match=f"^{reason}: {size[0]}x{size[1]}, filter"):
        check_source_size(*size, options)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([3], None),
        ([2, 3], None),
        ([2, 2], "short_caption"),
        ([5, 99], None),
        ([6, 99], "long_caption"),
    ],
)
def test_token_limits_look_at_the_best_caption(
    counts: list[int], reason: str | None
) -> None:
    check_tokens(counts, FilterOptions())
    options = FilterOptions(min_tokens=3, max_tokens=5)
    if reason is None:
        check_tokens(np.array(counts), options)
        return
    with pytest.raises(Filtered, match=f"^{reason}: . tokens, filter"):
        check_tokens(np.array(counts), options)


def test_a_users_function_decides_on_image_captions_and_columns(functions: str) -> None:
    function = load_function(f"{functions}:no_dogs")
    function(candidate("a cat"))
    for reason, given_candidate in (
        ("dog", candidate()),
        ("other_language", candidate(lang="de")),
    ):
        with pytest.raises(Filtered) as caught:
            function(given_candidate)
        assert caught.value.reason == reason
        assert caught.value.detail == f"by {functions}:no_dogs"
    load_function(f"{functions}:keep")(candidate())
    load_function(f"{functions}:empty")(candidate())


@pytest.mark.parametrize("name", ["true", "shout"])
def test_a_result_that_is_no_reason_names_the_function(
    functions: str, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"{functions}:{name} returned .*; return No"):
        load_function(f"{functions}:{name}")(candidate())


def test_a_function_that_raises_names_itself_its_line_and_the_input(
    functions: str,
) -> None:
    line = _FUNCTIONS.splitlines().index('    return candidate.columns["no such"]') + 1
    says = rf"{functions}:broken raised KeyError\('no such'\) in line {line} of broken"
    says += ".*600x400 with caption 'a dog'; mend it and choose a new --output"
    with pytest.raises(RuntimeError, match=says):
        load_function(f"{functions}:broken")(candidate())


@pytest.mark.parametrize("name", ["leaves", "interrupts"])
def test_a_function_that_exits_has_raised(functions: str, name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{functions}:{name} raised \w+\(.*a dog"):
        load_function(f"{functions}:{name}")(candidate())


def test_running_out_of_memory_is_not_the_functions_fault(functions: str) -> None:
    with pytest.raises(MemoryError):
        load_function(f"{functions}:hungry")(candidate())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("users_filter:keep", "cannot be imported .*working-dir"),
        ("users_broken:keep", r"importing .* raised ZeroDivisionError\(.*mend it"),
        ("users_script:keep", r"importing .* raised SystemExit\(3\); mend it"),
        ("users_filters:kept", "no function 'kept'. Did you mean 'keep'"),
        ("users_filters:answer", "no function 'answer'"),
    ],
)
def test_a_function_that_is_not_there_names_the_cure(
    functions: str, name: str, says: str
) -> None:
    with pytest.raises(ValueError, match=f"--filter.function {name}: .*{says}"):
        load_function(name)


def uid_file(path: Path, *uids: int) -> str:
    path.write_text("".join(f"{uid:016x}\n" for uid in uids))
    return str(path)


def test_uids_of_a_file_are_sorted_and_each_once(tmp_path: Path) -> None:
    last = 2**64 - 1
    uids = load_uids(uid_file(tmp_path / "uids.txt", 7, last, 7, 2**63))
    assert uids.dtype == np.uint64
    assert uids.tolist() == [7, 2**63, last]
    assert not uids.flags.writeable
    (tmp_path / "odd.txt").write_bytes(b"\n00000000000000FF\r\n\n 0000000000000001")
    assert load_uids((tmp_path / "odd.txt").as_uri()).tolist() == [1, 255]
    assert load_uids(uid_file(tmp_path / "none.txt")).tolist() == []


@pytest.mark.parametrize(
    "line", ["xyz", "0" * 15, "0" * 17, "0x00000000000000", "-000000000000001", "é" * 8]
)
def test_a_line_that_is_no_uid_is_named(tmp_path: Path, line: str) -> None:
    # So many good lines come first that they are read as several blocks.
    path = tmp_path / "uids.txt"
    path.write_text("00000000000000ff\n" * 70_000 + "\n" + line + "\n")
    says = re.escape(f"line 70002 of {path} is no uid: ")
    with pytest.raises(ValueError, match=says + ".*16 hex digits"):
        load_uids(str(path))


UIDS = st.integers(0, 2**64 - 1)


@given(st.sets(UIDS), st.sets(UIDS), UIDS)
def test_uid_lists_allow_and_deny_exactly(
    allow: set[int], deny: set[int], other: int
) -> None:
    lists = UidLists(
        allow=np.array(sorted(allow), np.uint64),
        deny=np.array(sorted(deny), np.uint64),
    )
    for uid in {other, *allow, *deny, 0, 2**64 - 1}:
        expected = "not_allowed" if uid not in allow else None
        assert lists.reason(uid) == ("denied" if uid in deny else expected)
        assert UidLists().reason(uid) is None


def test_a_template_makes_one_caption_of_columns() -> None:
    names = ["title", "colour", "tags", "alt text"]
    template = Template("{{{title}}}: {colour}, {alt text} {title}", names)
    assert template.columns == ("title", "colour", "alt text")
    row = {"title": " Shirt ", "colour": 7, "alt text": ["a", None, "b"], "tags": None}
    assert template.render(row) == "{Shirt}: 7, a, b Shirt"
    assert Template("{tags}", names).render(row) is None


@pytest.mark.parametrize(
    "empty", [None, "", " \n", [], [None, ""], BadText(), float("nan")]
)
def test_an_empty_column_makes_no_caption(empty: object) -> None:
    template = Template("{a} in {b}", ["a", "b"])
    assert template.render({"a": "shirt", "b": empty}) is None
    assert template.render({"a": "shirt", "b": "red"}) == "shirt in red"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{titel}", "no column 'titel'. Did you mean 'title'"),
        ("{}", "no column ''"),
        ("a caption", "names no column"),
        ("{{title}}", "names no column"),
        ("{title", "expected '}'"),
        ("title}", "Single '}'"),
        ("{title!r}", r"without '!' or ':'; write \{title\}"),
        ("{title:>9}", r"without '!' or ':'; write \{title\}"),
        ("{title.__class__}", "no column 'title.__class__'"),
    ],
)
def test_a_template_that_cannot_be_used_names_the_cure(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"--columns.template .*{says}"):
        Template(text, ["title", "colour"])
