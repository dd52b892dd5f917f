"""The page of a report: its top, and the order of its parts.

Data is in `trainer.report.dataset`, curves in `trainer.report.curves`, numbers in
`trainer.report.results`, probes in `trainer.report.probes`, configurations in
`trainer.report.configs`, elements in `trainer.report.elements`, looks in `report.css`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.report.charts import number
from trainer.report.configs import (
    commands_section,
    configuration_section,
    pretrain_command,
)
from trainer.report.curves import curve_data, curve_groups, read_metrics
from trainer.report.data import DatasetView, Run
from trainer.report.dataset import dataset_sections
from trainer.report.elements import document, header, missing, section
from trainer.report.panels import panels_section
from trainer.report.probes import PROBES, headline, probe_sections, shuffled_gap
from trainer.report.results import results_section, speed_section


def page(
    runs: Sequence[Run], datasets: Sequence[DatasetView], *, panels: int = 8
) -> str:
    """The whole HTML document. It refers to nothing outside itself.

    Args:
        panels: most panels of a run; each is some 50 kB.
    """
    names = (
        " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    )
    metrics = read_metrics(runs)
    parts = [
        _header(runs, datasets),
        results_section(runs),
        *(part for view in datasets for part in dataset_sections(view)),
        "" if datasets else _no_dataset(runs[0]),
        _training(runs, curve_groups(runs, metrics)),
        *probe_sections(runs),
        panels_section(runs, limit=panels),
        speed_section(runs),
        configuration_section(runs),
        commands_section(runs),
        curve_data(runs, metrics),
    ]
    script = Path(__file__).with_name("report.js").read_text()
    return document(names, *parts, script=script)


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


def _training(runs: Sequence[Run], curves: str) -> str:
    waiting = [
        missing(f"No step of {run.name} yet.", pretrain_command(run))
        for run in runs
        if not run.metrics
    ]
    lead = "Smoothed over a fiftieth of the longest run; faint, every step as it was."
    return section("Training", curves, *waiting, lead=lead if curves else "")


def _no_dataset(run: Run) -> str:
    notice = missing("No run names its dataset.", pretrain_command(run))
    return section("Data", notice)
