"""The page of a report: its frame, the training curves, speeds, configurations.

Owns the order of the parts. Data is in `trainer.report_dataset`, probes in
`trainer.report_probes`, elements in `trainer.report_html`, looks in `report.css`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from trainer.report_charts import Series, curves, number
from trainer.report_data import DatasetView, Run
from trainer.report_dataset import dataset_sections
from trainer.report_html import (
    card,
    document,
    folded,
    grid,
    header,
    legend,
    missing,
    section,
    table,
)
from trainer.report_probes import PROBES, headline, probe_sections, shuffled_gap

LOSSES = (
    ("loss", "Total loss"),
    ("mlm_loss", "MLM: nats a masked word"),
    ("recon_loss", "RECON: squared error a masked pixel"),
)
# metric, title, whether single steps scatter enough to need smoothing
SMALL = (
    ("lr", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("mlm_accuracy", "Share of masked words right", True),
)
# metric, column, factor, unit
SPEEDS = (
    ("pairs_per_s", "pairs/s", 1, ""),
    ("tokens_per_s", "tokens/s", 1, ""),
    ("step_s", "step", 1000, " ms"),
    ("data_wait_frac", "waiting for data", 100, " %"),
    ("padding_frac", "padding", 100, " %"),
)
# Keys that differ between any two runs.
_OWN_KEYS = ("output",)


def page(runs: Sequence[Run], datasets: Sequence[DatasetView]) -> str:
    """The whole HTML document. It refers to nothing outside itself."""
    names = (
        " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    )
    parts = [
        _header(runs, datasets),
        *(part for view in datasets for part in dataset_sections(view)),
        "" if datasets else _no_dataset(runs[0]),
        _training(runs),
        *probe_sections(runs),
        _speeds(runs),
        _configurations(runs),
        _commands(runs),
    ]
    return document(names, *parts)


def _header(runs: Sequence[Run], datasets: Sequence[DatasetView]) -> str:
    sources = [
        name for view in datasets if view.manifest for name in view.manifest.sources
    ]
    subject = ", ".join(dict.fromkeys(sources)) or "pretraining"
    tiles = _tiles(runs, datasets)
    return header(subject, tiles, kicker="Palimpsest", lead=headline(runs))


def _tiles(
    runs: Sequence[Run], datasets: Sequence[DatasetView]
) -> list[tuple[str, str, str]]:
    """(name, value, note) of the numbers that one asks for first."""
    tiles = []
    for view in datasets[:1]:
        if view.manifest:
            train, val = (view.manifest.samples(name) for name in ("train", "val"))
            tiles.append(("pairs to train on", f"{train:,}", f"{val:,} held out"))
    steps = max((run.steps for run in runs), default=0)
    if steps:
        batch = runs[0].config.get("global_batch")
        done = sum(run.complete for run in runs)
        note = f"{len(runs)} run{'s' * (len(runs) > 1)}, {done} complete"
        note += f", {batch} pairs a step" if batch else ""
        tiles.append(("steps", f"{steps:,}", note))
    tiles += [tile for probe in PROBES if (tile := _gap_tile(runs, probe[0], probe[3]))]
    speed = runs[0].typical("pairs_per_s")
    if speed:
        tiles.append(("speed", f"{number(speed)}", "pairs/s, median"))
    return tiles


def _gap_tile(
    runs: Sequence[Run], probe: str, partner: str
) -> tuple[str, str, str] | None:
    """What another pair's partner costs the first run that was measured."""
    for run in runs:
        if gap := shuffled_gap(run, probe):
            low, high = gap["ci95"]
            step = 10.0 ** (math.floor(math.log10(abs(gap["mean"]) or 1)) - 1)
            span = f"95 %: {number(low, step)} to {number(high, step)}"
            sign = "+" if gap["mean"] > 0 else ""
            unit = " nats" if probe == "mlm" else ""
            name = f"{run.name}, " if len(runs) > 1 else ""
            value = f"{sign}{number(gap['mean'], step)}{unit}"
            return f"a wrong {partner} costs", value, name + span
    return None


def _training(runs: Sequence[Run]) -> str:
    waiting = [
        missing(f"No step of {run.name} yet.", _pretrain(run))
        for run in runs
        if not run.metrics
    ]
    losses = [
        card(curves(_series(runs, name), label=title), title=title)
        for name, title in LOSSES
        if any(run.curve(name)[1] for run in runs)
    ]
    small = [
        card(
            curves(_series(runs, name), label=title, height=180, raw=raw, zero=True),
            title=title,
        )
        for name, title, raw in SMALL
        if any(run.curve(name)[1] for run in runs)
    ]
    lead = (
        "Smoothed over a fiftieth of the run; faint, every step as it was."
        if losses
        else ""
    )
    return section(
        "Training",
        legend([run.name for run in runs]),
        grid(*losses, classes="three"),
        grid(*small, classes="three"),
        _loss_table(runs) if losses else "",
        *waiting,
        lead=lead,
    )


def _series(runs: Sequence[Run], name: str) -> list[Series]:
    series = []
    for colour, run in enumerate(runs):
        steps, values = run.curve(name)
        series.append(Series(name=run.name, colour=colour, steps=steps, values=values))
    return series


def _loss_table(runs: Sequence[Run]) -> str:
    """Mean losses of the last twentieth, which a single step would not tell."""
    rows = []
    for run in runs:
        cells = [run.name, f"{run.steps:,}"]
        for name, _ in LOSSES:
            values = run.curve(name)[1]
            tail = values[-max(len(values) // 20, 1) :]
            cells.append(f"{sum(tail) / len(tail):.4f}" if tail else "")
        rows.append(cells)
    head = ["mean of the last 5 %", "steps", "total", "MLM", "RECON"]
    return table(head, rows)


def _speeds(runs: Sequence[Run]) -> str:
    columns = [one for one in SPEEDS if any(run.curve(one[0])[1] for run in runs)]
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


def _configurations(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.config]
    if not known:
        cure = _pretrain(runs[0])
        return section("Configuration", missing("No config.yaml.", cure))
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    rows = [[key, *(str(run.config.get(key, "")) for run in known)] for key in keys]
    differing = [row for row in rows if len({*row[1:]}) > 1 and row[0] not in _OWN_KEYS]
    head = ["key", *(run.name for run in known)]
    body = []
    if differing:
        body.append(card(table(head, differing, texts=len(head)), title="Differences"))
    elif len(known) > 1:
        body.append("<p>The runs differ in nothing but where they were written.</p>")
    body.append(folded("Every key", table(head, rows, texts=len(head))))
    return section("Configuration", *body)


def _commands(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        probes = (run.probes or {}).get("command")
        lines += list(run.commands) or ([probes] if probes else [])
    if not lines:
        body = '<p class="missing">The commands were not recorded.</p>'
        return section("Commands", body)
    # Runs share some, such as the one that made their dataset.
    blocks = [f"<pre>{escape(line)}</pre>" for line in dict.fromkeys(lines)]
    return section("Commands", *blocks, lead="What was run, in order.")


def _no_dataset(run: Run) -> str:
    notice = missing("No run names its dataset.", _pretrain(run))
    return section("Data", notice)


def _pretrain(run: Run) -> str:
    """The command that makes a run, with what is known of it."""
    data = " ".join(run.data) or "SHARDS"
    return (
        "deepspeed --module trainer.pretrain --config RECIPE "
        f"--data {data} --output {run.path}"
    )
