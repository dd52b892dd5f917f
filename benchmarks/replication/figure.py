"""The picture of a replication: every seed of every row, table by table.

Owns the picture. Does not own its numbers (`benchmarks.replication.tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "0.45"
_PER_ROW_IN = 0.3


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A panel of each table and metric: dots are seeds, lines are means; the row that
    others are compared with is orange, and a dotted line is chance.
    """
    from matplotlib.figure import Figure

    widest = max((len(table["metrics"]) for table in found.values()), default=1)
    heights = [
        1 + _PER_ROW_IN * len(next(iter(table["metrics"].values()))["rows"])
        for table in found.values()
    ]
    figure = Figure(figsize=(2.5 + 4 * widest, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), widest, squeeze=False, height_ratios=heights)
    for line, table in zip(axes, found.values(), strict=True):
        for axis in line[len(table["metrics"]) :]:
            axis.set_axis_off()
        shown = None
        for axis, metric in zip(line, table["metrics"].values(), strict=False):
            _panel(axis, metric, table["reference"])
            if list(metric["rows"]) == shown:
                axis.set_yticklabels([])
            shown = list(metric["rows"])
        line[0].set_title(table["title"], loc="left", fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=110)


def _panel(axis: Any, metric: Mapping[str, Any], reference: str) -> None:
    rows = metric["rows"]
    for place, (name, row) in enumerate(rows.items()):
        colour = _ORANGE if name == reference else _BLUE
        values = list(row["values"].values())
        axis.plot(values, [place] * len(values), "o", color=colour, ms=5, alpha=0.6)
        if row["mean"] is not None:
            axis.plot([row["mean"]] * 2, [place - 0.3, place + 0.3], color=colour, lw=2)
    mean = rows[reference]["mean"]
    if mean is not None:
        axis.axvline(mean, color=_ORANGE, lw=0.8, alpha=0.6)
    if metric["chance"] is not None:
        axis.axvline(metric["chance"], color=_GREY, lw=0.8, ls=":")
    titles = [row["title"] for row in rows.values()]
    axis.set_yticks(range(len(titles)), titles, fontsize=8)
    axis.set_ylim(len(titles) - 0.4, -0.6)
    axis.set_xlabel(metric["title"], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
