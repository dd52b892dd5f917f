"""What a `--where` condition may contain, and which columns it needs.

Owns reading the condition's syntax tree: one expression over one row, of functions that
depend on nothing but their arguments, and text that meets numbers. Does not own its
evaluation (`pipeline.where`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.config import nearest

if TYPE_CHECKING:
    import duckdb

_Node = dict[str, Any]

_BEFORE, _AFTER = "SELECT (\n", "\n) FROM rows"
# How a condition is evaluated: null, and what cannot be evaluated, is not met.
EVALUATED = "coalesce(try(\n{}\n), false)"

# Kinds of nodes that a condition over one row is made of.
_CLASSES = (
    *("BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION"),
    *("CONSTANT", "FUNCTION", "LAMBDA", "OPERATOR", "TYPE"),
)
_ARITHMETIC = ("+", "-", "*", "/", "//", "%", "**", "^")
_NUMBERS = ("INT", "DOUBLE", "FLOAT", "REAL", "DECIMAL", "NUMERIC", "HUGEINT")
# It counts from today where it has one argument, which its stability does not say.
_CLOCKS = ("age",)


class Condition:
    """A condition as DuckDB parses it.

    `columns` are those it uses, by their names in the corpus; `sql` is the condition
    with text that meets numbers read as numbers.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        where: str,
        kinds: Mapping[str, pa.DataType],
    ) -> None:
        """Parse `where` over columns of the types `kinds`.

        Raises:
            ValueError: it is no expression over one row of these columns.
        """
        self._connection, self._kinds = connection, kinds
        self._root = _expression(connection, where)
        self._nodes = list(_walk(self._root))
        self._parameters = {
            inner["column_names"][0].casefold()
            for node in self._nodes
            if node["class"] == "LAMBDA"
            for inner in _walk(node["lhs"])
            if inner["class"] == "COLUMN_REF"
        }
        self.columns = self._used()
        self.sql = self._converted(where)

    def check_functions(self) -> None:
        """Raise ValueError where a function is not one of a single row's values."""
        for node in self._nodes:
            if node["class"] == "FUNCTION":
                _check_function(self._connection, node["function_name"])

    def _used(self) -> list[str]:
        used = []
        for node in self._nodes:
            if node["class"] not in _CLASSES:
                what = node["class"].lower().replace("_", " ")
                raise ValueError(f"no {what} is possible in a condition over one row")
            if node["class"] == "COLUMN_REF":
                used += self._named(node["column_names"][0])
        return list(dict.fromkeys(used))

    def _named(self, name: str) -> list[str]:
        """The column of this name: SQL looks at no case."""
        same = [known for known in self._kinds if known.casefold() == name.casefold()]
        if len(same) > 1:
            raise ValueError(f"columns {', '.join(same)} differ in case only")
        if not same and name.casefold() not in self._parameters:
            near = nearest(name, list(self._kinds))
            raise ValueError(f"no column {name!r}.{near}")
        return same

    def _converted(self, where: str) -> str:
        """`where` with TRY_CAST around columns of text that meet numbers."""
        text = where.encode()
        spans = {
            (node["query_location"] - len(_BEFORE), node["query_location_length"])
            for operands in map(self._as_numbers, self._nodes)
            for node in operands
            if self._is_text(node)
        }
        for start, size in sorted(spans, reverse=True):
            column = text[start : start + size]
            number = b"TRY_CAST(" + column + b" AS DOUBLE)"
            text = text[:start] + number + text[start + size :]
        return text.decode()

    def _as_numbers(self, node: _Node) -> list[_Node]:
        """Operands of `node` that are to be numbers."""
        operands = _operands(node)
        numbers = [operand for operand in operands if self._is_number(operand)]
        if _is_arithmetic(node):
            texts = sum(map(self._is_text, operands))
            return operands if len(numbers) + texts == len(operands) else []
        return operands if numbers else []

    def _is_number(self, node: _Node) -> bool:
        if node["class"] == "CONSTANT":
            return node["literal"]["kind"] in ("INTEGER", "NUMERIC")
        if node["class"] == "CAST":
            kind = node["type_expr"].get("type_name", "").upper()
            return any(number in kind for number in _NUMBERS)
        if node["class"] == "COLUMN_REF":
            kind = self._kind(node)
            return kind is not None and (
                pa.types.is_integer(kind)
                or pa.types.is_floating(kind)
                or pa.types.is_decimal(kind)
            )
        return _is_arithmetic(node) and bool(self._as_numbers(node))

    def _is_text(self, node: _Node) -> bool:
        kind = self._kind(node) if node["class"] == "COLUMN_REF" else None
        return kind is not None and (
            pa.types.is_string(kind) or pa.types.is_large_string(kind)
        )

    def _kind(self, node: _Node) -> pa.DataType | None:
        """Type of the column itself; None for a field of it."""
        names = node["column_names"]
        known = self._named(names[0]) if len(names) == 1 else []
        return self._kinds[known[0]] if known else None


