"""JSON Lines: columns are fields, and every line is a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.columns import resolve_columns
from pipeline.options import ColumnOptions, SplitOptions
from pipeline.sources.fields import parse_object
from tests.pipeline.sources.reading import (
    BAD,
    check_every_range,
    column,
    opened,
    rows,
    scanned,
)


def test_fields_become_columns_of_one_type(tmp_path: Path) -> None:
    objects = [
        {"image": "a.jpg", "n": 1, "score": 1, "ok": True, "captions": ["one", "two"]},
        {"n": 2, "score": 0.5, "captions": "three", "mixed": "text"},
        {"image": None, "late": {"deep": [1]}, "mixed": 7, "captions": []},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    source = opened(path)
    assert column(source, "image") == ["a.jpg", None, None]
    assert column(source, "n") == [1, 2, None]
    assert column(source, "score") == [1.0, 0.5, None]
    assert column(source, "ok") == [True, None, None]
    assert column(source, "captions") == [["one", "two"], ["three"], []]
    assert column(source, "mixed") == [None, "text", "7"]
    assert column(source, "late") == [None, None, '{"deep":[1]}']
    check_every_range(source)


def test_a_line_that_is_no_object_is_a_row_of_its_own(tmp_path: Path) -> None:
    lines = [b'{"image":"a"}', b'{"image":"b"', b"[1]", b"", b"nonsense"]
    lines += [b'{"image":"\xff"}', b"[" * 100_000, b'{"image":nan}']
    lines += [b'{"image":"c"}{"image":"d"}', b'{"image":"e"}']
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    source = opened(tmp_path / "t.jsonl")
    assert column(source, "image") == ["a", *[BAD] * 7, "e"]
    assert scanned(source, "image") == ["a", *[None] * 7, "e"]
    check_every_range(source)


def test_a_later_value_of_another_type_is_bad(tmp_path: Path) -> None:
    lines = ['{"image":"a","n":1,"ok":true}'] * 10_000
    lines += ['{"image":5,"n":"x","ok":1}', '{"image":"b","n":2.5,"new":1}']
    lines += [f'{{"image":"c","n":{1 << 70},"ok":false}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "t.jsonl")
    assert source.schema.names == ["image", "n", "ok"]
    assert rows(source)[-3:] == [
        {"image": "5", "n": BAD, "ok": BAD},
        {"image": "b", "n": BAD, "ok": None},
        {"image": "c", "n": BAD, "ok": False},
    ]
    assert scanned(source, "n")[-3:] == [None] * 3


def test_what_python_writes_as_json_is_read(tmp_path: Path) -> None:
    long = 1 << 70
    objects: list[dict[str, object]] = [
        {"image": "a", "score": float("nan"), "deep": [{"x": float("inf")}], "n": 1},
        {"image": "\ud800 b \U0001f426", "score": 0.25, "n": long},
        {"image": "c", "score": -float("inf"), "n": float("nan")},
        {"image": "d", "score": 3, "huge": float("nan"), "n": 2},
    ]
    lines = [json.dumps(each) for each in objects]
    lines.append('{"image":"e","score":NaN,"n":' + "9" * 5_000 + "}")
    lines.append('{"image":"f","score":NaN,"n":7}')
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "t.jsonl")
    assert column(source, "image") == ["a", "\ufffd b \U0001f426", "c", "d", "e", "f"]
    assert column(source, "score") == [None, 0.25, None, 3.0, None, None]
    assert column(source, "deep")[0] == '[{"x":null}]'
    assert column(source, "n") == [1.0, float(long), None, 2.0, None, 7.0]
    check_every_range(source)


@pytest.mark.parametrize(
    "number",
    [
        *("0", "-0", "7", "1.0", "-2.5e3", "1e-400"),
        *("9223372036854775808", "9999999999999999999", "18446744073709551616"),
        *("-9223372036854775808", "-9223372036854775809", "9" * 300),
    ],
)
def test_numbers_beside_nan_are_what_they_are_elsewhere(number: str) -> None:
    plain = parse_object(b'{"n":%b}' % number.encode())
    beside = parse_object(b'{"x":NaN,"n":%b}' % number.encode())
    assert plain is not None
    assert repr(beside) == repr({"x": None, **plain})


def test_values_that_are_nested_too_deeply_are_bad(tmp_path: Path) -> None:
    deep = "[" * 300 + "]" * 300
    lines = ['{"image":"a","more":[1]}', f'{{"image":"b","more":{deep}}}']
    lines += [f'{{"image":"c","more":{deep},"score":NaN}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "t.jsonl")
    assert column(source, "image") == ["a", "b", "c"]
    assert column(source, "more") == ["[1]", BAD, BAD]
    assert scanned(source, "more") == ["[1]", None, None]


@pytest.mark.parametrize(
    "captions",
    [
        [[{"raw": "a bird"}]],
        [{"en": "a bird"}, {"en": "a kite"}],
        [{"en": "a bird"}, None, "", [], 7],
        [["a bird", {"raw": "a kite"}]],
    ],
)
def test_a_column_of_objects_is_no_caption(
    tmp_path: Path, captions: list[object]
) -> None:
    objects = [{"image": "a.jpg", "caption": each} for each in captions]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    schema = opened(path).schema
    with pytest.raises(ValueError, match=r"columns.caption caption: it holds JSON obj"):
        resolve_columns(schema, ColumnOptions(), SplitOptions())
    resolve_columns(schema, ColumnOptions(caption="image"), SplitOptions())


MIXED = [
    {"image": "a", "caption": ["a bird", "a kite"]},
    {"image": "b", "caption": {"raw": "a bird"}},
    {"image": "c", "caption": "a kite"},
    {"image": "d", "caption": [{"raw": "a bird"}]},
    {"image": "e", "caption": [], "title": {}},
    {"image": "a", "caption": 7, "title": "a house"},
    {"image": "f", "title": ["a house"]},
    {"image": "g", "title": {"en": "a house"}, "late": "a bird"},
]


def test_objects_among_captions_are_bad_and_lists_stay_lists(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, MIXED)))
    resolve_columns(opened(path).schema, ColumnOptions(), SplitOptions())
    source = opened(path, captions=["caption", "late", "image"])
    wanted = [["a bird", "a kite"], BAD, ["a kite"], BAD, None, BAD, None, None]
    assert column(source, "caption") == wanted
    assert column(source, "late")[-1] == "a bird"
    # A column that is no caption is what it was.
    titles = [*[None] * 4, "{}", "a house", '["a house"]', '{"en":"a house"}']
    assert column(source, "title") == titles
    check_every_range(source)
    grouped = opened(
        path, group_by="image", captions=["caption"], spool=tmp_path / "spool"
    )
    assert column(grouped, "caption") == [wanted[0], BAD, *wanted[1:5], None, None]


def test_captions_of_text_stay_text_and_later_objects_are_bad(tmp_path: Path) -> None:
    lines = ['{"image":"a","caption":"a bird"}'] * 10_000
    lines += [
        '{"image":"b","caption":{"en":"a kite"}}',
        '{"image":"c","caption":["x"]}',
    ]
    lines += ['{"image":"d","caption":7}', '{"image":"e","caption":"a kite"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "t.jsonl", captions=["caption"])
    assert column(source, "caption")[-5:] == ["a bird", BAD, BAD, "7", "a kite"]
    assert scanned(source, "caption")[-4:] == [None, None, "7", "a kite"]


def test_a_spool_for_other_captions_is_not_used_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"image":"a","title":"x"}\n{"image":"b","title":{"en":"y"}}\n')
    found = [
        column(
            opened(path, group_by="image", captions=names, spool=tmp_path / "spool"),
            "title",
        )
        for names in (["title"], ["image"])
    ]
    assert found == [["x", BAD], ["x", '{"en":"y"}']]


def test_types_come_from_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image":"a","n":1}\n')
    (tmp_path / "b.ndjson").write_text('{"image":"b","n":"two","more":3}\n')
    source = opened(tmp_path)
    assert rows(source) == [
        {"image": "a", "n": "1", "more": None},
        {"image": "b", "n": "two", "more": 3},
    ]


def test_lines_without_any_object_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="none of its first lines is a JSON object"):
        opened(tmp_path / "t.jsonl")
