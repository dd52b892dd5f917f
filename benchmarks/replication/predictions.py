"""What an evaluation has kept of each test item, for the paired bootstrap.

Owns reading it and which number is made of it. Does not own writing it (the tasks of
`trainer.evaluate`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.replication.statistics import Statistic


class Predictions(NamedTuple):
    """Of N items, in an order that is the same for every model."""

    values: np.ndarray
    """(N, ...) what `statistic` takes."""
    groups: np.ndarray
    """(N,) items of one value are no independent evidence."""
    statistic: Statistic


def read(what: str, folder: Path) -> Predictions:
    """The predictions that a task has left in a folder.

    Args:
        what: `Metric.predictions`.

    Raises:
        ValueError: they are not there, or nobody knows how to read them.
    """
    raise ValueError(f"predictions {what!r} of {folder}: there are none yet")
