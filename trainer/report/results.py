"""Numbers on the page: how far each run got, its losses, its speed.

Owns which numbers stand in the tables and which way is better. Does not own curves
(`trainer.report.curves`) or probes with their intervals (`trainer.report.probes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from trainer.report.charts import number
from trainer.report.curves import title_of
from trainer.report.data import Run
from trainer.report.elements import card, section, table
from trainer.report.probes import PROBES, shuffled_gap

# Share of the last steps of a run that its training numbers are a mean of.
_TAIL = 20
# What a model is judged by: losses first, whichever it has.
_KINDS = (r"(?!val_|probe_)(\w+_)?loss", r"(?!val_|probe_)(\w+_accuracy|psnr)")
_HELD_OUT_KINDS = (r"val_(\w+_)?loss", r"val_\w+_(accuracy|r1)")
# metric, column, factor, unit
_SPEEDS = (
    ("pairs_per_s", "pairs/s", 1, ""),
    ("tokens_per_s", "tokens/s", 1, ""),
    ("step_s", "step", 1000, " ms"),
    ("data_wait_frac", "waiting for data", 100, " %"),
    ("padding_frac", "padding", 100, " %"),
    ("mfu", "MFU", 100, " %"),
    ("peak_memory_gib", "peak memory", 1, " GiB"),
)
Better = Literal["lower", "higher", ""]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A number of each run, as text; which way is better, if any is."""

    title: str
    values: Sequence[float | None]
    texts: Sequence[str]
    better: Better = ""

    def best(self) -> set[int]:
        """Places of the best runs; none where there is nothing to choose from."""
        known = {
            place: value for place, value in enumerate(self.values) if value is not None
        }
        if not self.better or len(set(known.values())) < 2:
            return set()
        pick = min if self.better == "lower" else max
        best = pick(known.values())
        return {place for place, value in known.items() if value == best}


def results_section(runs: Sequence[Run]) -> str:
    """How far each run got, and its final numbers, the best of each line marked."""
    lines = [*_lines(runs)]
    if not lines:
        return ""
    lead = f"Training: mean of a run's last {100 // _TAIL} % of steps."
    if any(run.validation for run in runs):
        lead += " Held out: the last measurement."
    if len(runs) > 1:
        lead += " Losses compare where masks and steps taken are alike."
    states = [_state(run) for run in runs]
    head = "".join(f'<th class="n">{escape(run.name)}</th>' for run in runs)
    cells = "".join(f'<td class="n">{escape(state)}</td>' for state in states)
    body = "".join(_line(line) for line in lines)
    drawn = (
        f'<div class="scroll"><table class="results"><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody><tr><td>state</td>{cells}</tr>{body}</tbody></table></div>"
    )
    return section("Results", card(drawn), lead=lead)


def speed_section(runs: Sequence[Run]) -> str:
    """Medians of what a step cost."""
    columns = [one for one in _SPEEDS if any(run.curve(one[0])[1] for run in runs)]
    if not columns:
        return ""
    rows = []
    for run in runs:
        cells = [run.name]
        for name, _, factor, unit in columns:
            value = run.typical(name)
            cells.append("" if value is None else f"{number(value * factor)}{unit}")
        rows.append(cells)
    head = ["median of all steps", *(title for _, title, _, _ in columns)]
    lead = "Padding is the share of rows in the flat token stream that hold no token."
    return section("Speed", card(table(head, rows)), lead=lead)


def _lines(runs: Sequence[Run]) -> Iterator[Line]:
    for name in _names(runs, _KINDS):
        yield from _of_metric(runs, name, title_of(name), _tail_mean)
    for name in _names(runs, _HELD_OUT_KINDS):
        yield from _of_metric(runs, name, title_of(name), _last)
    yield from _best_step(runs)
    for probe, _, _, partner in PROBES:
        gaps = [shuffled_gap(run, probe) for run in runs]
        values = [gap["mean"] if gap else None for gap in gaps]
        # How much a model uses its partner is a finding, not a score.
        if any(gaps):
            title = f"Probe: a wrong {partner} costs, {probe.upper()} loss"
            yield _numbers(title, values, "")
    speeds = [run.typical("pairs_per_s") for run in runs]
    if any(speeds):
        yield _numbers("Pairs a second, median", speeds, "higher")


def _names(runs: Sequence[Run], kinds: Sequence[str]) -> list[str]:
    """Metrics of any of the runs that one of `kinds` matches, in their order."""
    every = dict.fromkeys(name for run in runs for name in run.names())
    return [name for kind in kinds for name in every if re.fullmatch(kind, name)]


def _of_metric(
    runs: Sequence[Run],
    name: str,
    title: str,
    pick: Callable[[Sequence[float]], float | None],
) -> Iterator[Line]:
    values = [pick(run.curve(name)[1]) for run in runs]
    if any(value is not None for value in values):
        yield _numbers(title, values, "lower" if "loss" in name else "higher")


def _best_step(runs: Sequence[Run]) -> Iterator[Line]:
    """The lowest held-out loss of each run, and when that was."""
    values, texts = [], []
    for run in runs:
        steps, losses = run.curve("val_loss")
        best = min(zip(losses, steps, strict=True), default=None)
        values.append(best[0] if best else None)
        texts.append(f"{best[0]:.4f} at step {best[1]:,.0f}" if best else "")
    if any(texts):
        title = "Held out: lowest total loss"
        yield Line(title=title, values=values, texts=texts, better="lower")


def _numbers(title: str, values: Sequence[float | None], better: Better) -> Line:
    texts = ["" if value is None else _text(value) for value in values]
    return Line(title=title, values=values, texts=texts, better=better)


def _line(line: Line) -> str:
    best = line.best()
    cells = [f"<td>{escape(line.title)}</td>"]
    for place, text in enumerate(line.texts):
        mark = '<b class="best">best</b> ' if place in best else ""
        cells.append(f'<td class="n">{mark}{escape(text)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _state(run: Run) -> str:
    if not run.steps:
        return "no step yet"
    if run.complete:
        return f"complete, {run.steps:,} steps"
    total = f" of {run.scheduled:,}" if run.scheduled else ""
    return f"step {run.steps:,}{total}"


def _tail_mean(values: Sequence[float]) -> float | None:
    """Mean of the last twentieth, which a single step would not tell."""
    tail = values[-max(len(values) // _TAIL, 1) :]
    return sum(tail) / len(tail) if tail else None


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _text(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else number(value)
