"""What an evaluation has kept of each test item, for the paired bootstrap.

Owns what is made of it. Does not own writing it (`trainer.tasks.results`) or its names
(`trainer.tasks.matching`, `trainer.tasks.retrieval`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.replication.statistics import Measure
from trainer.tasks.average_precision import AveragePrecision


class Predictions(NamedTuple):
    """Of N items, in an order that is the same for every model."""

    measure: Measure
    groups: np.ndarray
    """(N,) items of one value are no independent evidence."""
    items: np.ndarray
    """(N,) what is true of each, equal for all models."""


def read(metric: str, path: Path) -> Predictions:
    """What is kept in the file of an evaluation that `metric` is made of.

    Args:
        metric: `pr_auc_MODE` of matching, or `WAY_rK` of retrieval, as in its JSON.

    Raises:
        ValueError: it is not kept there.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is not there, which has the predictions of {metric}: remove the "
            "marker of that evaluation, so that it is made again, or leave out the "
            "metric's `predictions`"
        )
    kept = dict(np.load(path))
    if found := re.fullmatch(r"pr_auc_(\w+)", metric):
        scores, labels = kept[f"scores_{found[1]}"], kept["labels"]
        return Predictions(AveragePrecision(scores, labels), kept["groups"], labels)
    if found := re.fullmatch(r"(features_)?(\w+_to_\w+)_r(\d+)", metric):
        stage, way, k = found[1] or "", found[2], int(found[3])
        groups = kept[f"{way}_groups"]
        return Predictions(_mean(kept[f"{stage}{way}_ranks"] < k), groups, groups)
    raise ValueError(
        f"predictions {metric!r}: give pr_auc_MODE or WAY_rK, as they are called in "
        "results"
    )


def _mean(values: np.ndarray) -> Measure:
    each = values.astype(np.float64)
    return lambda taken: float(taken @ each / taken.sum())
