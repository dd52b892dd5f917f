"""Scores that say something: every measurement refuses those of a diverged model.

Owns the refusal. Does not own scores, or what is made of them
(`trainer.tasks.ranking`, `trainer.tasks.average_precision`, `trainer.tasks.classes`,
`trainer.tasks.grounded`).
"""

from __future__ import annotations

import numpy as np


def require_numbers(scores: np.ndarray) -> None:
    """Raise ValueError for scores, of any shape, that are inf or nan: nothing orders
    them, and in the order of a file they look as if they were right.
    """
    if not np.isfinite(scores).all():
        raise ValueError(
            "the model gives scores that are no numbers (inf or nan): its training "
            "diverged; take an earlier checkpoint, or train with a lower learning rate "
            "(--optimizer.lr in pretraining, --lr in fine-tuning)"
        )
