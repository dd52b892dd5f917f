"""Rows of numbers, kept on disk as they are computed: scores of pairs, features.

Owns the files, and that a killed evaluation goes on where it was. Does not own what the
rows are (`trainer.tasks.pair_scores`, `trainer.tasks.linear_probe`).

Finished rows lie in one file, in their order. How many of them count stands in a second
one, which is replaced when they are on disk: what was half written is written again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from trainer.files import write_text

_DTYPE = np.dtype("<f4")


class RowTable:
    """fp32 rows in a fixed sequence.

    Args:
        path: where they lie, without suffix.
        fingerprint: of everything that the rows depend on; those of another are
            dropped.
        total: how many rows there are.
        width: numbers of a row.
    """

    def __init__(
        self, path: Path, *, fingerprint: str, total: int, width: int = 1
    ) -> None:
        self._data, self._state = path.with_suffix(".f32"), path.with_suffix(".json")
        self._fingerprint, self.total, self.width = fingerprint, total, width
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._known()
        """Rows that are computed, the first ones."""
        if not self.done:
            self._data.write_bytes(b"")

    def append(self, rows: np.ndarray) -> None:
        """Keep the next rows (n, width), or (n,); they are on disk on return."""
        with open(self._data, "r+b") as file:
            file.seek(self.done * self._row)
            file.write(np.ascontiguousarray(rows, dtype=_DTYPE).tobytes())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.done += len(rows)
        state = {"fingerprint": self._fingerprint, "done": self.done}
        write_text(self._state, json.dumps(state) + "\n")

    def rows(self) -> np.ndarray:
        """All of them (total, width)."""
        assert self.done == self.total
        count = self.total * self.width
        return np.fromfile(self._data, dtype=_DTYPE, count=count).reshape(
            self.total, self.width
        )

    @property
    def _row(self) -> int:
        return self.width * _DTYPE.itemsize

    def _known(self) -> int:
        """How many rows an earlier call left."""
        try:
            state = json.loads(self._state.read_text())
            size = self._data.stat().st_size
        except (OSError, ValueError):
            return 0
        if state.get("fingerprint") != self._fingerprint:
            return 0
        done = int(state.get("done", 0))
        return done if done * self._row <= size and done <= self.total else 0