def _expression(connection: duckdb.DuckDBPyConnection, where: str) -> _Node:
    """The syntax tree of `where`, refused where it is more than an expression."""
    if not where.strip():
        raise ValueError("it is empty")
    several = ValueError("it is more than one condition")
    root, around = _selected(connection, f"{_BEFORE}{where}{_AFTER}")
    if root is None:
        raise several
    _, alone = _selected(connection, f"{_BEFORE}NULL{_AFTER}")
    run, _ = _selected(connection, f"SELECT {EVALUATED.format(where)} FROM rows")
    same, _ = _selected(connection, f"SELECT {EVALUATED.format('NULL')} FROM rows")
    assert same is not None
    # In `a) OR (b` what is evaluated would not be what was looked at.
    same["children"][0]["children"] = [root]
    if _shape([run, around]) != _shape([same, alone]):
        raise several
    return root


def _selected(
    connection: duckdb.DuckDBPyConnection, sql: str
) -> tuple[_Node | None, _Node]:
    """The one expression that `sql` selects, None where there are more, and the rest of
    its syntax tree.
    """
    statements = _statements(connection, sql)
    node = statements[0]["node"]
    root, *more = node.pop("select_list")
    return (None if more or len(statements) > 1 else root), node


def _statements(connection: duckdb.DuckDBPyConnection, sql: str) -> list[_Node]:
    # Everything is fetched: an open answer would hold the connection.
    answer = connection.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
    parsed = json.loads(answer[0][0])
    if parsed["error"]:
        raise ValueError(parsed["error_message"])
    return parsed["statements"]


def _shape(value: Any) -> Any:
    """A syntax tree without the places in the text."""
    if isinstance(value, dict):
        return {
            key: _shape(inner)
            for key, inner in value.items()
            if not key.startswith("query_location")
        }
    return [_shape(inner) for inner in value] if isinstance(value, list) else value


def _walk(value: Any) -> Iterator[_Node]:
    """All nodes of a syntax tree that have a class."""
    if isinstance(value, dict):
        if "class" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _operands(node: _Node) -> list[_Node]:
    """What a comparison or a calculation compares or calculates."""
    if node["class"] == "COMPARISON":
        return [node["left"], node["right"]]
    if node["class"] == "BETWEEN":
        return [node["input"], node["lower"], node["upper"]]
    if node["type"] == "COMPARE_IN":
        return node["children"]
    if _is_arithmetic(node):
        return [argument["expression"] for argument in node["arguments"]]
    return []


def _is_arithmetic(node: _Node) -> bool:
    return node["class"] == "FUNCTION" and node["function_name"] in _ARITHMETIC


def _check_function(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Refuse what is no pure function of its arguments; unknown names are left to
    DuckDB, which says what it is nearest to.
    """
    rows = connection.execute(
        "SELECT function_type, stability, macro_definition, parameters "
        "FROM duckdb_functions() WHERE function_name = $1",
        [name.lower()],
    ).fetchall()
    for kind, stability, definition, parameters in rows:
        if kind == "macro" and _is_pure(connection, definition, parameters):
            continue
        if name.lower() in _CLOCKS or (kind, stability) != ("scalar", "CONSISTENT"):
            raise ValueError(
                f"{name}() is no function of one row's values alone, so shards would "
                "not be the same when made again"
            )


def _is_pure(
    connection: duckdb.DuckDBPyConnection, definition: str, parameters: list[str]
) -> bool:
    """Whether a macro is made of its parameters and functions that are allowed."""
    for node in _walk(_expression(connection, definition)):
        if node["class"] not in _CLASSES:
            return False
        if node["class"] == "FUNCTION":
            _check_function(connection, node["function_name"])
        # `current_timestamp` and its kin are written like columns.
        if node["class"] == "COLUMN_REF" and node["column_names"][0] not in parameters:
            return False
    return True
