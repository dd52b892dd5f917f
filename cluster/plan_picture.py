"""A plan's simulation as a picture: lost work against the interval, and one run.

Owns the drawing, and the page that holds it. Does not own the numbers
(`cluster.plan_run`) or the text on the page (`cluster.plan_text`).
"""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from cluster.plan_run import Plan, Preempted
from cluster.plan_text import duration

_COLOURS = {
    "training": "#4c9f70",
    "starting": "#e0a93b",
    "saving": "#4a78b5",
    "lost": "#c8452d",
}
_WORDS = {
    "training": "training",
    "starting": "starting again",
    "saving": "writing a checkpoint",
    "lost": "lost, done again",
}
_HOUR = 3600


def picture(found: Plan) -> bytes:
    """The picture as PNG."""
    # Late: it takes a second to import.
    from matplotlib.figure import Figure

    assert found.preempted is not None
    figure = Figure(figsize=(9, 7.5), dpi=130, layout="constrained")
    above, below = figure.subplots(2)
    _intervals(above, found.preempted)
    _run(below, found.preempted)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def page(drawn: bytes, text: str) -> str:
    """The picture and the text as one HTML page."""
    image = base64.b64encode(drawn).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>Plan of a run</title><style>body{font-family:sans-serif;margin:2em "
        "auto;max-width:62em;padding:0 1em}img{max-width:100%}pre{overflow:auto}"
        "</style></head><body><h1>Plan of a run</h1>\n"
        f'<img alt="Lost work against the interval between checkpoints, and one '
        f'simulated run" src="data:image/png;base64,{image}">\n'
        f"<pre>{html.escape(text)}</pre></body></html>\n"
    )


def _intervals(axes: Any, under: Preempted) -> None:
    """Where the time goes, for each interval that was tried."""
    best = under.sweep.best
    points = [one for one in under.sweep.points if not one.unfinished]
    minutes = [one.interval_s / 60 for one in points]
    for name, colour, share in (
        ("lost work", _COLOURS["lost"], "lost_share"),
        ("checkpoints", _COLOURS["saving"], "checkpoint_share"),
    ):
        means = [getattr(one, share) for one in points]
        axes.plot(minutes, [100 * one.mean for one in means], color=colour, label=name)
        low, high = (
            [100 * getattr(one, end) for one in means] for end in ("low", "high")
        )
        axes.fill_between(minutes, low, high, color=colour, alpha=0.2, linewidth=0)
    least = best.wall_s.mean
    axes.plot(
        minutes,
        [100 * (one.wall_s.mean / least - 1) for one in points],
        color="#333333",
        linestyle="--",
        label="longer than the best",
    )
    axes.axvline(best.interval_s / 60, ymax=0.85, color="#888888", zorder=0)
    axes.annotate(
        f"best: {duration(best.interval_s)}",
        (best.interval_s / 60, 0.85),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
    )
    given = under.sweep.given
    if not given.unfinished:
        axes.plot(
            given.interval_s / 60,
            100 * given.lost_share.mean,
            "o",
            color=_COLOURS["lost"],
            label=f"the recipe's interval, {duration(given.interval_s)}",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("minutes between checkpoints")
    axes.set_ylabel("% of the run's time")
    # Room for the legend.
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set_title(f"What preemptions cost (means of {best.runs} runs, 95 % bands)")
    axes.legend(frameon=False, ncols=4, loc="upper center", fontsize="small")


def _run(axes: Any, under: Preempted) -> None:
    """Nodes of one run over time, and what they did."""
    shown = under.example
    spans = [span for span in shown.spans if span.nodes]
    for phase in ("training", "starting", "saving"):
        chosen = [span for span in spans if span.phase == phase]
        _bars(axes, phase, [(one.start_s, one.end_s, one.nodes) for one in chosen])
    ends = {span.end_s: span.nodes for span in spans if span.phase == "training"}
    _bars(axes, "lost", [(start, end, ends[end]) for start, end in shown.lost])
    end = shown.spans[-1].end_s if shown.spans else 0.0
    alive = [*shown.alive, (end, shown.alive[-1][1])]
    axes.step(
        [time / _HOUR for time, _ in alive],
        [count for _, count in alive],
        where="post",
        color="#333333",
        linewidth=1,
        label="nodes that are up",
    )
    # By hand: what did not happen in this run has a colour too.
    for name, colour in _COLOURS.items():
        axes.bar(0, 0, color=colour, label=_WORDS[name])
    axes.set_xlabel("hours")
    axes.set_ylabel("nodes")
    axes.set_xlim(0, end / _HOUR)
    axes.set_ylim(0, 1.25 * under.training.nodes)
    interval = duration(under.training.interval_s)
    axes.set_title(f"One of the runs, with a checkpoint every {interval}")
    axes.legend(frameon=False, ncols=5, loc="upper center", fontsize="small")


def _bars(axes: Any, phase: str, bars: list[tuple[float, float, int]]) -> None:
    axes.bar(
        [start / _HOUR for start, _, _ in bars],
        [nodes for _, _, nodes in bars],
        width=[(end - start) / _HOUR for start, end, _ in bars],
        align="edge",
        color=_COLOURS[phase],
        linewidth=0,
    )
