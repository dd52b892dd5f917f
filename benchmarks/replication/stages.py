"""The commands that a matrix takes, in an order in which they can be run.

Owns what each of them is called, where its output lies and what it waits for. Does not
own running them (`benchmarks.replication.schedule`). Rows of one pretraining share its
stage; seeds come one after the other, so that what is there early is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replication.matrix import Dataset, Matrix, Row, Task, Words

Only = tuple[str | None, int | None]
"""A row and a seed; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command. The same one again continues, or finds nothing to do."""

    name: str
    """Also the folder of its output, below that of the replication."""
    words: tuple[str, ...]
    """Python module and its command line; `{work}` stands for the replication's
    folder, and `{input:NAME}` for a corpus that is given by a flag."""
    needs: tuple[str, ...]
    """Names of stages that must be complete."""
    costs: tuple[str, ...]
    """What its seconds are counted under, the closest first."""
    result: str | None = None
    """File that it leaves, relative to the replication's folder, which is kept."""
    stoppable: bool = False
    """What it has done by then is kept when it is stopped."""


def plan(matrix: Matrix, *, only: Only = (None, None)) -> list[Stage]:
    """Stages, each after those that it needs.

    Raises:
        ValueError: `only` names a row or a seed that the matrix has not.
    """
    rows, seeds = chosen(matrix, only)
    found: dict[str, Stage] = {}
    for seed in seeds:
        for name in rows:
            for stage in _of_row(matrix, matrix.rows[name], seed):
                found.setdefault(stage.name, stage)
    for stage in found.values():
        for need in stage.needs:
            if need not in found:
                raise ValueError(
                    f"{stage.name} needs {need}, which nothing makes: add it to the "
                    "pairs of that dataset"
                )
    return list(found.values())


def only(given: str | None) -> Only:
    """`ROW,SEED`, `ROW` or `,SEED`, as the command line has it.

    Raises:
        ValueError: the seed is no number.
    """
    row, _, seed = (given or "").partition(",")
    if seed and not seed.isdecimal():
        raise ValueError(f"--only {given}: give ROW,SEED, such as mlm,0")
    return row or None, int(seed) if seed else None


def chosen(matrix: Matrix, only: Only) -> tuple[list[str], list[int]]:
    """Names of rows, and seeds."""
    row, seed = only
    if row is not None and row not in matrix.rows:
        raise ValueError(f"--only {row}: the rows are {', '.join(matrix.rows)}")
    if seed is not None and seed not in matrix.seeds:
        raise ValueError(f"--only {seed}: the seeds are {matrix.seeds}")
    return (
        list(matrix.rows) if row is None else [row],
        list(matrix.seeds) if seed is None else [seed],
    )


def evaluation(matrix: Matrix, row: Row, task: str, seed: int) -> str:
    """Name of the stage that measures a row's task."""
    tuned = matrix.tasks[task].finetune is not None
    made = tuned_name(row) if tuned else f"{pretraining_name(row)}{_scratch(row)}"
    return f"evaluate/{task}/{made}/seed{seed}"


def pretraining_name(row: Row) -> str:
    """What tells pretrainings apart."""
    objectives = "+".join(row.objectives)
    return f"{row.model}-{objectives}-{row.masking}-{dataset_name(row)}"


def tuned_name(row: Row) -> str:
    """What tells fine-tunings of one task apart."""
    dropout = "-mdo" if row.modality_dropout else ""
    return f"{pretraining_name(row)}{_scratch(row)}{dropout}"


def _scratch(row: Row) -> str:
    return "" if row.pretrained else "-scratch"


def dataset_name(row: Row) -> str:
    """What tells shares of a dataset apart."""
    share = "" if row.fraction == 1 else f"-{row.fraction:g}"
    return f"{row.dataset}{share}"


