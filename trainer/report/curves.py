"""Curves on the page: which metrics there are, how they are grouped and drawn.

Owns the groups, titles and the data that the page's script draws anew when a reader
chooses runs, axes or smoothing. Does not own the marks (`trainer.report.charts`,
`report.js`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trainer.report.charts import (
    FRAME,
    SERIES_COLOURS,
    Series,
    colour_class,
    curves,
    smoothed,
    span,
    thin,
)
from trainer.report.data import Run
from trainer.report.elements import card, folded, grid, legend

_SMALL_HEIGHT = 180


@dataclass(frozen=True, kw_only=True)
class Group:
    """Metrics that belong together: those whose name `pattern` matches whole."""

    title: str
    pattern: str
    folded: bool = False
    lead: str = ""


# A metric goes to the first group that takes it; the last takes what is left.
GROUPS = (
    Group(title="Losses", pattern=r"(?!val_|probe_)(\w+_)?loss"),
    Group(
        title="On held-out pairs",
        pattern=r"val_(\w+_)?loss",
        lead="The same pairs and masks in all runs that share eval.seed and data.",
    ),
    Group(
        title="Words and pixels", pattern=r"(val_)?\w+_(accuracy|r1)|psnr|temperature"
    ),
    Group(title="Optimizer", pattern=r"lr|(?!val_|probe_)\w*norm"),
    Group(
        title="By masking mode",
        pattern=r"\w*_(image_heavy|text_heavy|light)",
    ),
    Group(title="Probes while training", pattern=r"probe_\w+", folded=True),
    Group(
        title="Speed and memory",
        pattern=r"\w+_(per_s|s|frac|gib|bytes|tflops)|mfu",
        folded=True,
    ),
    Group(title="Everything else", pattern=r".*", folded=True),
)
# Not curves: numbers that name a place, or never change.
_NO_CURVES = ("epoch", "val_pairs", "probe_pairs")
_TITLES = {
    "loss": "Total loss",
    "mlm_loss": "MLM: nats a masked word",
    "recon_loss": "RECON: squared error a masked pixel",
    "mim_loss": "MIM: absolute error a masked value",
    "itc_loss": "ITC: nats a pair",
    "itm_loss": "ITM: nats a pair",
    "itc_image_to_text_r1": "ITC: share of images whose text ranks first",
    "itc_text_to_image_r1": "ITC: share of texts whose image ranks first",
    "mlm_accuracy": "Share of masked words right",
    "itm_accuracy": "Share of ITM pairs right",
    "psnr": "PSNR of reconstructions, dB",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "param_norm": "Parameter norm",
    "pairs_per_s": "Pairs a second",
    "tokens_per_s": "Tokens a second",
    "step_s": "Seconds a step",
    "data_wait_frac": "Share of time waiting for data",
    "padding_frac": "Share of padding",
    "peak_memory_gib": "Peak memory, GiB",
    "mfu": "Model FLOPs utilisation",
    "model_tflops": "Model TFLOP/s",
    "read_s": "Seconds of reading",
    "decode_s": "Seconds of decoding",
    "cut_captions_frac": "Share of captions cut",
    "replaced": "Damaged samples replaced",
    "damaged": "Damaged pairs left out",
    "probe_mlm_true": "MLM probe: loss with its own image",
    "probe_mlm_shuffled_gap": "MLM probe: another's image costs",
    "probe_mlm_blank_gap": "MLM probe: a blank image costs",
    "probe_recon_true": "RECON probe: loss with its own caption",
    "probe_recon_shuffled_gap": "RECON probe: another's caption costs",
    "probe_recon_empty_gap": "RECON probe: an empty caption costs",
    "probe_mim_true": "MIM probe: loss with its own caption",
    "probe_mim_shuffled_gap": "MIM probe: another's caption costs",
    "probe_mim_empty_gap": "MIM probe: an empty caption costs",
}
_MODES = re.compile(r"(\w+)_(image_heavy|text_heavy|light)")
# Measured exactly or seldom: nothing to smooth.
_EXACT = re.compile(r"lr|(val|probe)_.*|param_norm|peak_memory_gib")
_FROM_ZERO = re.compile(r"lr|grad_norm|\w*accuracy\w*|\w+_(per_s|frac|s)|mfu|\w+_gap")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of all runs that have it."""

    name: str
    series: Sequence[Series]

    @property
    def noisy(self) -> bool:
        """Whether single steps scatter enough to need smoothing."""
        return not _EXACT.fullmatch(self.name)

    @property
    def zero(self) -> bool:
        """Whether its axis starts at 0."""
        return bool(_FROM_ZERO.fullmatch(self.name))

    @property
    def is_loss(self) -> bool:
        """Whether a logarithmic axis makes sense."""
        return "loss" in self.name or self.name == "grad_norm"


def title_of(name: str) -> str:
    """What a metric is called on the page."""
    if name.startswith("val_"):
        inner = title_of(name.removeprefix("val_"))
        return f"Held out: {_lower(inner)}"
    mode = _MODES.fullmatch(name)
    if mode:
        return f"{title_of(mode[1])}, {mode[2].replace('_', '-')}"
    return _TITLES.get(name, name.replace("_", " "))


