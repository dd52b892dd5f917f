"""Seeing from outside where a run stands, and killing one of its processes there.

Nothing in the run helps: what shows a phase is on storage, in the process table or at
the web server. Phases shorter than a look at the process table are held by stopping the
run's processes (SIGSTOP), looking again, and then killing or going on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.pipeline.corpora import REPOSITORY
from tests.pipeline.web import Reply, WebServer

# A process of a run is known by this variable, wherever its parent went.
_MARK = "PALIMPSEST_TEST_RUN"
_LOOK_SECONDS = 0.001
_SCAN_SECONDS = 0.2
# Far more than any run here takes: a run that hangs fails the test.
_PATIENCE_SECONDS = 300


class Server(WebServer):
    """A web server that says how many requests wait for their answer."""

    waiting = 0

    def begin(self, path: str, headers: Mapping[str, str]) -> Reply:
        with self.lock:
            self.waiting += 1
        return super().begin(path, headers)

    def end(self) -> None:
        super().end()
        with self.lock:
            self.waiting -= 1


def suspend(driver: subprocess.Popen[bytes], locks: Path) -> None:
    """SIGSTOP, but not in the few milliseconds in which it holds the folder's lock:
    whoever comes then is told so (test_storage.py).
    """
    while True:
        driver.send_signal(signal.SIGSTOP)
        while psutil.Process(driver.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        descriptor = os.open(locks, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            driver.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        finally:
            os.close(descriptor)


class Attempt:
    """One start of the command, its processes, and what lies on storage."""

    def __init__(
        self, output: Path, flags: Sequence[str], *, server: Server, ranges: range
    ) -> None:
        """`ranges`: the numbers of the ranges that this run is to commit."""
        self.output, self.server, self.ranges = output, server, ranges
        self.state = output / ".palimpsest"
        # What a dead attempt left does not show where this one stands.
        self._stale = {*self._staging(), *self._unrecorded()}
        self._mark = secrets.token_hex(8)
        self._log = output.parent.parent / f"{self._mark}.log"
        self._found: list[psutil.Process] = []
        self._scanned = 0.0
        with self._log.open("wb") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "pipeline.preprocess", *flags],
                cwd=REPOSITORY,
                env={**os.environ, _MARK: self._mark},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def said(self) -> str:
        """Everything on stderr."""
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Exit status of the driver, which must end."""
        try:
            return self.driver.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver hangs:\n{self.said()}") from None

    def wait_for_the_last(self) -> None:
        """Return when every process that the run started is gone."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while left := [one for one in psutil.process_iter() if self._ours(one)]:
            names = [_words(process) for process in left]
            assert time.monotonic() < deadline, f"still alive: {names}"
            time.sleep(0.2)

    def kill(self, phase: Phase, victim: str, draw: random.Random) -> bool:
        """Kill a process of that kind at a random moment after the phase was first
        seen, while it still, or again, shows. False where the driver ended before.
        """
        delay = draw.uniform(0, phase.spread)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.driver.poll() is None:
            assert time.monotonic() < deadline, f"never seen:\n{self.said()}"
            self._scan()
            if not phase.shows(self):
                time.sleep(_LOOK_SECONDS)
            elif delay:
                time.sleep(delay)
                delay = 0.0
            else:
                with self._held():
                    found = self._victims(victim) if phase.shows(self) else []
                    if found:
                        draw.choice(found).kill()
                        return True
                time.sleep(_LOOK_SECONDS)
        return False

    def planning(self) -> bool:
        return self._has("lease.json") and not self._has("plan.json")

    def fetching(self) -> bool:
        return self._writing() and self.server.waiting > 0

    def decoding(self) -> bool:
        return any(
            _status(process) == psutil.STATUS_RUNNING
            for process in self._of("pipeline.decoder_process")
        )

    def writing(self) -> bool:
        """A shard is being written."""
        return self._writing() and any(self._staging() - self._stale)

    def staging(self) -> bool:
        """A range's files have their names in `candidates`, but no record."""
        return self._writing() and any(self._unrecorded() - self._stale)

    def finding(self) -> bool:
        """A retry looks for what failed."""
        return self._has("running") and not self._count("retries", "*.json")

    def reading(self) -> bool:
        """A retry reads what is committed, to compare with it."""
        stored = [int(path.name) for path in self._below("compare", "stored/*")]
        return self._staged() and any(
            number not in stored for number in range(self.ranges.start)
        )

    def comparing(self) -> bool:
        folders = self._below("compare", "*")
        return self._staged() and len(folders) > 1 and not self._settled()

    def settling(self) -> bool:
        return self._staged() and 0 < self._settled() < len(self.ranges)

    def placing(self) -> bool:
        """Shards have their final names, but there is no record of them."""
        if not self._staged() or self._settled() < len(self.ranges):
            return False
        return len(list(self.output.glob("*/shard-*.tar"))) > self._committed_shards()

    def finishing(self) -> bool:
        """Everything is committed; the complete manifest is not there."""
        return self._committed() and not self._complete()

    def tidying(self) -> bool:
        """The dataset is complete, the run is not at its end."""
        return self._committed() and self._complete() and self._has("lease.json")

    def _writing(self) -> bool:
        # A worker of the attempt before may be writing still.
        return bool(self._of("_run_task")) and not self._staged()

    def _staged(self) -> bool:
        return self._count("candidates", "*.json") == len(self.ranges)

    def _settled(self) -> int:
        return self._count("verdicts", "*") - self.ranges.start

    def _committed(self) -> bool:
        return self._has(f"ranges/{self.ranges.stop - 1:06d}.json")

    def _complete(self) -> bool:
        last = f"ranges/{self.ranges.stop - 1:06d}.json"
        with contextlib.suppress(FileNotFoundError):
            sealed = last in (self.state / "files.json").read_text()
            manifest = json.loads((self.output / "manifest.json").read_text())
            return sealed and manifest["complete"]
        return False

    def _committed_shards(self) -> int:
        records = self._below("ranges", "*.json")
        return sum(len(json.loads(path.read_text())["shards"]) for path in records)

    def _staging(self) -> set[Path]:
        return set(self._below("staging", "*/*.tar"))

    def _unrecorded(self) -> set[Path]:
        paths = self._below("candidates", "*-*")
        return {
            path
            for path in paths
            if not path.with_name(f"{path.name.partition('-')[0]}.json").exists()
        }

    def _has(self, name: str) -> bool:
        return (self.state / name).exists()

    def _below(self, folder: str, pattern: str) -> list[Path]:
        # A folder may vanish while one looks.
        with contextlib.suppress(FileNotFoundError):
            return list((self.state / folder).glob(pattern))
        return []

    def _count(self, folder: str, pattern: str) -> int:
        return len(self._below(folder, pattern))

    def _victims(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            return [psutil.Process(self.driver.pid)]
        if kind == "raylet":
            return [one for one in self._found if _name(one) == "raylet"]
        if kind == "decoder":
            return self._of("pipeline.decoder_process")
        return self._of("_run_task") or self._of("ray::IDLE")

    def _of(self, word: str) -> list[psutil.Process]:
        return [process for process in self._found if word in _words(process)]

    def _scan(self) -> None:
        if time.monotonic() - self._scanned < _SCAN_SECONDS:
            return
        with contextlib.suppress(psutil.Error):
            driver = psutil.Process(self.driver.pid)
            self._found = driver.children(recursive=True)
        self._scanned = time.monotonic()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Stop what makes the run go on."""
        held = [psutil.Process(self.driver.pid), *self._of("ray::")]
        try:
            for process in held:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGSTOP)
            yield
        finally:
            for process in held:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark
        except (psutil.Error, OSError):
            return False


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Where a run is hit, and which of its processes."""

    name: str
    shows: Callable[[Attempt], bool]
    victims: tuple[str, ...]
    spread: float
    """Seconds that the kill comes after the phase is first seen, at most."""


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return ""