def command_words(words: Words, places: Mapping[str, str]) -> tuple[str, ...]:
    """`--key=value` of each key; `{name}` in a value stands for a place."""
    found = []
    for key, value in words.items():
        text = value if isinstance(value, str) else json.dumps(value)
        for name, place in places.items():
            text = text.replace("{" + name + "}", place)
        found.append(f"--{key}={text}")
    return tuple(found)


def _of_row(matrix: Matrix, row: Row, seed: int) -> Iterator[Stage]:
    dataset = matrix.datasets[row.dataset]
    yield from _data(row, dataset)
    pretrain = _pretrain(matrix, row, seed)
    yield pretrain
    for name in row.tasks:
        task, source = matrix.tasks[name], pretrain
        if task.finetune is not None:
            source = _finetune(row, name, task, seed, pretrain)
            yield from _pairs_of(source.needs, row, dataset)
            yield source
        evaluate = _evaluate(matrix, row, name, task, seed, source)
        yield from _pairs_of(evaluate.needs, row, dataset)
        yield evaluate


def _data(row: Row, dataset: Dataset) -> Iterator[Stage]:
    """Shards of the whole corpus, and of a share of it."""
    whole, words, first = f"data/{row.dataset}", dict(dataset.preprocess), ()
    if not {"config", "input"} & words.keys():
        words["input"] = f"{{input:{row.dataset}}}"
    if dataset.derived:
        table = f"tables/{row.dataset}.parquet"
        yield Stage(
            name=table,
            words=(
                "benchmarks.replication.table",
                words["input"],
                f"--columns={dataset.derived}",
                f"--output={{work}}/{table}",
            ),
            needs=(),
            costs=("table",),
        )
        words["input"], first = f"{{work}}/{table}", (table,)
    costs = (f"preprocess {row.dataset}",)
    command = ("pipeline.preprocess", *command_words(words, {}))
    yield Stage(
        name=whole,
        words=(*command, f"--output={{work}}/{whole}"),
        needs=first,
        costs=costs,
    )
    if row.fraction == 1:
        return
    share = f"data/{dataset_name(row)}"
    denied = f"{share}.denied.txt"
    yield Stage(
        name=denied,
        words=(
            "benchmarks.replication.share",
            f"{{work}}/{whole}",
            f"--fraction={row.fraction}",
            f"--output={{work}}/{denied}",
        ),
        needs=(whole,),
        costs=("share",),
    )
    words["tokenizer"] = f"{{work}}/{whole}/tokenizer"
    words["deny_uids"] = f"{{work}}/{denied}"
    yield Stage(
        name=share,
        words=(
            "pipeline.preprocess",
            *command_words(words, {}),
            f"--output={{work}}/{share}",
        ),
        needs=(whole, denied, *first),
        costs=costs,
    )


def _pretrain(matrix: Matrix, row: Row, seed: int) -> Stage:
    model, data = matrix.models[row.model], f"data/{dataset_name(row)}"
    name = f"pretrain/{pretraining_name(row)}/seed{seed}"
    weights = {
        f"model.{loss}_weight": weight if loss in row.objectives else 0
        for loss, weight in model.weights.items()
    }
    words = {**model.pretrain, **weights, **matrix.maskings[row.masking]}
    return Stage(
        name=name,
        words=(
            "trainer.pretrain",
            *command_words(words, {}),
            f"--data={{work}}/{data}",
            f"--output={{work}}/{name}",
            f"--seed={seed}",
        ),
        needs=(data,),
        costs=_costs("pretrain", row),
        stoppable=True,
    )


