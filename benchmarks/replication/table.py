"""`python -m benchmarks.replication.table INPUT --columns SQL --output FILE`.

Owns adding columns to a corpus's table, such as a caption made of several. Does not own
reading the corpus (`pipeline.preprocess`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import parse, run
from trainer.files import write_with

PROG = "benchmarks.replication.table"
DESCRIPTION = """\
Write a Parquet table with further columns.

  python -m benchmarks.replication.table items.parquet --output with.parquet \\
      --columns "concat_ws(' ', gender, baseColour, articleType) AS attributes"
"""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What to add to which table."""

    input: str
    """Parquet file (the first word of the command)."""
    columns: str
    """Columns to add, in SQL, with commas between them."""
    output: str
    """Parquet file to write."""


def main(argv: Sequence[str]) -> None:
    """Write the table."""
    config = parse(
        TableConfig, argv, prog=PROG, description=DESCRIPTION, positional="input"
    )
    import duckdb

    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = config.input.replace("'", "''")

    def write(temporary: str) -> None:
        target = temporary.replace("'", "''")
        try:
            duckdb.sql(
                f"COPY (SELECT *, {config.columns} FROM read_parquet('{source}')) "
                f"TO '{target}' (FORMAT parquet)"
            )
        except duckdb.Error as error:
            raise ValueError(f"{config.input}: {error}") from error

    write_with(output, write)
    print(output)


if __name__ == "__main__":
    run(main, PROG)
