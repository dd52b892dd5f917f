"""Charts of a report as inline SVG: curves over steps, and means with intervals.

Owns scales, ticks and marks. Colours come from the page's style sheet by class, `s0`
to `s7` for runs, so that charts follow the reader's light or dark theme. Does not own
what is drawn (`trainer.report.page`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SERIES_COLOURS = 8
_POINTS = 320
# Sizes of the drawing; the page scales it to its column, text with it.
_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 24
# Room for the name of an axis.
_NAME = 52
FRAME = {
    "width": _WIDTH,
    "left": _LEFT,
    "right": _RIGHT,
    "top": _TOP,
    "bottom": _BOTTOM,
}
"""The same for the script that draws curves anew."""
_INTERVALS_WIDTH, _INTERVALS_LEFT, _INTERVALS_RIGHT, _ROW = 520, 134, 76, 26


@dataclass(frozen=True, kw_only=True)
class Series:
    """A metric of one run."""

    name: str
    colour: int
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval, on a row of its own."""

    label: str
    colour: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Linear map of [low, high] to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def colour_class(place: int) -> str:
    """Style of the run at `place`; beyond the last colour they begin again, dashed."""
    again = " again" if place >= SERIES_COLOURS else ""
    return f"s{place % SERIES_COLOURS}{again}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    rough = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, step: float | None = None) -> str:
    """`value` for people: as many decimals as `step` between ticks needs, else three
    significant digits.
    """
    if value == 0:
        return "0"
    if step is None:
        step = 10 ** (math.floor(math.log10(abs(value))) - 2)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # 0.25 needs a digit more than its power of ten says.
    while decimals < 12 and abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, unbiased at the start."""
    keep = 1 - 1 / max(span, 1.0)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def smoothed(series: Sequence[Series]) -> list[list[float]]:
    """Curves as a chart shows them: all smoothed over a fiftieth of the longest, or a
    young run would look noisier than an old one.
    """
    width = max((len(one.values) for one in series), default=0) / 50
    return [smooth(one.values, width) for one in series]


def thin(
    steps: Sequence[float], values: Sequence[float], *, extremes: bool
) -> list[tuple[float, float]]:
    """At most about `_POINTS` points: of each bucket the lowest and highest in order
    (`extremes`), or the last. Both ends stay.
    """
    points = list(zip(steps, values, strict=True))
    if len(points) <= _POINTS:
        return points
    size = math.ceil(len(points) / (_POINTS / 2 if extremes else _POINTS))
    kept = [points[0]]
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        if extremes:
            ends = {min(bucket, key=_value), max(bucket, key=_value)}
            kept += sorted(ends)
        else:
            kept.append(bucket[-1])
    return [*kept, points[-1]]


def curves(
    series: Sequence[Series],
    *,
    label: str,
    height: int | None = None,
    raw: bool = True,
    zero: bool = False,
    key: str = "",
) -> str:
    """Lines over steps: each series smoothed, and faint as it was written (`raw`).

    Args:
        label: what the chart shows, for screen readers.
        zero: start the axis at 0.
        key: name by which a script finds the chart.
    """
    height = height or _HEIGHT
    drawn = [one for one in series if one.values]
    if not drawn:
        return ""
    last = max(one.steps[-1] for one in drawn)
    first = min(one.steps[0] for one in drawn)
    # Without raw lines a curve is exact.
    lines = smoothed(drawn) if raw else [one.values for one in drawn]
    low, high = _range(
        [span(one, line) for one, line in zip(drawn, lines, strict=True)], zero=zero
    )
    x = Scale(low=first, high=max(last, first + 1), start=_LEFT, end=_WIDTH - _RIGHT)
    y = Scale(low=low, high=high, start=height - _BOTTOM, end=_TOP)
    marks = []
    for one, line in zip(drawn, lines, strict=True):
        colour = colour_class(one.colour)
        if raw:
            points = thin(one.steps, one.values, extremes=True)
            marks.append(_path(points, x, y, f"raw {colour}"))
        points = thin(one.steps, line, extremes=False)
        marks.append(_path(points, x, y, f"line {colour}", escape(one.name)))
    frame = _y_grid(y, _WIDTH) + _x_axis(x, height, "step")
    found = f' data-curve="{escape(key)}"' if key else ""
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img"{found} '
        f'aria-label="{escape(label)}">{frame}'
        f'<svg x="0" y="{_TOP - 4}" width="{_WIDTH}" '
        f'height="{height - _BOTTOM - _TOP + 8}" viewBox="0 {_TOP - 4} {_WIDTH} '
        f'{height - _BOTTOM - _TOP + 8}">{"".join(marks)}</svg></svg>'
    )


def intervals(estimates: Sequence[Estimate], *, label: str, zero: bool = False) -> str:
    """Dots with 95 % intervals, one row each, values written beside them.

    Args:
        zero: draw the line at 0, which a gap has to clear.
    """
    ends = [end for one in estimates for end in (one.low, one.high, one.mean)]
    low, high = (
        min([*ends, *([0.0] if zero else [])]),
        max([*ends, 0.0 if zero else -math.inf]),
    )
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    left, right = _INTERVALS_LEFT, _INTERVALS_WIDTH - _INTERVALS_RIGHT
    x = Scale(low=low - margin, high=high + margin, start=left, end=right)
    height = _ROW * len(estimates) + _BOTTOM + 4
    digit = 10.0 ** _decade(high - low)
    rows = []
    for place, one in enumerate(estimates):
        y = _ROW * (place + 0.5) + 4
        title = f"{one.mean:.5g}, 95 % interval {one.low:.5g} to {one.high:.5g}"
        # Runs under one condition stand together; its name stands once.
        known = place > 0 and estimates[place - 1].label == one.label
        rows.append(
            f'<g class="{colour_class(one.colour)}">'
            f"<title>{escape(one.label)}: {title}</title>"
            f'<text class="row" x="{left - 12}" y="{y + 4}">'
            f"{'' if known else escape(one.label)}</text>"
            f'<line class="whisker" x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" '
            f'y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{x(one.mean):.1f}" cy="{y}" r="5"/>'
            f'<text class="value" x="{right + 12}" y="{y + 4}">'
            f"{number(one.mean, digit)}</text></g>"
        )
    axis = _x_axis(x, height, "", grid=True)
    if zero:
        axis += (
            f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" '
            f'y2="{height - _BOTTOM}"/>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {_INTERVALS_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{axis}{"".join(rows)}</svg>'
    )


def _decade(span: float) -> int:
    """Power of ten of the last digit worth showing over `span`."""
    return math.floor(math.log10(span)) - 2 if span > 0 else -3


def _tick(mark: float, step: float | None) -> str:
    """A tick's number; small ones without the zeros that would not fit."""
    if mark and step and step < 1e-4:
        return f"{mark:.2g}"
    text = number(mark, step)
    return text.rstrip("0") if "." in text and abs(mark) < 0.01 else text


