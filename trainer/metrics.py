"""What a run writes and shows: `metrics.jsonl`, `validation.jsonl`, a live line.

Owns the files and the terminal of rank 0. Names of metrics are in `trainer.contract`;
TensorBoard and the like are told through `trainer.tracking`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from trainer.contract import METRICS, VALIDATION, read_validation
from trainer.files import write_text
from trainer.tracking import trackers

_PLAIN_LINE_EVERY_S = 10.0


class Metrics:
    """Writer of one run's metrics, from a step on.

    Lines of later steps and torn ones are dropped first, so that each step stands in
    the file once.

    Args:
        run: run directory.
        first_step: number of steps already taken; later lines are dropped.
        last_step: where this call stops, for the ETA.
        tensorboard, wandb, config: as `trainer.tracking.trackers`.
    """

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        last_step: int,
        tensorboard: bool,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        keep_steps(run / METRICS, first_step)
        self._file = open(run / METRICS, "a")  # noqa: SIM115
        self._validation = run / VALIDATION
        keep_steps(self._validation, first_step)
        self._trackers = trackers(
            run,
            first_step=first_step,
            tensorboard=tensorboard,
            wandb=wandb,
            config=config,
        )
        self._line = _LiveLine(first_step, last_step)
        for row in read_validation(run):
            self._line.validated(row)

    def write(self, row: dict[str, Any]) -> None:
        """Write one step's metrics everywhere."""
        _append(self._file, row)
        self._line.show(row)
        for tracker in self._trackers:
            tracker.scalars(row)

    def validation(self, row: dict[str, Any]) -> None:
        """Write what was measured on held-out pairs after a step, everywhere."""
        # Seldom, and in many runs never.
        with open(self._validation, "a") as file:
            _append(file, row)
        self._line.validated(row)
        for tracker in self._trackers:
            tracker.scalars(row)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file of a step wherever pictures can be shown."""
        for tracker in self._trackers:
            tracker.picture(name, path, step)

    def note(self, text: str) -> None:
        """Print a line without breaking the live one."""
        self._line.note(text)

    def close(self) -> None:
        """Flush everything to disk."""
        self._line.close()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


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


def duration(seconds: float) -> str:
    """Seconds as people say them: `3:20`, `2:03:20` or `4d 02:03`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def _append(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _losses(row: dict[str, Any]) -> str:
    """Each loss of a step by its short name."""
    found = {
        name.removesuffix("_loss"): value
        for name, value in row.items()
        if name.endswith("_loss")
    }
    return "".join(f"{name} {value:#.4g}  " for name, value in found.items())


class _LiveLine:
    """One line that follows the run on a terminal; a line now and then elsewhere."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._held_out = ""

    def validated(self, row: dict[str, Any]) -> None:
        if "val_loss" in row:
            self._held_out = f"val {row['val_loss']:.4f}  "
            if row["step"] == self._last:
                self.note(f"held-out loss {row['val_loss']:.4f} after the last step")

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
            f"{_losses(row)}{self._held_out}"
            f"{row['pairs_per_s']:.0f} pairs/s  data wait "
            f"{row['data_wait_frac']:.1%}  ETA {duration(eta)}"
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
