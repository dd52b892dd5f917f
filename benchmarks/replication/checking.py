"""Mistakes of a matrix and of its corpora, found before hours are spent.

Owns reading every stage's words as its command will, and looking for the corpora. Does
not own the form of the matrix itself (`benchmarks.replication.matrix`).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence

from benchmarks.replication.matrix import Matrix
from benchmarks.replication.schedule import Place, require_own
from benchmarks.replication.stages import Stage, plan, resolved
from pipeline.config import given, nearest, parse
from pipeline.options import PreprocessConfig
from pipeline.pairs import PairsConfig
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES
from trainer.probing import ProbesConfig
from trainer.tasks import evaluation, finetuning

# They differ from row to row and from seed to seed, and are no keys of a matrix.
_PLACES = ("--data=", "--output=", "--seed=", "--pairs=")


def check(stages: Sequence[Stage], place: Place) -> None:
    """Every command takes its words, and every corpus that is still to be read is
    given and there.

    Raises:
        ValueError: the first mistake, with the stage that has it.
    """
    require_own(place.work)
    seen: set[tuple[str, ...]] = set()
    for stage in stages:
        for name, path in place.inputs_of(stage).items():
            there = "://" in path or glob.glob(path) or place.done(stage)
            if not there:
                raise ValueError(
                    f"--inputs.{name} {path}: there is no such file or folder"
                )
        module, *words = resolved(stage.words, work=place.work, inputs=place.inputs)
        keys = [word for word in words if word.startswith("--")]
        told = (module, *(word for word in keys if not word.startswith(_PLACES)))
        if told in seen:
            continue
        seen.add(told)
        try:
            _read(module, words)
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from error


def check_inputs(matrix: Matrix, inputs: Mapping[str, str]) -> None:
    """Raise ValueError for a corpus that no dataset of the matrix is made of."""
    words = [word for stage in plan(matrix) for word in stage.words]
    asked = list(dict.fromkeys(re.findall(r"\{input:(.+?)\}", "\n".join(words))))
    for name in inputs:
        if name not in asked:
            takes = ", ".join(f"--inputs.{one}" for one in asked) or "none"
            hint = nearest(name, asked)
            raise ValueError(
                f"--inputs.{name}: this matrix does not ask for it.{hint} It takes "
                f"{takes}"
            )


def _read(module: str, words: list[str]) -> None:
    if module == "pipeline.preprocess":
        parse(PreprocessConfig, words, prog=module, description="")
    elif module == "pipeline.pairs":
        parse(PairsConfig, words, prog=module, description="", positional="dataset")
    elif module == "trainer.pretrain":
        parse_run(PretrainConfig, words, prog=module, description="", recipes=RECIPES)
    elif module in ("trainer.finetune", "trainer.evaluate"):
        task = given(words, "task")
        kind: type = ProbesConfig
        if module == "trainer.finetune":
            kind = finetuning.keys_of(task)
        elif task != "probes":
            kind = evaluation.keys_of(task)
        parse(kind, words, prog=module, description="", positional="run")
