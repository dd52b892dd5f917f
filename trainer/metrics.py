"""What a run writes and shows: `metrics.jsonl`, TensorBoard, a live line.

Owns the files and the terminal of rank 0. Names of metrics are in `trainer.contract`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Protocol

from trainer.contract import METRICS
from trainer.files import write_text

_PLAIN_LINE_EVERY_S = 10.0


class Metrics:
    """Writer of one run's metrics, from a step on.

    Lines of later steps and torn ones are dropped first, so that each step stands in
    the file once.

    Args:
        run: run directory.
        first_step: number of steps already taken; later lines are dropped.
        last_step: where this call stops, for the ETA.
    """

    def __init__(
        self, run: Path, *, first_step: int, last_step: int, tensorboard: bool
    ) -> None:
        path = run / METRICS
        keep_steps(path, first_step)
        self._file = open(path, "a")  # noqa: SIM115
        self._events = _event_writer(run, first_step) if tensorboard else None
        self._line = _LiveLine(first_step, last_step)

    def write(self, row: dict[str, Any]) -> None:
        """Write one step's metrics everywhere."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._line.show(row)
        if self._events:
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, row["step"])

    def note(self, text: str) -> None:
        """Print a line without breaking the live one."""
        self._line.note(text)

    def close(self) -> None:
        """Flush everything to disk."""
        self._line.close()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._events:
            self._events.close()


def keep_steps(path: Path, last: int) -> None:
    """Cut `path` down to whole lines of steps 1..last, atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            continue
        if step <= last:
            kept.append(line.decode() + "\n")
    write_text(path, "".join(kept))


class _Events(Protocol):
    def add_scalar(self, name: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


def _event_writer(run: Path, first_step: int) -> _Events | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed: no events are written "
            "(pip install tensorboard, or log.tensorboard: false)",
            stacklevel=2,
        )
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)


class _LiveLine:
    """One line that follows the run on a terminal; a line now and then elsewhere."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, row: dict[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        every = 0.2 if self._terminal else _PLAIN_LINE_EVERY_S
        if now - self._shown < every and step != self._last:
            return
        self._shown = now
        rate = (step - self._first) / max(now - self._start, 1e-9)
        eta = (self._last - step) / max(rate, 1e-9)
        text = (
            f"step {step}/{self._last}  loss {row['loss']:.4f}  "
            f"mlm {row['mlm_loss']:.4f}  recon {row['recon_loss']:.5f}  "
            f"{row['pairs_per_s']:.0f} pairs/s  data wait "
            f"{row['data_wait_frac']:.1%}  ETA {int(eta) // 60}:{int(eta) % 60:02d}"
        )
        end = "" if self._terminal else "\n"
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            print(file=sys.stderr)
