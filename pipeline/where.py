"""`--where`: a SQL condition over the columns of a row, evaluated by DuckDB.

Owns its evaluation over rows. Does not own what a condition may contain
(`pipeline.condition`), where rows come from (`pipeline.sources`) or how many were left
out (`pipeline.manifest.Accounting`).

A condition sees one row and nothing else: no statement, subquery, aggregate, file,
network, clock or random number, so it says the same about a row wherever it runs. A row
for which it is null, or cannot be evaluated (`'wide'::INTEGER > 3`), does not meet it.

Every column of a CSV or TSV table is text. Where text is compared or calculated with a
number, as in `width >= 256` or `width * height > 65536`, it is read as a DOUBLE, and as
null where it is none; two columns of text are compared as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.captions import BadText
from pipeline.condition import EVALUATED, Condition

if TYPE_CHECKING:
    import duckdb


class RowFilter:
    """A condition, parsed and checked; may be pickled."""

    def __init__(self, where: str | None, schema: pa.Schema) -> None:
        """Check `where` against the columns of `schema`; None is met by every row.

        Raises:
            ValueError: no condition over these columns; nothing was evaluated but a row
                of nulls.
        """
        self._where, self._condition = where, "true"
        self._schema = pa.schema([])
        self._connection: duckdb.DuckDBPyConnection | None = None
        if where is not None:
            kinds = {field.name: _plain(field.type) for field in schema}
            self._check(where, kinds, schema.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the condition needs."""
        return tuple(self._schema.names)

    def matches(self, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Which of the rows (rows,) meet the condition. `BadText` counts as null."""
        if self._where is None:
            return [True] * len(rows)
        columns = [
            _column([row[field.name] for row in rows], field.type)
            for field in self._schema
        ]
        return self._evaluate(EVALUATED.format(self._condition), columns, len(rows))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_connection": None}

    def _check(
        self, where: str, kinds: Mapping[str, pa.DataType], names: Sequence[str]
    ) -> None:
        import duckdb

        self._connection = _connect()
        try:
            parsed = Condition(self._connection, where, kinds)
            twice = [name for name in parsed.columns if names.count(name) > 1]
            if twice:
                raise ValueError(f"several columns are named {twice[0]!r}")
            self._schema = pa.schema([(name, kinds[name]) for name in parsed.columns])
            self._condition = parsed.sql
            # Without `try`: what is wrong with every row is wrong with the condition.
            parsed.check_functions()
            nulls = [pa.nulls(1, field.type) for field in self._schema]
            self._evaluate(f"(\n{self._condition}\n)", nulls, 1)
        except (duckdb.Error, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".?")
            raise ValueError(
                f"--where {where!r}: {reason}; the columns are {', '.join(names)}"
            ) from error

    def _evaluate(
        self, expression: str, columns: Sequence[pa.Array], count: int
    ) -> list[bool]:
        if self._connection is None:
            self._connection = _connect()
        # The last column says how many rows there are where no other does.
        names = [*self._schema.names, " "]
        table = pa.Table.from_arrays([*columns, pa.nulls(count)], names)
        self._connection.register("rows", table)
        answer = self._connection.execute(f"SELECT {expression} FROM rows")
        kind = str(answer.description[0][1])
        if kind != "BOOLEAN":
            raise ValueError(f"it is of type {kind}, not a condition; compare it")
        values = [value for (value,) in answer.fetchall()]
        if len(values) != count:
            raise ValueError("it gives several values for a row")
        return values


def _connect() -> duckdb.DuckDBPyConnection:
    """A database in memory that reaches nothing outside, on one thread."""
    import duckdb

    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": 1,
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        },
    )
    # The machine's own zone would decide what day a moment lies in.
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")
    return connection


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that a column's cells have once they are Python's."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_string_view(kind) else kind


def _column(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Cells as a column; those that are not of its type are null."""
    good = [None if isinstance(cell, BadText) else cell for cell in cells]
    try:
        return pa.array(good, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.concat_arrays([_cell(cell, kind) for cell in good])


def _cell(cell: Any, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array([cell], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.nulls(1, kind)
