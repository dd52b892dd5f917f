"""How well classes are told apart: accuracy, classes one by one, confusions.

Owns these numbers and their part of a page. Does not own scores
(`trainer.tasks.zero_shot`, `trainer.tasks.linear_probe`) or resampling
(`trainer.tasks.bootstrap`).

A sample counts as right when its own class scores above every other one; a tie is no
answer. One whose class is none of those that are asked for cannot be right.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from trainer.tasks.bootstrap import interval, mean_interval
from trainer.tasks.numbers import require_numbers
from trainer.tasks.results import (
    Example,
    Metric,
    Result,
    Table,
    extremes,
    thumbnail,
)

_CONFUSIONS = 20
_MOST_DRAWN = 100
_PICTURE = 400


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was said of N samples.

    Raises:
        ValueError: a score that is no number.
    """

    scores: np.ndarray
    """(N, K), higher is likelier."""
    labels: np.ndarray
    """(N,) true class; -1 where it is none of the K."""
    names: Sequence[str]
    """K class names."""
    groups: np.ndarray
    """(N,) what is resampled together."""

    def __post_init__(self) -> None:
        require_numbers(self.scores)

    @property
    def own(self) -> np.ndarray:
        """(N,) score of the true class; -inf where it is none."""
        picked = self.scores[np.arange(len(self.labels)), self.labels]
        return np.where(self.labels < 0, -np.inf, picked)

    @property
    def ranks(self) -> np.ndarray:
        """(N,) other classes that score as high as the true one, or higher."""
        ahead = np.count_nonzero(self.scores >= self.own[:, None], axis=1)
        return ahead - (self.labels >= 0)

    @property
    def margins(self) -> np.ndarray:
        """(N,) score of the true class above the highest other one."""
        others = self.scores.copy()
        known = np.flatnonzero(self.labels >= 0)
        others[known, self.labels[known]] = -np.inf
        return self.own - others.max(1)

    @property
    def said(self) -> np.ndarray:
        """(N,) class with the highest score, the first of equal ones."""
        return self.scores.argmax(1)


def result_of(
    answers: Answers,
    *,
    majority: int,
    seed: int,
    details: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]],
) -> Result:
    """Accuracy with its interval, beside chance and what naming one class always would
    give; classes one by one.

    Args:
        majority: number of that class.
    """
    ranks, size = answers.ranks, len(answers.names)
    right = ranks == 0
    known = np.unique(answers.labels[answers.labels >= 0])
    mean_recall = MeanRecall(right, answers.labels)
    always = answers.labels == majority
    rows, mistakes = class_rows(answers), confusions(answers)
    return Result(
        metrics={
            "accuracy": _share(right, answers, seed, chance=1 / size),
            "top5_accuracy": _share(ranks < 5, answers, seed, chance=min(5 / size, 1)),
            "mean_class_accuracy": Metric(
                mean_recall(np.ones(len(right))),
                ci95=interval(mean_recall, answers.groups, seed=seed),
                chance=1 / size,
                n=len(known),
            ),
            "majority_accuracy": _share(always, answers, seed),
        },
        details={
            **details,
            "classes": size,
            "majority_class": answers.names[majority],
            "groups": len(np.unique(answers.groups)),
            "of_no_class": int((answers.labels < 0).sum()),
            "per_class": rows,
            "confusions": mistakes,
        },
        examples={**examples, "Confusions": confusion_picture(answers)},
        kept={
            "accuracy": right.astype(np.float64),
            "said": answers.said,
            "labels": answers.labels,
            "groups": answers.groups,
        },
        tables={"Class by class": _class_table(rows), "Mistakes": _mistakes(mistakes)},
    )


