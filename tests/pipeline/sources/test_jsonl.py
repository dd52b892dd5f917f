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
    "captions", [[{"raw": "a bird"}], {"en": "a bird"}, ["a bird", {"raw": "a kite"}]]
)
def test_objects_are_no_captions(tmp_path: Path, captions: object) -> None:
    objects = [{"image": "a.jpg", "caption": each} for each in ("a bird", captions)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    schema = opened(path).schema
    with pytest.raises(ValueError, match=r"columns.caption caption: it holds JSON obj"):
        resolve_columns(schema, ColumnOptions(), SplitOptions())
    resolve_columns(schema, ColumnOptions(caption="image"), SplitOptions())


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
