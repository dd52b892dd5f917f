"""What a replication prints and writes when it is run.

Owns the files of tables and the list of what remains. Does not own numbers
(`benchmarks.replication.tables`).
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.replication.figure import draw
from benchmarks.replication.matrix import Matrix
from benchmarks.replication.schedule import (
    Place,
    Schedule,
    duration,
    estimate,
    measured_seconds,
)
from benchmarks.replication.tables import markdown, shown, tables
from trainer.files import write_text, write_with


def say_what_remains(schedule: Schedule) -> None:
    """Every stage that is not complete, and the time of all."""
    known = measured_seconds(schedule.place, schedule.stages)
    for stage in schedule.remaining():
        took = estimate(stage, schedule.seconds, known)
        print(f"{'?' if took is None else duration(took):>8s}  {stage.name}")
    left, unknown = schedule.left_s()
    print(
        f"{len(schedule.remaining())} of {len(schedule.stages)} stages remain: about "
        f"{duration(left)} with {schedule.jobs} at a time"
        + (f", and {unknown} stages that nobody has timed" if unknown else "")
    )


def require_own(output: Path) -> None:
    """Raise ValueError where `write_tables` would replace what it did not write."""
    files = [output.with_name(f"{output.name}.{end}") for end in ("md", "json", "png")]
    there = [path for path in files if path.exists()]
    try:
        found = json.loads(files[1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if there and not (isinstance(found, dict) and found.keys() == {"seeds", "tables"}):
        raise ValueError(
            f"--output {output} would replace {', '.join(map(str, there))}, and no "
            f"{files[1].name} with tables says that this command wrote that: give "
            "another name"
        )


def write_tables(matrix: Matrix, place: Place, output: Path) -> None:
    """Markdown, JSON and figure of what is there; the Markdown is printed too."""
    found = tables(matrix, place)
    text = markdown(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    plain = json.dumps({"seeds": matrix.seeds, "tables": found}, indent=1)
    # First: it says whose files the others are.
    write_text(output.with_name(f"{output.name}.json"), plain + "\n")
    write_text(output.with_name(f"{output.name}.md"), text)
    if not shown(found):
        print("nothing is measured yet")
        return
    write_with(
        output.with_name(f"{output.name}.png"), lambda to: draw(shown(found), Path(to))
    )
    print(text)
