"""What a replication has found: values, differences with their tests, and claims.

Owns the numbers of every table, as plain data, and their Markdown. Does not own the
tests (`benchmarks.replication.statistics`) or the picture of them
(`benchmarks.replication.figure`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replication.matrix import Claim, Matrix, Metric, Table
from benchmarks.replication.predictions import read
from benchmarks.replication.schedule import Place, kept_sha256
from benchmarks.replication.stages import evaluation, plan
from benchmarks.replication.statistics import (
    Difference,
    paired_bootstrap,
    paired_t,
    seeds_needed,
    verdict,
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of one row: a value of each seed that is there."""

    values: dict[int, float]
    files: dict[int, Path]
    """What was predicted of each item, where it is kept."""
    intervals: dict[int, list[float]] = field(default_factory=dict)
    """95 % of a value over test items, where its result has it."""


def tables(matrix: Matrix, place: Place) -> dict[str, Any]:
    """Every table as plain data, of the stages that are complete."""
    found = _measured(matrix, place)
    return {name: _table(matrix, table, found) for name, table in matrix.tables.items()}


def _measured(
    matrix: Matrix, place: Place
) -> dict[tuple[str, str], dict[int, tuple[Any, Path]]]:
    """By row and task, then seed: the result, and the file of what is kept."""
    stages = {stage.name: stage for stage in plan(matrix)}
    found: dict[tuple[str, str], dict[int, tuple[Any, Path]]] = {}
    for name, row in matrix.rows.items():
        for task in row.tasks:
            for seed in matrix.seeds:
                stage = stages[evaluation(matrix, row, task, seed)]
                marker = place.done(stage)
                if marker and stage.result:
                    kept = (place.work / stage.result).with_suffix(".npz")
                    now = kept_sha256(kept)
                    if now and marker.get("kept_sha256", now) != now:
                        raise ValueError(
                            f"{kept} is of another evaluation than the one that "
                            f"counts: remove {place.marker(stage)}, so that it is made "
                            "again"
                        )
                    result = marker["result"], kept
                    found.setdefault((name, task), {})[seed] = result
    return found


def _table(
    matrix: Matrix,
    table: Table,
    found: Mapping[tuple[str, str], Mapping[int, tuple[Any, Path]]],
) -> dict[str, Any]:
    metrics, of = matrix.tasks[table.task].metrics, {}
    for name in {*table.metrics, *(claim.metric for claim in table.claims)}:
        of[name] = {
            row: _of_metric(metrics[name], found.get((row, table.task), {}))
            for row in table.rows
            if metrics[name].objective in (None, *matrix.rows[row].objectives)
        }
    return {
        "title": table.title,
        "task": table.task,
        "reference": table.reference,
        "note": table.note,
        "metrics": {
            name: {
                "title": metrics[name].title,
                "digits": metrics[name].digits,
                "chance": metrics[name].chance,
                "rows": {
                    row: {
                        "title": matrix.rows[row].title,
                        **_row(metrics[name], of[name], row, table.reference),
                        "paper": table.paper.get(name, {}).get(row),
                    }
                    for row in of[name]
                },
            }
            for name in table.metrics
        },
        "claims": [
            _claim(claim, metrics[claim.metric], of[claim.metric])
            for claim in table.claims
        ],
    }


def _of_metric(metric: Metric, results: Mapping[int, tuple[Any, Path]]) -> Measured:
    values, files, intervals = {}, {}, {}
    for seed, (result, kept) in results.items():
        value = beside = result
        for key in metric.value.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(
                    f"metric {metric.title!r} is {metric.value}, and the result "
                    f"has no {key} there: name one of {', '.join(map(str, value))}"
                )
            value, beside = value[key], value
        values[seed], files[seed] = float(value), kept
        if beside.get("ci95"):
            intervals[seed] = beside["ci95"]
    return Measured(values=values, files=files, intervals=intervals)


