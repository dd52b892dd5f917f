"""Running the stages of a replication: some at a time, until done or out of time.

Owns processes, completion markers, and what remains with an estimate. Does not own the
stages (`benchmarks.replication.stages`).

A stage is complete when its marker, WORK/stages/NAME.json, is there; the marker has the
words that it was made with, its seconds, and its result. Every command is itself one
that can be killed and called again, so nothing has to be cleaned up.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replication.stages import Stage, resolved
from pipeline.manifest import MANIFEST, file_sha256
from pipeline.terminal import printable
from trainer.contract import CONFIG, FINETUNE, PREPROCESSOR
from trainer.files import write_text

_LOCK = "lock"
_STAGES = "stages"
# Datasets, runs, fine-tunings and exports have one of these.
_OF_OTHERS = (MANIFEST, CONFIG, FINETUNE, PREPROCESSOR)
_SHOWN = 5
_POLL_S = 0.2
# A step and a checkpoint.
_GRACE_S = 60.0
# What a killed replication started has the lock until it is gone.
_ENDING_S = 2.0
_PR_SET_PDEATHSIG = 1
_TOLD = 12


@dataclass(frozen=True, kw_only=True)
class Place:
    """A replication's folder."""

    work: Path
    inputs: Mapping[str, str]
    """Corpora by name."""

    def marker(self, stage: Stage) -> Path:
        """File that says that a stage is complete."""
        return self._file(_STAGES, stage, "json")

    def spent(self, stage: Stage) -> Path:
        """File of the seconds of calls that did not complete it."""
        return self._file(_STAGES, stage, "spent")

    def log(self, stage: Stage) -> Path:
        """What its command has said."""
        return self._file("logs", stage, "log")

    def _file(self, folder: str, stage: Stage, suffix: str) -> Path:
        return self.work / folder / f"{stage.name}.{suffix}"

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """The marker of a complete stage.

        Raises:
            ValueError: it was made with other words, or of another corpus.
        """
        path = self.marker(stage)
        if not path.is_file():
            return None
        marker: dict[str, Any] = json.loads(path.read_text())
        if marker["words"] != list(stage.words):
            raise ValueError(
                f"{stage.name} was made with other keys than the matrix has now "
                f"({_change(marker['words'], stage.words)}): take a new --work, or "
                f"remove {path} and {self.work / stage.name} and what was made of it"
            )
        for name, source in marker.get("inputs", {}).items():
            if _place(self.inputs.get(name, source)) != _place(source):
                raise ValueError(
                    f"{stage.name} was made of {source}, and --inputs.{name} is "
                    f"{self.inputs[name]}: take a new --work"
                )
        return marker

    def inputs_of(self, stage: Stage) -> dict[str, str]:
        """Corpora that its command reads."""
        return {
            name: path
            for name, path in self.inputs.items()
            if any(f"{{input:{name}}}" in word for word in stage.words)
        }


def _place(path: str) -> str:
    """The same for every spelling of a local path."""
    return path if "://" in path else os.path.realpath(path)


