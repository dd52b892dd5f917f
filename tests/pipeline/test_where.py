"""Conditions over columns: one row in, yes or no out, the same wherever they run."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.captions import BadText
from pipeline.where import RowFilter

SCHEMA = pa.schema(
    [
        ("image", pa.large_binary()),
        ("width", pa.string()),
        ("Gr\u00f6\u00dfe", pa.large_string()),
        ("n", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("size", pa.struct([("kb", pa.int32())])),
        ("lang", pa.dictionary(pa.int8(), pa.string())),
        ("taken", pa.timestamp("us", "UTC")),
    ]
)


def row(**cells: Any) -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names) | cells


def matched(where: str | None, *rows: dict[str, Any]) -> list[bool]:
    return RowFilter(where, SCHEMA).matches(rows)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("width >= 256", [True, False, True, False, False]),
        # As DOUBLE: neither rounded nor beyond the range of an INTEGER.
        ("width < 256.5", [False, True, False, False, False]),
        ("width BETWEEN 200 AND 300", [True, True, False, False, False]),
        ("width IN (256, 300)", [True, False, False, False, False]),
        ("width * 2 > 520", [True, False, True, False, False]),
        ("n < width", [True, True, True, False, False]),
        ("NOT width >= 256", [False, True, False, False, False]),
        ("width = '300'", [True, False, False, False, False]),
        ("width::INTEGER > 1", [True, True, False, False, False]),
    ],
)
def test_columns_of_text_are_compared_with_numbers(
    where: str, expected: list[bool]
) -> None:
    cells = ("300", "255.6", "3000000000", "wide", None)
    if "::" in where:
        cells = ("300", "25", "wide", "", None)
    assert matched(where, *(row(width=cell, n=1) for cell in cells)) == expected


def test_conditions_see_lists_structs_dictionaries_and_moments() -> None:
    # Just before midnight in Greenwich, and already tomorrow east of it.
    late = datetime.datetime(2020, 1, 1, 23, 30, tzinfo=datetime.UTC)
    full = row(
        tags=["a"], size={"kb": 3}, lang="en", taken=late, **{"Gr\u00f6\u00dfe": "7"}
    )
    for where in (
        "list_contains(tags, 'a')",
        "len(list_filter(tags, lambda x: x = 'a')) > 0",
        "size.kb = 3",
        "lang = 'en' AND upper(lang) LIKE 'E%'",
        'gr\u00f6\u00dfe > 6 AND "Gr\u00f6\u00dfe" < 8',
        "'\u00e4\u00f6' = '\u00e4\u00f6' AND gr\u00f6\u00dfe > 6 -- a comment",
        "strftime(taken, '%d') = '01'",
        "if(n IS NULL, true, false)",
    ):
        assert matched(where, full, row(n=1)) == [True, False], where


def test_null_and_bad_text_do_not_match() -> None:
    rows = [row(lang=BadText(), n="not a number"), row(lang="en", n=1)]
    assert matched("lang = 'en'", *rows) == [False, True]
    assert matched("lang IS NULL", *rows) == [True, False]
    assert matched("n = 1", *rows) == [False, True]


def test_only_the_columns_of_the_condition_are_needed() -> None:
    condition = RowFilter("Width >= 256 AND lang = 'en'", SCHEMA)
    assert condition.columns == ("width", "lang")
    assert condition.matches([{"width": "256", "lang": "en"}]) == [True]
    assert RowFilter("image IS NOT NULL", SCHEMA).columns == ("image",)
    assert RowFilter("1 = 1", SCHEMA).columns == ()
    assert matched("1 = 1", row(), row()) == [True, True]
    assert matched("n > 1") == []


def test_brackets_and_comments_of_a_condition_are_its_own() -> None:
    for where in ("(n > 1) or (n < 0)", "n > 1 -- {not} less", "n > 1 /* ) or ( */"):
        condition = RowFilter(where, SCHEMA)
        assert condition.matches([row(n=2), row(n=1)]) == [True, False]


def test_no_condition_is_met_by_every_row() -> None:
    assert RowFilter(None, SCHEMA).columns == ()
    assert matched(None, row(), row()) == [True, True]


def test_a_condition_travels_to_tasks() -> None:
    condition = RowFilter("width >= 256", SCHEMA)
    rows = [row(width="300"), row(width="3")]
    assert condition.matches(rows) == [True, False]
    assert pickle.loads(pickle.dumps(condition)).matches(rows) == [True, False]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("widht > 1", "no column 'widht'. Did you mean 'width'"),
        ("width >", "syntax error"),
        ("", "it is empty"),
        ("n", "it is of type BIGINT, not a condition"),
        ("n >= 'abc'", "Could not convert string 'abc'"),
        ("regexp_matches(width, '(')", "missing \\)"),
        ("lenght(width) > 1", "lenght does not exist"),
        ("count(*) > 1", r"count_star\(\) is no function of one row"),
        ("row_number() OVER () > 1", "no window is possible"),
        ("unnest(tags) = 'a'", r"unnest\(\) is no function of one row"),
        ("(SELECT 1) = 1", "no subquery is possible"),
        ("COLUMNS('n') > 1", "no star is possible"),
        ("$1 > 1", "no parameter is possible"),
        ("n > 1) FROM rows WHERE (true", "syntax error"),
        ("n > 1); SELECT (1", "more than one condition"),
        ("n > 1); DROP TABLE rows; SELECT (1", "Only SELECT"),
        ("n > 1, n > 2", "."),
        ("n > 1) or (1 = 1", "more than one condition"),
        ("n > 1), (n > 2", "."),
        ("n > 1) = (n > 2", "more than one condition"),
        ("n > 1), false), coalesce(try(true", "."),
    ],
)
def test_what_is_no_condition_over_a_row_is_refused(where: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"--where .*{says}.*; the columns are image"):
        RowFilter(where, SCHEMA)


@pytest.mark.parametrize(
    "where",
    [
        "random() < 0.5",
        "uuid() > uuid()",
        "now() > taken",
        "today() > taken",
        "current_date > taken",
        "age(taken) > INTERVAL 1 DAY",
        "ago(INTERVAL 1 DAY) > taken",
        "nextval('s') > 1",
        "current_setting('threads') = 1",
    ],
)
def test_nothing_but_the_row_decides(where: str) -> None:
    with pytest.raises(ValueError, match=r"no function of one row's values|no column"):
        RowFilter(where, SCHEMA)


def test_a_condition_reads_no_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.csv"
    path.write_text("a\n1\n")
    for where in (
        f"(SELECT count(*) FROM read_csv('{path}')) > 0",
        f"EXISTS (FROM '{path}')",
        f"n IN (FROM read_text('{path}'))",
        f"n > 1) FROM '{path}' WHERE (true",
    ):
        with pytest.raises(ValueError, match="--where"):
            RowFilter(where, SCHEMA)


def test_names_that_sql_cannot_tell_apart_are_refused() -> None:
    twice = pa.schema([("a", pa.int64()), ("A", pa.int64()), ("b", pa.int64())])
    with pytest.raises(ValueError, match="columns a, A differ in case only"):
        RowFilter("a > 1", twice)
    assert RowFilter("b > 1", twice).matches([{"b": 2}]) == [True]
    same = pa.schema([("a", pa.int64()), ("a", pa.string()), ("b", pa.int64())])
    with pytest.raises(ValueError, match="several columns are named 'a'"):
        RowFilter("a > 1", same)
