"""Scores of many pairs, kept on disk as they are computed.

Owns the files, and that a killed evaluation goes on where it was. Does not own which
pairs are scored, or how (`trainer.tasks.pair_scores`).

The scores of finished pairs lie in one file in the order of the pairs. How many of them
count stands in a second one, which is replaced when they are on disk: what was half
written is written again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from trainer.files import write_text

_DTYPE = np.dtype("<f4")


class ScoreTable:
    """fp32 scores of a fixed sequence of pairs.

    Args:
        path: where they lie, without suffix.
        fingerprint: of everything that the scores depend on; scores of another are
            dropped.
        total: how many pairs there are.
    """

    def __init__(self, path: Path, *, fingerprint: str, total: int) -> None:
        self._data, self._state = path.with_suffix(".f32"), path.with_suffix(".json")
        self._fingerprint, self.total = fingerprint, total
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._known()
        """Pairs that are scored, the first ones."""
        if not self.done:
            self._data.write_bytes(b"")

    def append(self, scores: np.ndarray) -> None:
        """Keep the scores of the next pairs; they are on disk on return."""
        with open(self._data, "r+b") as file:
            file.seek(self.done * _DTYPE.itemsize)
            file.write(np.ascontiguousarray(scores, dtype=_DTYPE).tobytes())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.done += len(scores)
        state = {"fingerprint": self._fingerprint, "done": self.done}
        write_text(self._state, json.dumps(state) + "\n")

    def scores(self) -> np.ndarray:
        """Those of all pairs (total,)."""
        assert self.done == self.total
        return np.fromfile(self._data, dtype=_DTYPE, count=self.total)

    def _known(self) -> int:
        """How many scores an earlier call left."""
        try:
            state = json.loads(self._state.read_text())
            size = self._data.stat().st_size
        except (OSError, ValueError):
            return 0
        if state.get("fingerprint") != self._fingerprint:
            return 0
        done = int(state.get("done", 0))
        return done if size >= done * _DTYPE.itemsize and done <= self.total else 0
