"""Charts of an inspection as inline SVG: histograms, ranks and sizes.

Owns scales, ticks and marks. Colours come from the page's style sheet by class, so that
charts follow the reader's light or dark theme. Does not own what is drawn
(`pipeline.inspect_page`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 24
_BINS = 36


def histogram(
    values: np.ndarray, *, label: str, unit: str = "", log: bool = False
) -> str:
    """How often values occur; whole numbers in few steps get a bar each.

    Args:
        label: what the chart shows, for screen readers.
        log: equal ratios, not differences, are equally wide.
    """
    values = values[np.isfinite(values)]
    if log:
        values = values[values > 0]
    if not len(values):
        return ""
    edges = _edges(values, log=log)
    counts, _ = np.histogram(values, edges)
    forward: Callable[[float], float] = math.log if log else float
    x = _scale(forward(edges[0]), forward(edges[-1]), _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, float(counts.max()), _HEIGHT - _BOTTOM, _TOP)
    heights = [t for t in ticks(0, float(counts.max()), 4) if t == round(t)]
    parts = [_rules(y, heights)]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        start, end = x(forward(low)), x(forward(high))
        gap = min(1.5, (end - start) / 6)
        said = f"{number(low)} to {number(high)}{unit}: {count:,}"
        parts.append(
            f'<rect class="bar" x="{start + gap / 2:.1f}" y="{y(float(count)):.1f}" '
            f'width="{end - start - gap:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y(float(count)):.1f}" rx="1.5">'
            f"<title>{escape(said)}</title></rect>"
        )
    at = _log_ticks(edges[0], edges[-1]) if log else ticks(edges[0], edges[-1], 5)
    if np.all(values == np.round(values)):
        at = [t for t in at if t == round(t)]
    parts.append(_marks(x, forward, at, unit))
    middle = float(np.median(values))
    parts.append(
        f'<line class="median" x1="{x(forward(middle)):.1f}" y1="{_TOP}" '
        f'x2="{x(forward(middle)):.1f}" y2="{_HEIGHT - _BOTTOM}"/>'
    )
    return _svg(label, parts)


def size_map(width: np.ndarray, height: np.ndarray, *, label: str) -> str:
    """Widths against heights: the more images of a size, the larger its dot."""
    sound = (width > 0) & (height > 0)
    if not sound.any():
        return ""
    most = float(max(width.max(), height.max()))
    cell = max(most / 48, 1)
    places, counts = np.unique(
        np.stack([width[sound] // cell, height[sound] // cell]),
        axis=1,
        return_counts=True,
    )
    side = _HEIGHT + 70
    x = _scale(0, most * 1.04, _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, most * 1.04, side - _BOTTOM, _TOP)
    parts = [_rules(y, ticks(0, most, 5))]
    parts.append(
        f'<line class="square" x1="{x(0):.1f}" y1="{y(0):.1f}" '
        f'x2="{x(most):.1f}" y2="{y(most):.1f}"/>'
    )
    for (column, row), count in zip(places.T, counts, strict=True):
        radius = 2 + 7 * math.sqrt(count / counts.max())
        middle = (column + 0.5) * cell, (row + 0.5) * cell
        said = f"about {number(middle[0])} x {number(middle[1])}: {count:,}"
        parts.append(
            f'<circle class="dot" cx="{x(middle[0]):.1f}" cy="{y(middle[1]):.1f}" '
            f'r="{radius:.1f}"><title>{escape(said)}</title></circle>'
        )
    parts.append(_marks(x, float, ticks(0, most, 5), " px", bottom=side))
    return _svg(label, parts, height=side)


def ranks(counts: np.ndarray, *, label: str) -> str:
    """Occurrences of vocabulary entries from the commonest to the rarest, both axes
    logarithmic.
    """
    found = np.sort(counts[counts > 0])[::-1].astype(float)
    if len(found) < 2:
        return ""
    x = _scale(0, math.log(len(found)), _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, math.log(max(found[0], 2)), _HEIGHT - _BOTTOM, _TOP)
    at = np.unique(np.geomspace(1, len(found), 160).round().astype(int))
    points = " ".join(
        f"{x(math.log(n)):.1f},{y(math.log(found[n - 1])):.1f}" for n in at
    )
    rules = [t for t in _log_ticks(1, found[0]) if math.log10(t) % 1 == 0]
    parts = [
        f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
        f'y1="{y(math.log(t)):.1f}" y2="{y(math.log(t)):.1f}"/>'
        f'<text class="tick end" x="{_LEFT - 6}" y="{y(math.log(t)) + 4:.1f}">'
        f"{short(t)}</text>"
        for t in rules
    ]
    decades = [t for t in _log_ticks(1, len(found)) if math.log10(t) % 1 == 0]
    parts.append(_marks(x, math.log, decades, ""))
    parts.append(f'<polyline class="line" points="{points}"/>')
    return _svg(label, parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number for people: three digits, more where it is whole."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def short(value: float) -> str:
    """A number for an axis: 12k, 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _edges(values: np.ndarray, *, log: bool) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    whole = bool(np.all(values == np.round(values)))
    if log:
        margin = 1.02 if high / low < 1.05 else 1.0
        return np.geomspace(low / margin, high * margin * 1.0001, _BINS + 1)
    if whole:
        # Bars between whole numbers would be empty now and then, and lie.
        step = max(1, math.ceil((high - low + 1) / _BINS))
        return np.arange(low - 0.5, high + step + 0.5, step)
    margin = 0.5 if high == low else 0
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _scale(
    low: float, high: float, start: float, end: float
) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about four of them."""
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1, 1.5, 2, 3, 4, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [
            m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high
        ]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return [t for t in ticks(low, high, 4) if t > 0]


def _rules(y: Callable[[float], float], at: Sequence[float]) -> str:
    return "".join(
        f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" '
        f'y2="{y(t):.1f}"/><text class="tick end" x="{_LEFT - 6}" '
        f'y="{y(t) + 4:.1f}">{short(t)}</text>'
        for t in at
    )


def _marks(
    x: Callable[[float], float],
    forward: Callable[[float], float],
    at: Sequence[float],
    unit: str,
    *,
    bottom: int = _HEIGHT,
) -> str:
    drawn = []
    for place, t in enumerate(at):
        last = unit if place == len(at) - 1 else ""
        drawn.append(
            f'<text class="tick mid" x="{x(forward(t)):.1f}" y="{bottom - 7}">'
            f"{short(t)}{escape(last)}</text>"
        )
    return "".join(drawn)


def _svg(label: str, parts: Sequence[str], *, height: int = _HEIGHT) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {_WIDTH} {height}">{"".join(parts)}</svg>'
    )
