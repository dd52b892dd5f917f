"""A step that hangs: which rank, in which stage, and who waits for whom.

Owns the thread that watches a rank's main thread and the heartbeats, RUN/watchdog. Does
not own the loop that says what it is doing (`trainer.loop`).

Every rank goes through the same stages in the same order. So the rank that has begun
the fewest is the one that the others wait for, whatever collective they are in.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol

from trainer.options import PretrainConfig

FOLDER = "watchdog"
EXIT_STATUS = 75
"""Of a rank that ended because a step hung: temporary failure (sysexits.h)."""
_NAMED = 8
_LONGEST_POLL_S = 10.0
_POLLS = 20


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Where a rank is."""

    rank: int
    step: int
    stage: str
    begun: int
    """Stages that it has begun."""
    since: float
    """Seconds since 1970, by its node's clock."""

    def __str__(self) -> str:
        minutes = max(time.time() - self.since, 0) / 60
        return (
            f"rank {self.rank} has been in {self.stage} of step {self.step} for "
            f"{minutes:.3g} min"
        )


class Steps(Protocol):
    """Whatever gives batches one after another."""

    def next(self) -> Any:
        """The next one."""


class Watchdog:
    """Watches the thread that made it while it is entered.

    Args:
        config: of the run, whose directory all ranks see.
        rank: of this process.
        world_size: of all.
    """

    def __init__(self, config: PretrainConfig, *, rank: int, world_size: int) -> None:
        self._folder, self._size = config.run / FOLDER, world_size
        self._limit_s = 60 * (config.safety.hang_minutes or 0)
        self._abort = config.safety.hang_action == "abort"
        self._watched = threading.get_ident()
        self._beat = Heartbeat(
            rank=rank, step=0, stage="start", begun=0, since=time.time()
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._tell(self._beat)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._limit_s:
            # Not longer: it may be writing to storage that hangs.
            self._thread.join(timeout=1)

    def at(self, stage: str, step: int | None = None) -> None:
        """The main thread begins a stage, of the step that is given or the last one."""
        self._beat = Heartbeat(
            rank=self._beat.rank,
            step=self._beat.step if step is None else step,
            stage=stage,
            begun=self._beat.begun + 1,
            since=time.time(),
        )

    def feed(self, steps: Steps) -> Fed:
        """`steps`, with their reading told apart from the wait for other ranks."""
        return Fed(steps, self)

    def _watch(self) -> None:
        poll_s = min(self._limit_s / _POLLS, _LONGEST_POLL_S)
        told, stuck_s, warned = self._beat, 0.0, False
        while not self._closed.wait(poll_s):
            beat = self._beat
            if beat is not told:
                told, stuck_s, warned = beat, 0.0, False
                self._tell(beat)
                continue
            # Not by the clock: it goes on while the process is suspended.
            stuck_s += poll_s
            if stuck_s < self._limit_s or warned:
                continue
            warned = True
            self._report(beat)
            # The other ranks find out within two polls; they have a say too.
            moved = self._closed.wait(2 * poll_s + 1) or self._beat is not beat
            if self._abort and not moved:
                os._exit(EXIT_STATUS)

    def _tell(self, beat: Heartbeat) -> None:
        path = self._folder / f"rank-{beat.rank:05d}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        # A disk that is full must not end the watch.
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(beat)) + "\n")
            os.replace(temporary, path)

    def _report(self, beat: Heartbeat) -> None:
        lines = [f"{beat} ({socket.gethostname()}, process {os.getpid()})"]
        lines.append(waiting(beat, self._others(beat.rank)))
        if self._abort:
            lines.append(
                "this rank ends unless it goes on at once; the same command continues "
                "the run"
            )
        frame = sys._current_frames().get(self._watched)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        # Past the locks of sys.stderr, which the main thread may hold.
        os.write(2, ("\n" + "\n".join(lines) + "\n" + stack).encode())

    def _others(self, rank: int) -> list[Heartbeat]:
        found = []
        for other in set(range(self._size)) - {rank}:
            path = self._folder / f"rank-{other:05d}.json"
            try:
                found.append(Heartbeat(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError):
                continue
        return sorted(found, key=lambda beat: beat.rank)


@dataclass(frozen=True)
class Fed:
    """Batches, and a word to the watchdog about each."""

    steps: Steps
    watchdog: Watchdog

    def next(self) -> Any:
        """The next one."""
        self.watchdog.at("data")
        found = self.steps.next()
        self.watchdog.at("all-reduce after data")
        return found


def waiting(beat: Heartbeat, others: list[Heartbeat]) -> str:
    """Who waits for whom, as far as `beat`'s rank can see."""
    behind = [other for other in others if other.begun < beat.begun]
    ahead = [other for other in others if other.begun > beat.begun]
    if behind:
        fewest = min(other.begun for other in behind)
        last = [other for other in behind if other.begun == fewest]
        return f"it waits: {_named(last)}"
    if ahead:
        return f"the others wait for it: {_named(ahead)}"
    if others:
        return f"no rank is behind another: {_named(others)}"
    return "no other rank is known"


def _named(beats: list[Heartbeat]) -> str:
    more = f", and {len(beats) - _NAMED} more" if len(beats) > _NAMED else ""
    return ", ".join(map(str, beats[:_NAMED])) + more
