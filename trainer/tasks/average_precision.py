"""Average precision, the area under the curve of precision over recall.

Owns the number for weighted rows, which is what a bootstrap asks for. Does not own the
bootstrap (`trainer.tasks.bootstrap`).

Shapes: N rows, U different scores.
"""

from __future__ import annotations

import numpy as np

from trainer.tasks.numbers import require_numbers


class AveragePrecision:
    """Of scores (N,) for labels (N,): sorted once, for any weights.

    Rows of equal score count as one step of the curve, as in scikit-learn: no order of
    theirs is better than another.

    Raises:
        ValueError: a score that is no number.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        require_numbers(scores)
        self._order = np.argsort(-scores, kind="stable")
        self._labels = labels[self._order].astype(np.float64)
        ordered = scores[self._order]
        self._ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)

    def __call__(self, weights: np.ndarray | None = None) -> float:
        """For weights (N,), 1 each by default; nan where no row is positive."""
        taken = np.ones(len(self._order)) if weights is None else weights[self._order]
        all_rows = np.cumsum(taken)[self._ends]
        positive = np.cumsum(taken * self._labels)[self._ends]
        if not len(positive) or positive[-1] == 0:
            return float("nan")
        gained = np.diff(positive, prepend=0.0)
        # Where nothing was taken yet nothing is gained either.
        precision = positive / np.maximum(all_rows, 1e-12)
        return float((gained * precision).sum() / positive[-1])
