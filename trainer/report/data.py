"""What a report is made of: runs and datasets, as far as they have got.

Owns reading them. Nothing but the run directory itself has to exist: a part that is
missing is None or empty, or carries the reason. Does not own how anything looks
(`trainer.report.page`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from pipeline.config import flat
from pipeline.manifest import Manifest
from trainer.contract import (
    COMPLETE,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    VALIDATION,
    complete_checkpoints,
    panels,
)
from trainer.dataset import Dataset
from trainer.storage import StorageConfig

COMMANDS = "commands.txt"
PROBES = "probes.json"

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory."""

    path: Path
    name: str
    """Last part of the path, or all of it where two runs share that."""
    config: Mapping[str, Any]
    """Flat: dotted keys."""
    metrics: Sequence[Row]
    """A row for each step, in order."""
    validation: Sequence[Row]
    """A row for each step at which held-out pairs were looked at, in order."""
    probes: Mapping[str, Any] | None
    panels: Sequence[tuple[int, Path]]
    """(step, picture) of reconstructions while it trained, in order."""
    facts: Mapping[str, Any]
    """Where it ran, as far as that was written down. Flat: dotted keys."""
    commands: Sequence[str]
    complete: bool

    @property
    def data(self) -> list[str]:
        """Dataset directories it was trained on, as far as that is known."""
        found = self.config.get("data") or (self.probes or {}).get("data") or []
        return [found] if isinstance(found, str) else list(found)

    @property
    def storage(self) -> StorageConfig:
        """How it reads a dataset behind a URL."""
        names = [field.name for field in fields(StorageConfig)]
        keys = {name: f"storage.{name}" for name in names}
        return StorageConfig(
            **{
                name: self.config[keys[name]]
                for name in names
                if keys[name] in self.config
            }
        )

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def scheduled(self) -> int:
        """Steps it is to take, or 0 where that is not known."""
        steps = self.config.get("schedule.steps")
        return steps if isinstance(steps, int) else 0

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric, of training or validation, as long as it
        was written.
        """
        for rows in (self.metrics, self.validation):
            pairs = [
                (float(row["step"]), float(row[name]))
                for row in rows
                if _is_number(row.get(name))
            ]
            if pairs:
                return [step for step, _ in pairs], [value for _, value in pairs]
        return [], []

    def names(self) -> list[str]:
        """Every metric that has a number, but for the step."""
        found = {
            name: None
            for rows in (self.metrics, self.validation)
            for row in rows
            for name, value in row.items()
            if name != "step" and _is_number(value)
        }
        return list(found)

    def clock(self) -> tuple[list[float], list[float]]:
        """Steps, and the seconds that all steps until then took together. Pauses,
        checkpoints and validations between them are not in it.
        """
        steps, seconds = self.curve("step_s")
        total, summed = 0.0, []
        for value in seconds:
            total += value
            summed.append(total)
        return steps, summed

    def typical(self, name: str) -> float | None:
        """Median of a metric over the steps."""
        values = self.curve(name)[1]
        return median(values) if values else None


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """A sample as the trainer reads it."""

    uid: str
    jpeg: bytes
    captions: Sequence[Sequence[str]]
    """The tokens of each caption, separators included."""


@dataclass(frozen=True, kw_only=True)
class DatasetView:
    """A dataset directory and a few of its samples."""

    path: str
    """Or its URL."""
    split: str
    manifest: Manifest | None
    samples: Sequence[SamplePair]
    problem: str
    """Why `manifest` or `samples` is missing, or nothing."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`.

    Raises:
        ValueError: no such directory, or nothing in it that a run has; a run twice; a
            file that is damaged.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run is named twice: name each run directory once")
    names = [path.resolve().name for path in paths]
    return [
        _read_run(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def read_datasets(runs: Sequence[Run], *, samples: int) -> list[DatasetView]:
    """Each dataset that a run was trained on, once."""
    users = {data: run for run in runs for data in run.data}
    return [read_dataset(path, run, samples) for path, run in users.items()]


def read_dataset(path: str, run: Run, samples: int) -> DatasetView:
    """The dataset of a run with `samples` pairs spread evenly over its split."""
    manifest, pairs, problem = None, [], ""
    split = str(run.config.get("split", "train"))
    try:
        dataset = Dataset(path, split, storage=run.storage)
        manifest = dataset.manifest
        pairs = _read_samples(dataset, samples)
    except (ValueError, OSError) as error:
        # A moved or deleted dataset takes its section from the page, not the page.
        problem = str(error)
    return DatasetView(
        path=path, split=split, manifest=manifest, samples=pairs, problem=problem
    )


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise ValueError(
            f"{path} is no directory: name run directories of trainer.pretrain"
        )
    present = [file for file in (CONFIG, METRICS, PROBES) if (path / file).is_file()]
    if not present:
        raise ValueError(
            f"{path} is no run: it has no {CONFIG}, {METRICS} or {PROBES}. Name run "
            "directories of trainer.pretrain"
        )
    commands = path / COMMANDS
    return Run(
        path=path,
        name=name,
        config=_read_config(path / CONFIG),
        metrics=_read_rows(path / METRICS),
        validation=_read_rows(path / VALIDATION),
        probes=_read_probes(path / PROBES),
        panels=panels(path),
        facts=_read_facts(path),
        commands=commands.read_text().splitlines() if commands.is_file() else (),
        complete=(path / COMPLETE).is_file(),
    )


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read_rows(path: Path) -> list[Row]:
    """Rows up to the first torn one, which a killed or running trainer leaves last."""
    rows: list[Row] = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return rows


def _read_facts(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    path = run / ENVIRONMENT
    if path.is_file():
        try:
            facts |= flat(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from error
    # A run that is going on may delete a checkpoint that was just listed.
    for step, folder in reversed(complete_checkpoints(run)):
        with suppress(OSError, ValueError):
            marker = json.loads((folder / COMPLETE).read_text())
            return facts | {
                "newest checkpoint": f"step {step:,}",
                "ranks at that step": marker.get("world_size", ""),
            }
    return facts


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return flat(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_probes(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}): run trainer.evaluate"
        ) from error


def _read_samples(dataset: Dataset, count: int) -> list[SamplePair]:
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
    places = dataset.places()
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round()
    places = places[chosen.astype(np.int64)]
    pairs = []
    for (shard, _), record in zip(places, dataset.records(places), strict=True):
        captions = dataset.captions(int(shard), record)
        pairs.append(
            SamplePair(
                uid=f"{int(record['uid']):016x}",
                jpeg=bytes(dataset.jpeg(int(shard), record)),
                captions=[
                    [tokenizer.id_to_token(int(token)) or "?" for token in caption]
                    for caption in captions
                ],
            )
        )
    return pairs