def _finetune(row: Row, name: str, task: Task, seed: int, pretrain: Stage) -> Stage:
    output = f"finetune/{name}/{tuned_name(row)}/seed{seed}"
    dropout = task.dropout if row.modality_dropout else task.no_dropout
    given = {**(task.finetune or {}), **task.model.get(row.model, {}), **dropout}
    given |= _lacking(task.finetune_without, row) | _alone(task.finetune_only, row)
    needs = [pretrain.name, f"data/{row.dataset}"]
    return Stage(
        name=output,
        words=(
            "trainer.finetune",
            f"{{work}}/{pretrain.name}",
            f"--data={{work}}/data/{row.dataset}",
            f"--output={{work}}/{output}",
            f"--seed={seed}",
            *(() if row.pretrained else ("--from_scratch=true",)),
            *command_words(given, _places(given, row, needs)),
        ),
        needs=tuple(needs),
        costs=_costs(f"finetune {name}", row),
        stoppable=True,
    )


def _evaluate(
    matrix: Matrix, row: Row, name: str, task: Task, seed: int, source: Stage
) -> Stage:
    needs = [source.name, f"data/{row.dataset}"]
    given = {**task.evaluate, **_lacking(task.evaluate_without, row)}
    given |= _alone(task.evaluate_only, row)
    result = Path(task.result)
    if task.finetune is None and not row.pretrained:
        result = result.with_stem(f"{result.stem}{_scratch(row)}")
        given |= {"from_scratch": True, "name": result.stem}
    return Stage(
        name=evaluation(matrix, row, name, seed),
        words=(
            "trainer.evaluate",
            f"{{work}}/{source.name}",
            f"--data={{work}}/data/{row.dataset}",
            *command_words(given, _places(given, row, needs)),
        ),
        needs=tuple(needs),
        costs=_costs(f"evaluate {name}", row),
        result=f"{source.name}/{result}",
    )


def _lacking(without: Mapping[str, Words], row: Row) -> Words:
    found: Words = {}
    for objective, words in without.items():
        if objective not in row.objectives:
            found |= words
    return found


def _alone(only: Mapping[str, Words], row: Row) -> Words:
    return only.get(row.objectives[0], {}) if len(row.objectives) == 1 else {}


def _costs(kind: str, row: Row) -> tuple[str, ...]:
    return (f"{kind} {row.model} {'+'.join(row.objectives)}", f"{kind} {row.model}")


def _places(words: Words, row: Row, needs: list[str]) -> dict[str, str]:
    """Where the pairs lie that `words` name; the stages that make them join `needs`."""
    places = {}
    for value in words.values():
        if isinstance(value, str) and value.startswith("{pairs:"):
            name = value.removeprefix("{pairs:").removesuffix("}")
            stage = _pairs_name(row, name)
            places[f"pairs:{name}"] = f"{{work}}/{stage}/pairs.npy"
            needs.append(stage)
    return places


def _pairs_name(row: Row, name: str) -> str:
    return f"pairs/{row.dataset}/{name}"


def _pairs_of(needs: Sequence[str], row: Row, dataset: Dataset) -> Iterator[Stage]:
    """The stages among `needs` that make matching pairs."""
    for name, words in dataset.pairs.items():
        stage = _pairs_name(row, name)
        if stage in needs:
            yield Stage(
                name=stage,
                words=(
                    "pipeline.pairs",
                    f"{{work}}/data/{row.dataset}",
                    *command_words(words, {}),
                    f"--output={{work}}/{stage}/pairs.npy",
                ),
                needs=(f"data/{row.dataset}",),
                costs=(f"pairs {row.dataset}",),
            )


def resolved(
    words: Sequence[str], *, work: Path, inputs: Mapping[str, str]
) -> tuple[str, ...]:
    """The words with real paths.

    Raises:
        ValueError: a corpus is not given.
    """
    found = []
    for word in words:
        text = word.replace("{work}", str(work))
        for name, path in inputs.items():
            text = text.replace(f"{{input:{name}}}", path)
        if "{input:" in text:
            name = text.partition("{input:")[2].rstrip("}")
            raise ValueError(
                f"where is dataset {name}? Give --inputs.{name} PATH (a table, folder "
                "or URL as --input of pipeline.preprocess)"
            )
        found.append(text)
    return tuple(found)
