"""What the user sees while a run goes on, and `OUTPUT.progress.json`.

Owns everything about a run that depends on time or place: none of it stands in the
dataset. The same figures go to a bar or log, to the file (for whoever watches from
outside) and to Ray's metrics (`pipeline.ray_metrics`).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pipeline.manifest import Accounting
from pipeline.retries import retried
from pipeline.storage import Storage, open_storage
from pipeline.terminal import printable

_BAR = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)
# A log file wants a line now and then, not a bar.
_LOG_SECONDS = 10.0
_FILE_SECONDS = 2.0
_REASONS_SHOWN = 3
# Where URLs have passwords, signatures and tokens. A `?` elsewhere may be a glob's.
_USER = re.compile(r"://[^/\s@]*@")
_QUERY = re.compile(r"((?:\bhttps?://[^?\s]*)\?|://[^?\s]*\?(?=[\w.\-]+=))\S*", re.I)

# Stands for what was left out of a URL.
LEFT_OUT = "***"
Watch = Callable[[Mapping[str, Any]], None]


class ProgressFile:
    """`OUTPUT.progress.json`: beside the dataset, under its name."""

    def __init__(self, storage: Storage, config: Mapping[str, Any]) -> None:
        self._storage, self._config = storage, without_secrets(config)
        self._written, self._works = 0.0, True
        if storage.path is not None:
            _remove_torn(self._path(storage.path))

    def write(self, state: Mapping[str, Any], *, final: bool) -> None:
        """Write it, unless that was a moment ago."""
        now = time.time()
        if not self._works or (not final and now - self._written < _FILE_SECONDS):
            return
        self._written = now
        text = json.dumps({**state, "config": self._config}, indent=1) + "\n"
        try:
            self._replace(text)
        except OSError as error:
            # The dataset does not depend on it.
            self._works = False
            say(f"progress.json cannot be written ({error}): going on without")

    def remove(self) -> None:
        """Remove it, where nothing came of the run."""
        with contextlib.suppress(OSError):
            if self._storage.path is not None:
                self._path(self._storage.path).unlink()
            else:
                folder, name = self._remote()
                folder.remove(name)

    def _replace(self, text: str) -> None:
        if self._storage.path is None:
            folder, name = self._remote()
            folder.write(name, text.encode())
            return
        path = self._path(self._storage.path)
        # A name of its own: a driver that lost its lease may be writing still.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, root: Path) -> Path:
        return root.with_name(root.name + ".progress.json")

    def _remote(self) -> tuple[Storage, str]:
        folder, _, name = self._storage.url.rpartition("/")
        return open_storage(folder), f"{name}.progress.json"


def without_secrets(value: Any) -> Any:
    """A configuration whose URLs have `***` for user names, passwords and queries: the
    file may be read by more people than may read the corpus.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return _QUERY.sub(rf"\1{LEFT_OUT}", _USER.sub(f"://{LEFT_OUT}@", value))


