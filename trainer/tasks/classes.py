"""How well classes are told apart: accuracy, classes one by one, confusions.

Owns these numbers and their part of a page. Does not own scores
(`trainer.tasks.zero_shot`, `trainer.tasks.linear_probe`) or resampling
(`trainer.tasks.bootstrap`).

A sample counts as right when its own class scores above every other one; a tie is no
answer. One whose class is none of those that are asked for cannot be right.

Shapes: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from trainer.report.elements import table
from trainer.tasks.bootstrap import mean_interval

_CONFUSIONS = 20
_MOST_DRAWN = 40


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was said of N samples."""

    scores: np.ndarray
    """(N, K), higher is likelier."""
    labels: np.ndarray
    """(N,) true class; -1 where it is none of the K."""
    names: Sequence[str]
    """K class names."""
    groups: np.ndarray
    """(N,) what is resampled together."""

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


def summary(answers: Answers, *, train_labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Accuracy with its interval, chance, and the share of the class that is the most
    frequent in `train_labels` (n,).
    """
    ranks, n_classes = answers.ranks, len(answers.names)
    counts = np.bincount(train_labels[train_labels >= 0], minlength=n_classes)
    majority = int(counts.argmax())
    right = ranks == 0
    recalls = [
        float(right[answers.labels == number].mean())
        for number in np.unique(answers.labels[answers.labels >= 0])
    ]
    return {
        "classes": n_classes,
        "accuracy": _share(right, answers.groups, seed) | {"chance": 1 / n_classes},
        "top5": _share(ranks < 5, answers.groups, seed)
        | {"chance": min(5 / n_classes, 1.0)},
        "mean_class_accuracy": {"value": float(np.mean(recalls))},
        "majority": {
            "class": answers.names[majority],
            "value": float((answers.labels == majority).mean()),
        },
        "of_no_class": int((answers.labels < 0).sum()),
        "per_class": class_rows(answers),
        "confusions": confusions(answers),
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


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """HTML table of `class_rows`, most samples first."""
    ordered = sorted(rows, key=lambda row: (-row["samples"], row["class"]))
    return table(
        ("class", "samples", "right", "said"),
        (
            (
                row["class"],
                f"{row['samples']}",
                f"{row['accuracy']:.1%}",
                f"{row['said']}",
            )
            for row in ordered
        ),
    )


def confusion_picture(answers: Answers) -> str:
    """HTML table of what was said of each class, darker where oftener; nothing for more
    classes than one can look at.
    """
    if len(answers.names) > _MOST_DRAWN:
        return ""
    matrix = confusion_matrix(answers)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{number + 1}</th>" for number in range(len(matrix)))
    lines = [f"<tr><th>what it is</th>{head}</tr>"]
    for number, name in enumerate(answers.names):
        cells = "".join(
            f'<td style="background:rgba(42,157,78,{shares[number, said]:.2f})">'
            f"{matrix[number, said] or ''}</td>"
            for said in range(len(matrix))
        )
        lines.append(f"<tr><th>{number + 1} {escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _share(right: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "value": float(right.mean()),
        "ci95": mean_interval(right, groups, seed=seed),
    }
