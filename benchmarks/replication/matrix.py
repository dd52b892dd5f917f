"""What a replication consists of: the typed form of `benchmarks/replication/*.yaml`.

Owns the keys of a matrix, reading one strictly, and what its parts must agree on. Does
not own what they make of it: commands (`benchmarks.replication.stages`) and tables
(`benchmarks.replication.tables`).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from benchmarks.replication.statistics import Says
from pipeline.config import nearest

MATRICES = Path(__file__).parent
Words = dict[str, Any]
"""Keys of a command and their values, as a YAML file of it would have them."""
PartT = TypeVar("PartT")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A corpus, made into shards once."""

    preprocess: Words
    """Keys of pipeline.preprocess; without `input` it must be given by --inputs."""
    pairs: dict[str, Words] = field(default_factory=dict)
    """Matching pairs by name: keys of pipeline.pairs."""
    derived: str | None = None
    """Columns to add to its Parquet table first, in SQL."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and how it is pretrained whatever its objectives are."""

    pretrain: Words
    """Keys of trainer.pretrain, `config` (the recipe) among them."""
    weights: dict[str, float]
    """Weight of each of its objectives where a row has it; 0 where it has not."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of a task's result."""

    title: str
    value: str
    """Dotted path in the result."""
    digits: int = 3
    """Decimal places in tables."""
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None
    """What guessing gives."""
    predictions: str | None = None
    """What it is called where the test items are kept
    (`benchmarks.replication.predictions`); None: they are not."""
    objective: str | None = None
    """Objective without which it says nothing: shown of rows that have it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured of a pretrained model."""

    metrics: dict[str, Metric]
    evaluate: Words
    """Keys of trainer.evaluate."""
    result: str
    """File that it writes, below the run that it is given."""
    finetune: Words | None = None
    """Keys of trainer.finetune; None: measured straight after pretraining."""
    model: dict[str, Words] = field(default_factory=dict)
    """Keys of trainer.finetune for one model alone."""
    dropout: Words = field(default_factory=dict)
    """Keys of trainer.finetune of rows with modality dropout."""
    no_dropout: Words = field(default_factory=dict)
    """And of those without."""
    finetune_without: dict[str, Words] = field(default_factory=dict)
    """Keys of trainer.finetune of rows that lack an objective."""
    evaluate_without: dict[str, Words] = field(default_factory=dict)
    """Keys of trainer.evaluate of rows that lack an objective."""
    finetune_only: dict[str, Words] = field(default_factory=dict)
    """Keys of trainer.finetune of rows with one objective and no other."""
    evaluate_only: dict[str, Words] = field(default_factory=dict)
    """Keys of trainer.evaluate of rows with one objective and no other."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: a pretraining, and what is made of it."""

    title: str
    dataset: str
    model: str
    objectives: list[str]
    tasks: list[str]
    masking: str
    modality_dropout: bool = False
    """In fine-tuning."""
    fraction: float = 1.0
    """Share of the training pairs, chosen by the hash of their uid: a smaller share is
    part of a larger one."""
    pretrained: bool = True
    """Or fine-tuned from, and measured with, the weights that pretraining starts
    from."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of a paper that a table can agree or disagree with."""

    says: Says
    row: str
    metric: str
    source: str
    """What the paper has, in its words and numbers."""
    against: str | None = None
    """Another row; None: zero."""
    margin: float = 0.0
    """Where it says `same`: a difference that would not matter."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows beside each other in one task."""

    title: str
    task: str
    rows: list[str]
    reference: str
    """Row that every other one is compared with."""
    metrics: list[str]
    paper: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the paper has, by metric and row."""
    claims: list[Claim] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A replication: parts by name."""

    seeds: list[int]
    datasets: dict[str, Dataset]
    models: dict[str, Model]
    maskings: dict[str, Words]
    tasks: dict[str, Task]
    rows: dict[str, Row]
    tables: dict[str, Table]
    seconds: dict[str, float] = field(default_factory=dict)
    """Of a stage of a kind, such as `pretrain mlim`, before any has been measured."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: at least one, each of them once")
        for name, row in self.rows.items():
            self._check_row(f"rows.{name}", row)
        for name, table in self.tables.items():
            self._check_table(f"tables.{name}", table)

    def _check_row(self, place: str, row: Row) -> None:
        _known(f"{place}.dataset", row.dataset, self.datasets)
        _known(f"{place}.model", row.model, self.models)
        _known(f"{place}.masking", row.masking, self.maskings)
        for objective in row.objectives:
            weights = self.models[row.model].weights
            _known(f"{place}.objectives", objective, weights)
        if not 0 < row.fraction <= 1:
            raise ValueError(f"{place}.fraction is {row.fraction}: above 0, at most 1")
        for task in row.tasks:
            _known(f"{place}.tasks", task, self.tasks)
            evaluated = self.tasks[task].evaluate.get("task")
            if not row.pretrained and evaluated == "probes":
                raise ValueError(
                    f"{place} is not pretrained, and task {task} probes what was "
                    "learned in pretraining: take it out of its tasks"
                )

    def _check_table(self, place: str, table: Table) -> None:
        _known(f"{place}.task", table.task, self.tasks)
        claimed = [
            name
            for claim in table.claims
            for name in (claim.row, claim.against)
            if name is not None
        ]
        for name in (*table.rows, table.reference):
            _known(f"{place}.rows", name, self.rows)
            if table.task not in self.rows[name].tasks:
                raise ValueError(
                    f"{place} shows row {name}, which has no task {table.task}: add it "
                    f"to rows.{name}.tasks"
                )
        paper = [row for rows in table.paper.values() for row in rows]
        for name in (table.reference, *paper, *claimed):
            _known(f"{place}: a row that is shown", name, table.rows)
        metrics = self.tasks[table.task].metrics
        compared = [(name, table.reference) for name in (*table.metrics, *table.paper)]
        for claim in table.claims:
            rows = filter(None, (table.reference, claim.row, claim.against))
            compared += [(claim.metric, row) for row in rows]
        for name, row in compared:
            _known(f"{place}.metrics", name, metrics)
            self._check_objective(place, metrics[name], row)

    def _check_objective(self, place: str, metric: Metric, row: str) -> None:
        if metric.objective not in (None, *self.rows[row].objectives):
            raise ValueError(
                f"{place} compares {metric.title!r} with row {row}, which lacks "
                f"{metric.objective}: take another row, or another metric"
            )


def load(name: str) -> Matrix:
    """The matrix of a file, or of `MATRICES/NAME.yaml`.

    Raises:
        ValueError: no such file, an unknown key (with the nearest known one), a missing
            one, a wrong type, or a name that nothing has.
    """
    path = Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in MATRICES.glob("*.yaml"))
        if name not in known:
            raise ValueError(
                f"--matrix {name!r} is neither a file nor one of {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        path = MATRICES / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    return _part(Matrix, values, path.name)


def _part(kind: type[PartT], values: Any, place: str) -> PartT:
    """A dataclass of plain values, strictly."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} is {values!r}: give keys and values")
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            hint = nearest(str(key), list(fields))
            raise ValueError(
                f"unknown key {key!r} in {place}.{hint} Its keys are "
                f"{', '.join(fields)}"
            )
    missing = [
        name
        for name, one in fields.items()
        if name not in values
        and one.default is one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it must be given")
    return kind(
        **{
            key: _value(hints[key], value, f"{place}.{key}")
            for key, value in values.items()
        }
    )


def _value(kind: Any, value: Any, place: str) -> Any:
    """A plain value of a field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        # Something, or None.
        return None if value is None else _value(inner[0], value, place)
    if dataclasses.is_dataclass(kind):
        return _part(typing.cast(type, kind), value, place)
    if origin is dict and isinstance(value, Mapping):
        return {
            str(key): _value(inner[1], one, f"{place}.{key}")
            for key, one in value.items()
        }
    if origin is list and isinstance(value, list):
        return [_value(inner[0], one, place) for one in value]
    return _plain(kind, value, place)


def _plain(kind: Any, value: Any, place: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        if value not in known:
            raise ValueError(
                f"{place} is {value!r}: one of {', '.join(map(str, known))}"
            )
    elif kind is not Any and type(value) is not kind:
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{place} is {value!r}: a {wanted} is wanted")
    return value


def _known(place: str, name: str, known: Mapping[str, Any] | list[str]) -> None:
    if name not in known:
        raise ValueError(
            f"{place} names {name!r}, which is none of {', '.join(known)}."
            f"{nearest(name, list(known))}"
        )