def _row(
    metric: Metric, of: Mapping[str, Measured], row: str, reference: str
) -> dict[str, Any]:
    values = list(of[row].values.values())
    found: dict[str, Any] = {
        "values": of[row].values,
        "intervals": of[row].intervals,
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
    if row != reference:
        found |= compared(metric, of[row], of[reference])
    return found


def compared(metric: Metric, ours: Measured, theirs: Measured) -> dict[str, Any]:
    """How much `ours` is above `theirs`, over the seeds that both have, and over test
    items where what was predicted of each is kept.
    """
    seeds = sorted(ours.values.keys() & theirs.values.keys())
    mine, other = ([one.values[seed] for seed in seeds] for one in (ours, theirs))
    over_seeds = paired_t(mine, other) if len(seeds) > 1 else None
    over_items = None
    if metric.predictions and seeds:
        over_items = _over_items(
            metric.predictions,
            [ours.files[seed] for seed in seeds],
            [theirs.files[seed] for seed in seeds],
        )
    return {
        "difference": float(np.mean(np.subtract(mine, other))) if seeds else None,
        "over_seeds": over_seeds._asdict() if over_seeds else None,
        "over_items": over_items._asdict() if over_items else None,
        "seeds_needed": seeds_needed(mine, other) if over_seeds else None,
    }


def _over_items(
    metric: str, ours: Sequence[Path], theirs: Sequence[Path]
) -> Difference:
    mine, other = ([read(metric, path) for path in row] for row in (ours, theirs))
    first = mine[0]
    for one, path in zip((*mine, *other), (*ours, *theirs), strict=True):
        same = np.array_equal(one.items, first.items)
        if not same or not np.array_equal(one.groups, first.groups):
            raise ValueError(
                f"{path} and {ours[0]} were measured on other test items: measure "
                "both anew, with the same pairs and keys"
            )
    return paired_bootstrap(
        [one.measure for one in mine], [one.measure for one in other], first.groups
    )


def _claim(claim: Claim, metric: Metric, of: Mapping[str, Measured]) -> dict[str, Any]:
    ours = of[claim.row]
    if claim.against is None:
        zero = Measured(values=dict.fromkeys(ours.values, 0.0), files={})
        found = compared(dataclasses.replace(metric, predictions=None), ours, zero)
    else:
        found = compared(metric, ours, of[claim.against])
    seeds, items = (
        Difference(**found[name]) if found[name] else None
        for name in ("over_seeds", "over_items")
    )
    said = "not measured yet"
    if found["difference"] is not None:
        said = verdict(
            claim.says,
            margin=claim.margin,
            seeds=seeds,
            items=items,
            needed=found["seeds_needed"],
        )
    return {
        "source": claim.source,
        "row": claim.row,
        "against": claim.against,
        "says": claim.says,
        "metric": metric.title,
        "digits": metric.digits,
        **found,
        "verdict": said,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Tables in which something was measured, and under each what it says of the
    paper's claims.
    """
    parts = []
    for table in shown(found).values():
        parts.append(f"### {table['title']}")
        if table["note"]:
            parts.append(table["note"].strip())
        for metric in table["metrics"].values():
            parts.append(_metric_lines(metric, table["reference"]))
        if table["claims"]:
            parts.append("\n".join(map(_claim_line, table["claims"])))
    return "\n\n".join(parts) + "\n"


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in which something was measured."""
    return {
        name: table
        for name, table in found.items()
        if any(
            row["values"]
            for metric in table["metrics"].values()
            for row in metric["rows"].values()
        )
    }


def _metric_lines(metric: Mapping[str, Any], reference: str) -> str:
    digits, rows = metric["digits"], metric["rows"]
    chance = "" if metric["chance"] is None else f" (chance {metric['chance']:g})"
    columns = [
        f"{metric['title']}{chance}",
        "mean ± std",
        "each seed",
        f"against {rows[reference]['title']}",
        "95 % over seeds",
        "95 % over test items",
    ]
    paper = any(row["paper"] for row in rows.values())
    lines = [_line([*columns, *(["paper"] if paper else [])])]
    lines.append("|---" * (len(columns) + paper) + "|")
    for row in rows.values():
        cells = [
            row["title"],
            spread(row["mean"], row["std"], digits),
            _each_seed(row, digits),
            _signed(row.get("difference"), digits),
            _interval(row.get("over_seeds"), digits),
            _interval(row.get("over_items"), digits),
            *([row["paper"] or ""] if paper else []),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def spread(mean: float | None, std: float | None, digits: int) -> str:
    """Mean and standard deviation, as far as there are seeds for them."""
    if mean is None:
        return "not yet"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _each_seed(row: Mapping[str, Any], digits: int) -> str:
    """Values; of a single seed, its interval over test items too."""
    found = ", ".join(f"{value:.{digits}f}" for value in row["values"].values())
    if len(row["values"]) == 1:
        for low, high in row["intervals"].values():
            found += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return found


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def _interval(difference: Mapping[str, Any] | None, digits: int) -> str:
    if not difference:
        return ""
    low, high = difference["ci95"]
    return f"{low:+.{digits}f} to {high:+.{digits}f}, p {difference['p']:.2g}"


def _claim_line(claim: Mapping[str, Any]) -> str:
    found = _signed(claim["difference"], claim["digits"])
    if found:
        found = f" Here, {claim['metric']}: {found}"
        if claim["over_seeds"]:
            found += f" ({_interval(claim['over_seeds'], claim['digits'])} over seeds)"
        found += "."
    return f"- {claim['source']}{found} **{claim['verdict'].capitalize()}.**"