def _value(point: tuple[float, float]) -> float:
    return point[1]


def span(series: Series, line: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value worth an axis: of the smoothed line past its first
    hundredth, and of nearly all raw values. A run's first steps and single spikes would
    press the rest flat.
    """
    settled = line[len(line) // 100 :]
    raw = sorted(series.values)
    low = min(*settled, raw[len(raw) // 200])
    return low, max(*settled, raw[-1 - len(raw) // 50])


def _range(spans: Sequence[tuple[float, float]], *, zero: bool) -> tuple[float, float]:
    low = min(low for low, _ in spans)
    high = max(high for _, high in spans)
    low = min(low, 0.0) if zero else low
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def _path(
    points: Sequence[tuple[float, float]],
    x: Scale,
    y: Scale,
    classes: str,
    title: str = "",
) -> str:
    places = [f"{x(step):.1f} {y(value):.1f}" for step, value in points]
    if len(places) == 1:
        left, top = places[0].split()
        return f'<circle class="dot {classes}" cx="{left}" cy="{top}" r="3"/>'
    path = "M" + "L".join(places)
    return f'<path class="{classes}" d="{path}"><title>{title}</title></path>'


def _y_grid(y: Scale, width: int) -> str:
    marks = ticks(y.low, y.high, 5)
    step = marks[1] - marks[0] if len(marks) > 1 else None
    return "".join(
        f'<line class="rule" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(mark):.1f}" '
        f'y2="{y(mark):.1f}"/><text class="tick end" x="{_LEFT - 8}" '
        f'y="{y(mark) + 4:.1f}">{_tick(mark, step)}</text>'
        for mark in marks
    )


def _x_axis(x: Scale, height: int, name: str, *, grid: bool = False) -> str:
    marks = ticks(x.low, x.high, 5)
    step = marks[1] - marks[0] if len(marks) > 1 else None
    base = height - _BOTTOM
    parts = [
        f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{base}" y2="{base}"/>'
    ]
    for mark in marks:
        if name and x(mark) < x.start + _NAME:
            # The name of the axis stands in the corner.
            continue
        at = f"{x(mark):.1f}"
        if grid:
            parts.append(f'<line class="rule" x1="{at}" x2="{at}" y1="0" y2="{base}"/>')
        parts.append(
            f'<text class="tick mid" x="{at}" y="{base + 16}">{_tick(mark, step)}'
            "</text>"
        )
    parts.append(f'<text class="tick" x="{x.start}" y="{base + 16}">{name}</text>')
    return "".join(parts)