class Progress:
    """One phase of a run: a bar on a terminal, lines in a log, and the file."""

    def __init__(
        self,
        *,
        phase: str,
        total: int,
        file: ProgressFile | None,
        before: Accounting | None = None,
        watch: Watch | None = None,
        unit: str = "inputs",
    ) -> None:
        before = before or Accounting()
        self._phase, self._total, self._unit = phase, total, unit
        self._file, self._watch = file, watch
        self._start, self._first = time.time(), before.inputs
        self._finished = before.inputs
        self._done = before.inputs
        self._failed = Counter(before.failed)
        self._filtered = Counter(before.filtered)
        self._told: Counter[str] = Counter()
        self._ranges: tuple[int, int] | None = None
        self._running: dict[int, Mapping[str, Any]] = {}
        self._before = Counter(retried())
        self._terminal = sys.stderr.isatty()
        self._last_line = self._start
        self._bar = tqdm(
            total=total,
            initial=self._done,
            desc=phase,
            unit=f" {unit}",
            unit_scale=total > 100_000,
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
        self._running = {}
        self._show(final=True)
        self._bar.close()

    def finish(
        self,
        counts: Accounting,
        text: str | None = None,
    ) -> None:
        """Count a finished range; `text` says it in the log."""
        self._finished += counts.inputs
        self._failed.update(counts.failed)
        self._filtered.update(counts.filtered)
        if text and not self._terminal:
            say(text)
        self._update(self._finished)

    def step(self, count: int = 1) -> None:
        """Count finished work of a phase that handles no inputs."""
        self._finished += count
        self._update(self._finished)

    def ranges(self, committed: int, total: int) -> None:
        """Say how many ranges are in the dataset while others are being written."""
        self._ranges = committed, total
        self._show(final=False)

    def reach(self, done: int) -> None:
        """Say how far a phase is that one process works through."""
        self._finished = done
        self._update(done)

    def running(self, tallies: Mapping[int, Mapping[str, Any]]) -> None:
        """Show ranges under way, by number."""
        self._running = dict(tallies)
        self._update(self._finished + sum(one.get("done", 0) for one in self._tallies))

    def ended(self, number: int, tally: Mapping[str, Any]) -> None:
        """Keep the last report of a task; `finish` or `step` tell what came of it."""
        self._running.pop(number, None)
        for name in ("read_bytes", "written_bytes"):
            self._told[name] += tally.get(name, 0)
        for reason, count in tally.get("retried", {}).items():
            self._told[f"retried {reason}"] += count

    @property
    def _tallies(self) -> Iterable[Mapping[str, Any]]:
        return self._running.values()

    def _update(self, done: int) -> None:
        # An attempt that died is counted again from its start: the bar waits.
        self._done = min(max(done, self._done), self._total)
        self._show(final=False)

    def _show(self, *, final: bool) -> None:
        now = time.time()
        state = self._state(now)
        # It puts a comma before it.
        self._bar.set_postfix_str(_postfix(state).removeprefix(", "), False)
        self._bar.update(self._done - self._bar.n)
        # In a log, phases that take a moment are not worth a line.
        due = now - self._last_line > _LOG_SECONDS or (
            final and (self._last_line > self._start or self._unit == "inputs")
        )
        if not self._terminal and due:
            self._last_line = now
            say(self._line(state))
        if self._file:
            self._file.write(state, final=final)
        if self._watch:
            self._watch(state)

    def _state(self, now: float) -> dict[str, Any]:
        elapsed = now - self._start
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        known = elapsed > _LOG_SECONDS / 2 and rate > 0
        sums = Counter(self._told)
        failed, filtered = Counter(self._failed), Counter(self._filtered)
        # What this process itself asked storage for again.
        for reason, count in (Counter(retried()) - self._before).items():
            sums[f"retried {reason}"] += count
        for tally in self._tallies:
            failed.update(tally.get("failed", {}))
            filtered.update(tally.get("filtered", {}))
            for name in ("read_bytes", "written_bytes"):
                sums[name] += tally.get(name, 0)
            for reason, count in tally.get("retried", {}).items():
                sums[f"retried {reason}"] += count
        return {
            "phase": self._phase,
            "unit": self._unit,
            "total": self._total,
            "done": self._done,
            "finished": self._finished,
            "ranges": self._ranges
            and {"committed": self._ranges[0], "total": self._ranges[1]},
            "failed": dict(sorted(failed.items())),
            "filtered": dict(sorted(filtered.items())),
            "read_bytes": sums["read_bytes"],
            "written_bytes": sums["written_bytes"],
            "retried": {
                name.removeprefix("retried "): count
                for name, count in sorted(sums.items())
                if name.startswith("retried ")
            },
            "per_s": round(rate, 2),
            "elapsed_s": round(elapsed, 2),
            # The first moments say nothing about the rest.
            "eta_s": round((self._total - self._done) / rate, 1) if known else None,
            "updated": now,
        }

    def _line(self, state: Mapping[str, Any]) -> str:
        ahead = ""
        if state["eta_s"] is not None and self._done < self._total:
            ahead = f", {duration(state['eta_s'])} left"
        return (
            f"{self._phase}: {self._done}/{self._total} {self._unit}, "
            f"{state['per_s']:.0f}/s{ahead}{_postfix(state)}"
        )


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def reasons(counts: Mapping[str, int], shown: int = _REASONS_SHOWN) -> str:
    """`12 http_404, 3 truncated`, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {reason}" for reason, count in ordered[:shown]]
    if rest := sum(count for _, count in ordered[shown:]):
        parts.append(f"{rest} others")
    return ", ".join(parts)


def _postfix(state: Mapping[str, Any]) -> str:
    parts = []
    if ranges := state["ranges"]:
        parts.append(f"{ranges['committed']}/{ranges['total']} ranges committed")
    if state["written_bytes"]:
        parts.append(f"{state['written_bytes'] / 1e6:.1f} MB")
    if state["failed"]:
        parts.append(f"failed: {reasons(state['failed'])}")
    if state["retried"]:
        parts.append(f"tried again: {reasons(state['retried'])}")
    return "".join(f", {part}" for part in parts)


def _remove_torn(path: Path) -> None:
    """Remove what runs left that died while they wrote the file."""
    for torn in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            torn.unlink(missing_ok=True)
