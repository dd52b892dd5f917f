"""What an evaluation writes: numbers, what was found of each example, and a page.

Owns the form of all three. Does not own the numbers (each task), intervals
(`trainer.tasks.bootstrap`) or the looks of a page (`trainer.report.elements`).
"""

from __future__ import annotations

import glob
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trainer.files import write_text, write_with
from trainer.report.elements import card, document, grid, header, image, section, table
from trainer.tasks.bootstrap import Interval, OneGroup

_PREDICTIONS = "_predictions."
# Of a picture on a page, in pixels.
_SIDE = 128


class Metric(NamedTuple):
    """A number, how sure it is, and what chance would give."""

    value: float
    ci95: Interval | None = None
    chance: float | None = None
    n: int | None = None
    """How many examples it is of."""

    @property
    def interval(self) -> list[float] | None:
        """Its interval, if it has one."""
        return None if isinstance(self.ci95, OneGroup) else self.ci95


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something to look at. Texts are escaped when the page is written."""

    images: Sequence[bytes]
    """As files: JPEG, PNG or WebP."""
    texts: Sequence[str]
    """What the model was shown or asked, a paragraph each."""
    title: str
    """What the model said, such as "0.93: match"."""
    note: str = ""
    """What is true."""


class Table(NamedTuple):
    """Numbers one by one, for the page: the first column is text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Predictions(NamedTuple):
    """What was said of each example, as others read it."""

    form: str
    """What the file's name ends in, such as "csv"."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a task found."""

    metrics: Mapping[str, Metric]
    """By name, the one to look at first at the top."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else belongs in the JSON: counts, settings, hashes of input files."""
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """By the title of their part of the page: best, worst, near the threshold."""
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What was found of each example, the same ones in the same order whatever the
    model is, so that two can be compared pair by pair."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """By the title of their part of the page."""
    predictions: Predictions | None = None
    """For a test server or an official script."""


def write_result(
    folder: Path, name: str, result: Result, *, facts: Mapping[str, Any]
) -> Path:
    """Write `folder/name.json`, `folder/name.html` and, where there are such,
    `folder/name.npz` with what is kept of each example and `folder/name_predictions.*`;
    the path of the first, which is written last.

    Args:
        facts: what the command knows: task, seed, step, data, manifest_sha256, command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(folder / f"{name}.html", page(name, result, facts=facts))
    if result.kept:
        write_with(folder / f"{name}.npz", lambda to: _save(to, result.kept))
    plain = as_plain(result, facts=facts)
    if result.predictions is not None:
        form, text = result.predictions
        plain["predictions"] = f"{name}{_PREDICTIONS}{form}"
        write_text(folder / plain["predictions"], text)
    write_text(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return path


def require_name(folder: Path, name: str, *, task: str, cure: str = "") -> None:
    """Raise ValueError where `write_result` would replace something else than a result
    of the task.

    Args:
        cure: what to do then; by default another --name.
    """
    path = folder / f"{name}.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("task") != task:
            raise _taken(path, task, cure)
        return
    # A page without its numbers: of something else, or a call that died between them.
    # The page, which is written first, says which.
    page_of_task = folder / f"{name}.html"
    if name == task or (page_of_task.is_file() and _is_page_of(page_of_task, task)):
        return
    predictions = sorted(folder.glob(f"{glob.escape(name + _PREDICTIONS)}*"))
    for other in (page_of_task, folder / f"{name}.npz", *predictions):
        if other.is_file():
            raise _taken(other, task, cure)


def _is_page_of(path: Path, task: str) -> bool:
    """Did `write_result` write this page, of a result of the task?"""
    # A row of "How it was measured": what else stands on a page is escaped.
    row = f"<td>task</td><td>{escape(task)}</td>"
    return row in path.read_text(encoding="utf-8", errors="replace")


def _taken(path: Path, task: str, cure: str) -> ValueError:
    cure = cure or f"give another --name, such as {task}-2"
    return ValueError(f"{path} is no result of {task}, and would be lost: {cure}")


def _save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def as_plain(result: Result, *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON file holds. What is not a number there is null."""
    metrics: dict[str, dict[str, Any]] = {
        name: {
            "value": _finite(metric.value),
            "ci95": None
            if metric.interval is None
            else [_finite(end) for end in metric.interval],
            "chance": metric.chance,
            "n": metric.n,
        }
        | ({"no_ci95": metric.ci95.why} if isinstance(metric.ci95, OneGroup) else {})
        for name, metric in result.metrics.items()
    }
    return {**facts, "metrics": metrics, **result.details}


def page(name: str, result: Result, *, facts: Mapping[str, Any]) -> str:
    """The HTML document. It refers to nothing outside itself."""
    first, metric = next(iter(result.metrics.items()))
    tiles = [(first, _short(metric.value), _interval(metric))]
    tiles += [
        (key, str(facts[key]), "") for key in ("step", "seed", "split") if key in facts
    ]
    rows = [
        (key, _short(one.value), _interval(one), _or_dash(one.chance), _or_dash(one.n))
        for key, one in result.metrics.items()
    ]
    head = ("", "value", "95 % interval", "chance", "examples")
    parts = [
        section(title, grid(*map(_card, examples), classes="three"))
        for title, examples in result.examples.items()
        if examples
    ]
    said = [(str(key), str(value)) for key, value in facts.items()]
    return document(
        name,
        header(name, tiles, kicker="Palimpsest"),
        section("Results", table(head, rows)),
        *(section(title, table(*one)) for title, one in result.tables.items()),
        *parts,
        section("How it was measured", table(("", ""), said, texts=2)),
        style=_STYLE,
    )


def print_table(result: Result) -> None:
    """The metrics, for a terminal."""
    width = max(map(len, result.metrics))
    for name, metric in result.metrics.items():
        line = f"  {name:{width}s}  {metric.value:.4f}"
        if metric.interval is not None:
            line += "  [{:.4f}, {:.4f}]".format(*metric.interval)
        if metric.chance is not None:
            line += f"   chance {metric.chance:.4f}"
        print(line)


_STYLE = """
.shown { display: flex; gap: .5rem; flex-wrap: wrap }
.shown img { width: auto; max-width: 48%; height: 9rem; object-fit: contain }
.card p.said { margin: .4rem 0 0; overflow-wrap: anywhere }
"""


def _card(example: Example) -> str:
    shown = "".join(image(one, "", suffix=_suffix(one)) for one in example.images)
    said = "".join(f'<p class="said">{escape(text)}</p>' for text in example.texts)
    return card(
        f'<div class="shown">{shown}</div>{said}',
        title=example.title,
        note=example.note,
    )


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if data[8:12] == b"WEBP" else ".jpg"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(metric: Metric) -> str:
    if metric.interval is None:
        return metric.ci95.why if isinstance(metric.ci95, OneGroup) else ""
    return "{:.4g} to {:.4g}".format(*metric.interval)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def thumbnail(pixels: np.ndarray) -> bytes:
    """(S, S, 3) uint8 as a JPEG of at most 128 px a side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()


def extremes(
    score: Sequence[float], right: Sequence[bool], count: int
) -> dict[str, list[int]]:
    """Numbers of examples to show: the surest right ones, the surest wrong ones, and
    those nearest to the threshold; of equal ones the first.

    Args:
        score: how far above (or below) the threshold each was put, signed.
        right: was it put on the right side?
    """
    order = sorted(range(len(score)), key=lambda row: (-abs(score[row]), row))

    def first(rows: Iterable[int]) -> list[int]:
        return [row for row, _ in zip(rows, range(count), strict=False)]

    return {
        "Best": first(row for row in order if right[row]),
        "Worst": first(row for row in order if not right[row]),
        "Near the threshold": first(sorted(order, key=lambda row: abs(score[row]))),
    }
