"""Rows of numbers, kept on disk as they are computed: scores of pairs, features.

Owns the files, that a killed evaluation goes on where it was, and that several at once
do not spoil each other's. Does not own what the rows are (`trainer.tasks.pair_scores`,
`trainer.tasks.linear_probe`).

Finished rows lie in one file, in their order. How many of them count stands in a second
one, which is replaced when they are on disk: what was half written is written again.
The files' name has a hash of what the rows depend on, so rows of another model or
gallery lie elsewhere. Two processes that compute the same rows both go on behind
whatever either has finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np

from trainer.files import write_text

_DTYPE = np.dtype("<f4")


class RowTable:
    """fp32 rows in a fixed sequence.

    Args:
        path: where they lie, without suffix; a hash is added to the name.
        fingerprint: of everything that the rows depend on.
        total: how many rows there are.
        width: numbers of a row.
    """

    def __init__(
        self, path: Path, *, fingerprint: str, total: int, width: int = 1
    ) -> None:
        self._fingerprint, self.total, self.width = fingerprint, total, width
        whole = sha256(f"{fingerprint} {total} {width}".encode()).hexdigest()
        name = f"{path.name}-{whole[:16]}"
        self._data, self._state, self._lock = (
            path.with_name(f"{name}{suffix}") for suffix in (".f32", ".json", ".lock")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.done = self._known()
            """Rows that are computed, the first ones."""
            self._data.touch()

    def append(self, rows: np.ndarray) -> None:
        """Keep the next rows (n, width), or (n,); they are on disk on return. `done`
        may then be further: another process had more of them.

        Raises:
            ValueError: the files were deleted meanwhile.
        """
        with self._locked():
            known, done = self._known(), self.done + len(rows)
            if known < self.done:
                raise ValueError(
                    f"{self._data} was deleted or damaged while it was written: run "
                    "the same command again"
                )
            if known < done:
                self._write(rows)
                state = {"fingerprint": self._fingerprint, "done": done}
                write_text(self._state, json.dumps(state) + "\n")
            self.done = max(known, done)

    def rows(self) -> np.ndarray:
        """All of them (total, width)."""
        assert self.done == self.total
        count = self.total * self.width
        return np.fromfile(self._data, dtype=_DTYPE, count=count).reshape(
            self.total, self.width
        )

    def _write(self, rows: np.ndarray) -> None:
        with open(self._data, "r+b") as file:
            file.seek(self.done * self._row)
            file.write(np.ascontiguousarray(rows, dtype=_DTYPE).tobytes())
            # Behind it lies what a killed call did not finish.
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait for other processes that read or write the count."""
        with open(self._lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _row(self) -> int:
        return self.width * _DTYPE.itemsize

    def _known(self) -> int:
        """How many rows earlier or other calls have finished."""
        try:
            state = json.loads(self._state.read_text())
            size = self._data.stat().st_size
        except (OSError, ValueError):
            return 0
        if state.get("fingerprint") != self._fingerprint:
            return 0
        done = int(state.get("done", 0))
        return done if done * self._row <= size and done <= self.total else 0