def read_metrics(runs: Sequence[Run]) -> list[Metric]:
    """Every metric that some run has numbers of."""
    names = dict.fromkeys(name for run in runs for name in run.names())
    return [_metric(runs, name) for name in names if name not in _NO_CURVES]


def curve_groups(runs: Sequence[Run], metrics: Sequence[Metric]) -> str:
    """Controls and all curves, group by group."""
    if not metrics:
        return ""
    names = [run.name for run in runs]
    parts = [_controls(names), legend(names, classes="unscripted")]
    left = list(metrics)
    for group in GROUPS:
        own = [one for one in left if re.fullmatch(group.pattern, one.name)]
        left = [one for one in left if one not in own]
        own.sort(key=lambda one: _order(one.name))
        cards = grid(*(_card(one, small=group.folded) for one in own), classes="three")
        lead = f'<p class="lead">{escape(group.lead)}</p>' if group.lead else ""
        if own and group.folded:
            parts.append(folded(f"{group.title} ({len(own)})", lead, cards))
        elif own:
            parts.append(f'<h3 class="group">{escape(group.title)}</h3>{lead}{cards}')
    return "".join(parts)


def curve_data(runs: Sequence[Run], metrics: Sequence[Metric]) -> str:
    """What the script draws from, as a JSON element that ends nowhere early."""
    data = {
        "frame": FRAME,
        "colours": SERIES_COLOURS,
        "runs": [_run_data(run) for run in runs],
        "curves": {one.name: _curve_data(one) for one in metrics},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # A name with "</script>" in it would end the element.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="curves">{text}</script>'


def _metric(runs: Sequence[Run], name: str) -> Metric:
    series = []
    for colour, run in enumerate(runs):
        steps, values = run.curve(name)
        if values:
            one = Series(name=run.name, colour=colour, steps=steps, values=values)
            series.append(one)
    return Metric(name=name, series=series)


def _card(metric: Metric, *, small: bool) -> str:
    title = title_of(metric.name)
    drawn = curves(
        metric.series,
        label=title,
        height=_SMALL_HEIGHT if small else None,
        raw=metric.noisy,
        zero=metric.zero,
        key=metric.name,
    )
    return card(f'<div class="curve">{drawn}</div>', title=title)


def _controls(names: Sequence[str]) -> str:
    """What a reader can choose; the script shows it, and does what it says."""
    runs = "".join(
        f'<label class="run {colour_class(place)}"><input type="checkbox" name="run" '
        f'value="{place}" checked><i></i>{escape(name)}</label>'
        for place, name in enumerate(names)
    )
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{value}"'
        f"{' checked' if value == 'step' else ''}>{text}</label>"
        for value, text in (
            ("step", "step"),
            ("pairs", "pairs"),
            ("time", "training time"),
        )
    )
    return (
        '<form class="controls" hidden autocomplete="off">'
        + (f'<div role="group" aria-label="Runs">{runs}</div>' if names[1:] else "")
        + f'<div role="radiogroup" aria-label="Horizontal axis">by {axes}</div>'
        '<div><label><input type="checkbox" name="smooth" checked>smooth</label>'
        '<label><input type="checkbox" name="log">logarithmic losses</label></div>'
        "</form>"
    )


def _run_data(run: Run) -> dict[str, Any]:
    batch = run.config.get("global_batch")
    steps, seconds = run.clock()
    clock = thin(steps, seconds, extremes=False)
    return {
        "name": run.name,
        "batch": batch if isinstance(batch, int) else 0,
        "clock": _columns(clock),
    }


def _curve_data(metric: Metric) -> dict[str, Any]:
    series, lines = [], [one.values for one in metric.series]
    for one, line in zip(
        metric.series, smoothed(metric.series) if metric.noisy else lines, strict=True
    ):
        raw = thin(one.steps, one.values, extremes=True) if metric.noisy else []
        series.append(
            {
                "run": one.colour,
                "span": [_short(end) for end in span(one, line)],
                "line": _columns(thin(one.steps, line, extremes=False)),
                "raw": _columns(raw) if raw else None,
            }
        )
    return {"log": metric.is_loss, "zero": metric.zero, "series": series}


def _columns(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[int(step) for step, _ in points], [_short(value) for _, value in points]]


def _short(value: float) -> float:
    """Six significant digits: more than a screen has pixels."""
    return float(f"{value:.6g}")


def _order(name: str) -> tuple[bool, int, str]:
    """Metrics in the order of their titles, then the others; held-out ones last."""
    known = list(_TITLES)
    base = name.removeprefix("val_")
    mode = _MODES.fullmatch(base)
    base = mode[1] if mode else base
    place = known.index(base) if base in known else len(known)
    return name.startswith("val_"), place, name


def _lower(text: str) -> str:
    """A title inside a sentence; abbreviations stay as they are."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]
