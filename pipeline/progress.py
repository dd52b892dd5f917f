"""What the user sees while ranges are processed, and `OUTPUT.progress.json`.

Owns everything about a run that depends on time: none of it stands in the dataset.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

_BAR = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)
# A log file wants a line now and then, not a bar.
_LOG_SECONDS = 10.0
_FILE_SECONDS = 2.0


def progress_path(output: Path) -> Path:
    """`progress.json` lies beside the dataset, under its name."""
    return output.with_name(output.name + ".progress.json")


class Progress:
    """A bar on a terminal, lines in a log, and the file."""

    def __init__(self, *, name: str, total: int, done: int, path: Path | None) -> None:
        self._name, self._total, self._path = name, total, path
        self._start, self._first = time.time(), done
        self._committed, self._done, self._failed = done, done, 0
        if path:
            _remove_torn(path)
        self._terminal = sys.stderr.isatty()
        self._last_line = self._last_file = 0.0
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=" inputs",
            bar_format=_BAR,
            smoothing=0.05,
            disable=not self._terminal,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show(final=True)
        self._bar.close()

    def commit(self, inputs: int, failed: int) -> None:
        """Count a finished range."""
        self._committed += inputs
        self._failed += failed
        self._update(self._committed)

    def running(self, counts: Mapping[int, tuple[int, int]], next_range: int) -> None:
        """Show ranges under way: `{range: (done, failed)}`."""
        under_way = [count for number, count in counts.items() if number >= next_range]
        self._update(self._committed + sum(done for done, _ in under_way))

    def _update(self, done: int) -> None:
        # An attempt that died is counted again from its start: the bar waits.
        self._done = min(max(done, self._done), self._total)
        self._show(final=False)

    def _show(self, *, final: bool) -> None:
        now = time.time()
        self._bar.set_postfix_str(
            f", {self._failed} failed" if self._failed else "", False
        )
        self._bar.update(self._done - self._bar.n)
        if not self._terminal and (final or now - self._last_line > _LOG_SECONDS):
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)
        if self._path and (final or now - self._last_file > _FILE_SECONDS):
            self._last_file = now
            self._write(self._path, self._state(now))

    def _rate(self, now: float) -> float:
        return (self._done - self._first) / max(now - self._start, 1e-9)

    def _line(self, now: float) -> str:
        left = (self._total - self._done) / max(self._rate(now), 1e-9)
        # The first moments say nothing about the rest.
        known = now - self._start > _LOG_SECONDS / 2 and self._done < self._total
        ahead = f", {left:.0f} s left" if known else ""
        return (
            f"{self._name}: {self._done}/{self._total} inputs, "
            f"{self._rate(now):.0f}/s{ahead}, {self._failed} failed"
        )

    def _state(self, now: float) -> dict[str, Any]:
        return {
            "phase": self._name,
            "inputs": self._total,
            "done": self._done,
            "committed": self._committed,
            "failed": self._failed,
            "inputs_per_s": round(self._rate(now), 2),
            "elapsed_s": round(now - self._start, 2),
            "updated": now,
        }

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        # A name of its own: a driver that lost its lease may be writing still.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text(json.dumps(state, indent=1) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            # The dataset does not depend on it.
            self._path = None
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            warning = f"{path} cannot be written ({error.strerror}): going on without"
            print(warning, file=sys.stderr, flush=True)


def _remove_torn(path: Path) -> None:
    """Remove what runs left that died while they wrote the file."""
    for torn in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            torn.unlink(missing_ok=True)