class MeanRecall:
    """Mean over the classes of the share that is right, of `right` (N,) bool and
    `labels` (N,), for weights (N,): a class that no row of is taken does not count.
    """

    def __init__(self, right: np.ndarray, labels: np.ndarray) -> None:
        self._known = labels >= 0
        self._labels, self._right = labels[self._known], right[self._known]

    def __call__(self, weights: np.ndarray) -> float:
        """nan where no class is left."""
        taken = weights[self._known]
        of_class = np.bincount(self._labels, weights=taken)
        hits = np.bincount(self._labels, weights=taken * self._right)
        there = of_class > 0
        return float((hits[there] / of_class[there]).mean()) if there.any() else np.nan


def answer_examples(
    answers: Answers, pixels: np.ndarray, *, count: int
) -> dict[str, list[Example]]:
    """`count` images each: the surest right answers, the surest wrong ones, and those
    nearest to the other side.

    Args:
        pixels: (N, S, S, 3) uint8.
    """
    parts = extremes(answers.margins.tolist(), (answers.ranks == 0).tolist(), count)
    return {
        title: [
            Example(
                images=[thumbnail(pixels[row])],
                texts=[],
                title=f"said: {answers.names[answers.said[row]]}",
                note=f"It is {_true_name(answers, row)}; margin "
                f"{answers.margins[row]:.3g}",
            )
            for row in rows
        ]
        for title, rows in parts.items()
    }


def class_rows(answers: Answers) -> list[dict[str, Any]]:
    """Samples, accuracy and how often it was said of each class that has samples."""
    right, said = answers.ranks == 0, answers.said
    rows = []
    for number, name in enumerate(answers.names):
        own = answers.labels == number
        if own.any():
            rows.append(
                {
                    "class": name,
                    "samples": int(own.sum()),
                    "accuracy": float(right[own].mean()),
                    "said": int((said == number).sum()),
                }
            )
    return rows


def confusions(answers: Answers) -> list[dict[str, Any]]:
    """The mistakes that are made most often."""
    matrix = confusion_matrix(answers)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = zip(*np.unravel_index(order, matrix.shape), strict=True)
    return [
        {
            "class": answers.names[true],
            "said": answers.names[said],
            "samples": int(matrix[true, said]),
        }
        for true, said in pairs
        if matrix[true, said]
    ]


def confusion_matrix(answers: Answers) -> np.ndarray:
    """(K, K) samples of each true class, by what was said."""
    size = len(answers.names)
    known = answers.labels >= 0
    flat = answers.labels[known] * size + answers.said[known]
    return np.bincount(flat, minlength=size * size).reshape(size, size)


def confusion_picture(answers: Answers) -> list[Example]:
    """What was said of each class, darker where oftener; none for more classes than one
    can look at.
    """
    size = len(answers.names)
    if size > _MOST_DRAWN:
        return []
    matrix = confusion_matrix(answers)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    grey = (255 * (1 - shares)).astype(np.uint8)
    side = max(_PICTURE // size, 1)
    data = io.BytesIO()
    Image.fromarray(grey.repeat(side, 0).repeat(side, 1)).save(data, "PNG")
    return [
        Example(
            images=[data.getvalue()],
            texts=[", ".join(answers.names)],
            title="What was said of each class",
            note="A row is a true class, a column what was said, both from the first "
            "of these names to the last; black is always.",
        )
    ]


def _class_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Most samples first."""
    ordered = sorted(rows, key=lambda row: (-row["samples"], row["class"]))
    return Table(
        ("class", "samples", "right", "said"),
        [
            (
                row["class"],
                f"{row['samples']}",
                f"{row['accuracy']:.1%}",
                f"{row['said']}",
            )
            for row in ordered
        ],
    )


def _mistakes(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        ("class", "samples", "said"),
        [(row["class"], f"{row['samples']}", row["said"]) for row in rows],
    )


def _true_name(answers: Answers, row: int) -> str:
    label = int(answers.labels[row])
    return "none of the classes" if label < 0 else answers.names[label]


def _share(
    right: np.ndarray, answers: Answers, seed: int, chance: float | None = None
) -> Metric:
    return Metric(
        value=float(right.mean()),
        ci95=mean_interval(right, answers.groups, seed=seed),
        chance=chance,
        n=len(right),
    )