def _change(old: Sequence[str], new: Sequence[str]) -> str:
    gone = [word for word in old if word not in new]
    come = [word for word in new if word not in old]
    return f"{' '.join(gone) or 'nothing'} -> {' '.join(come) or 'nothing'}"


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """The only replication in its folder; the descriptor that holds the lock.

    Raises:
        ValueError: another one is at work there.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / _LOCK, "w") as file:
        end = time.monotonic() + _ENDING_S
        while not _lock(file.fileno()):
            if time.monotonic() > end:
                raise ValueError(
                    f"another replication is at work in {work}: wait for it, or take "
                    "another --work"
                )
            time.sleep(_POLL_S)
        yield file.fileno()


def require_own(work: Path) -> None:
    """Raise ValueError where a folder holds something else than a replication."""
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file: give a folder")
    there = sorted(work.iterdir()) if work.exists() else []
    if {_LOCK, _STAGES}.intersection(path.name for path in there):
        return
    # A log or the matrix may lie there already.
    others = [
        path.name
        for path in there
        if path.name in _OF_OTHERS or (path.is_dir() and path.name[0] != ".")
    ]
    if others:
        raise ValueError(
            f"--work {work} is no folder of a replication and holds "
            f"{', '.join(others[:_SHOWN])}: give a new one"
        )


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def estimate(
    stage: Stage, seconds: Mapping[str, float], measured: Mapping[str, float]
) -> float | None:
    """Seconds that a stage takes: as stages of the closest kind took, else as the
    matrix says, else as stages of a wider kind took; None: nobody knows.
    """
    closest = stage.costs[0]
    for known in (measured, seconds):
        if closest in known:
            return known[closest]
    for cost in stage.costs[1:]:
        for known in (measured, seconds):
            if cost in known:
                return known[cost]
    return None


def measured_seconds(place: Place, stages: Sequence[Stage]) -> dict[str, float]:
    """Mean seconds of complete stages, under every name that they are counted under."""
    found: dict[str, list[float]] = {}
    for stage in stages:
        if marker := place.done(stage):
            for cost in stage.costs:
                found.setdefault(cost, []).append(marker["seconds"])
    return {cost: sum(values) / len(values) for cost, values in found.items()}


class Schedule:
    """The stages that remain, run `jobs` at a time. Not for several threads: what it
    starts ends with the thread that started it.
    """

    def __init__(
        self,
        place: Place,
        stages: Sequence[Stage],
        *,
        jobs: int,
        seconds: Mapping[str, float],
        threads: int | None,
    ) -> None:
        self.place, self.stages, self.jobs = place, stages, jobs
        self.seconds, self._threads = seconds, threads
        self._complete = {stage.name for stage in stages if place.done(stage)}
        self._failed: dict[str, str] = {}
        self._running: dict[str, tuple[Stage, subprocess.Popen[bytes], float]] = {}
        self._whole_s = 0.0

    def remaining(self) -> list[Stage]:
        """Stages that are not complete."""
        return [one for one in self.stages if one.name not in self._complete]

    def left_s(self) -> tuple[float, int]:
        """Seconds that the remaining stages take, `jobs` at a time, and how many of
        them nobody knows the time of. What a stage that was stopped has spent counts.
        """
        known = measured_seconds(self.place, self.stages)
        total, unknown = 0.0, 0
        for stage in self.remaining():
            took = estimate(stage, self.seconds, known)
            if took is None:
                unknown += 1
            else:
                total += max(took - self._spent(stage), 0.0)
        return total / self.jobs, unknown

    def run(self, *, minutes: float | None, lock: int) -> dict[str, str]:
        """Run what remains for at most so many minutes; what each failure said.
        Stages that need a failed one are left, all others are run.
        """
        self._whole_s = 60 * (minutes or 0.0)
        end = None if minutes is None else time.monotonic() + self._whole_s
        began = False
        try:
            while True:
                over = end is not None and time.monotonic() >= end
                if not over:
                    began |= self._start(end, lock, first=not began)
                if over or not self._running:
                    break
                time.sleep(_POLL_S)
                self._collect()
        finally:
            self._stop()
        return self._failed

    def _start(self, end: float | None, lock: int, *, first: bool) -> bool:
        """Start what can be; whether anything was."""
        began = False
        for stage in self.remaining():
            if len(self._running) >= self.jobs:
                break
            idle = stage.name not in self._running and stage.name not in self._failed
            if not idle or not self._complete.issuperset(stage.needs):
                continue
            # One that cannot be stopped is only begun in time to end, unless it is
            # all that a whole call is for.
            if not (first or stage.stoppable) and not self._fits(stage, end):
                continue
            self._begin(stage, lock)
            began, first = True, False
        return began

    def _fits(self, stage: Stage, end: float | None) -> bool:
        if end is None:
            return True
        known = measured_seconds(self.place, self.stages)
        took = estimate(stage, self.seconds, known)
        # Who knows how long: not at the last moment.
        left = end - time.monotonic()
        return left >= (self._whole_s / 2 if took is None else took)

    def _begin(self, stage: Stage, lock: int) -> None:
        place = self.place
        words = resolved(stage.words, work=place.work, inputs=place.inputs)
        threads = {"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}
        for path in (place.log(stage), place.marker(stage), place.work / stage.name):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(place.log(stage), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                env={**os.environ, **threads},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is for the schedule, which stops them in order.
                start_new_session=True,
                pass_fds=(lock,),
                # There is one thread.
                preexec_fn=_die_with_parent,  # noqa: PLW1509
            )
        self._running[stage.name] = (stage, process, time.monotonic())
        print(f"begins    {stage.name}: {place.log(stage)}", flush=True)

    def _collect(self) -> None:
        """Take note of what has ended."""
        for name, (stage, process, began) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                self._ended(stage, process.returncode, time.monotonic() - began)

    def _ended(self, stage: Stage, status: int, took: float) -> None:
        took += self._spent(stage)
        if status:
            self._failed[stage.name] = self._last_words(stage)
            print(f"failed    {stage.name}: {self._failed[stage.name]}", flush=True)
            return
        marker: dict[str, Any] = {
            "words": list(stage.words),
            "seconds": round(took, 2),
            "inputs": self.place.inputs_of(stage),
        }
        if stage.result:
            path = self.place.work / stage.result
            if not path.is_file():
                self._failed[stage.name] = f"it left no {path}"
                return
            marker["result"] = json.loads(path.read_text())
            marker["kept_sha256"] = kept_sha256(path.with_suffix(".npz"))
        write_text(self.place.marker(stage), json.dumps(marker, indent=1) + "\n")
        self._complete.add(stage.name)
        left, unknown = self.left_s()
        more = f" and {unknown} of unknown length" if unknown else ""
        print(
            f"{len(self._complete):4d}/{len(self.stages)} {stage.name}: {took:.0f} s; "
            f"about {duration(left)} left{more}",
            flush=True,
        )

    def _last_words(self, stage: Stage) -> str:
        log = self.place.log(stage)
        lines = log.read_text(errors="replace").splitlines()[-_TOLD:]
        error = [line for line in lines if "error:" in line.lower()]
        last = (error or lines or ["nothing was said"])[-1].strip()
        return f"{printable(last.removeprefix('python -m '))} ({log})"

    def _spent(self, stage: Stage) -> float:
        path = self.place.spent(stage)
        return float(path.read_text()) if path.is_file() else 0.0

    def _stop(self) -> None:
        """Ask what runs to stop and wait for it; note the seconds of what is kept."""
        for _, process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        for stage, process, began in self._running.values():
            try:
                status = process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            took = time.monotonic() - began
            if status == 0:
                self._ended(stage, status, took)
                continue
            if stage.stoppable:
                spent = self._spent(stage) + took
                write_text(self.place.spent(stage), f"{spent:.2f}\n")
            print(f"stopped   {stage.name} after {took:.0f} s", flush=True)
        self._running.clear()


def kept_sha256(path: Path) -> str | None:
    """Of the file in which an evaluation keeps what it predicted; None: it has none."""
    return file_sha256(path) if path.is_file() else None


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _die_with_parent() -> None:
    """In a new process: it is killed when the schedule is, in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
