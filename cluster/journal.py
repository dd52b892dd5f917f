"""What happened in a run, on storage: events one by one, and what nodes were used.

Owns the names and fields of events and their files below RUN/cluster, which
`cluster.status` reads and drivers write. Times are allowed here: nothing that trains
depends on it. Does not own what leads to an event (`cluster.elastic`,
`cluster.stages`).

An event is a file of its own, so that a driver that was killed, and another that goes
on in its place, never write to the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.store import Store, first_line, without_password

FOLDER = "cluster"
# A driver says this often that it is there (`cluster.nodes`), and a little more.
SIGN_OF_LIFE_SECONDS = 25.0
_POLL_SECONDS = 1.0
_EVENTS = "events"
_USAGE = "usage"
# Of a file of such a name that somebody else wrote, or that a failing disk has changed.
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError)

Kind = Literal[
    "driver_started",  # command, config, cluster (its address), host, pid
    "driver_ended",  # status: finished, or an error's line
    "stage_started",  # stage
    "stage_finished",  # stage, seconds
    "stage_failed",  # stage, cause
    "waiting",  # wanted, there: nodes for training
    "attempt_started",  # attempt, world_size, nodes (their names), step
    "attempt_ended",  # attempt, cause (of CAUSES), detail, node, step, saved, log
    "released",  # nodes (how many were given back)
    "note",  # text
]
CAUSES = ("finished", "failure", "preemption", "notice", "growth", "stopped")
"""Why an attempt ended: it was done; a process failed on a sound node; a node was taken
away; a node gave notice and all ranks saved; there were more nodes to go on with; the
driver was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened."""

    time: float
    """Seconds since 1970, by the clock of the driver's node."""
    driver: str
    """Which driver saw it."""
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """Writes the events of one driver.

    Args:
        run: the run's directory.
        tell: prints a line for people.
    """

    def __init__(self, run: Store, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._store = run.below(FOLDER)
        self._driver = uuid.uuid4().hex[:8]
        self._number = 0

    def write(self, kind: Kind, line: str | None = None, **fields: Any) -> None:
        """Write an event down and, where a line is given, tell people.

        Storage that does not take it costs the event, not the run.
        """
        if line:
            self._tell(line)
        now = time.time()
        event = {"time": now, "driver": self._driver, "kind": kind, **fields}
        if kind == "driver_started":
            event |= {"host": socket.gethostname(), "pid": os.getpid()}
        name = f"{int(now * 1000):014d}-{self._driver}-{self._number:06d}.json"
        self._number += 1
        self._put(f"{_EVENTS}-{name}", event)

    def usage(
        self, node_seconds: Mapping[str, float], alive: Mapping[str, int]
    ) -> None:
        """Write down for how long this driver has seen nodes, by type, and how many
        there are.
        """
        row = {"node_seconds": dict(node_seconds), "alive": dict(alive)}
        self._put(f"{_USAGE}-{self._driver}.json", {"time": time.time(), **row})

    def _put(self, name: str, value: Mapping[str, Any]) -> None:
        try:
            text = without_password(json.dumps(value)) + "\n"
            self._store.write(name, text.encode())
        except OSError as error:
            self._tell(f"{self._store.url}/{name} is not written: {first_line(error)}")


def read_events(run: Store) -> list[Event]:
    """Events of every driver of a run, oldest first."""
    store = run.below(FOLDER)
    events: list[Event] = []
    for name in store.names():
        if not name.startswith(f"{_EVENTS}-"):
            continue
        with contextlib.suppress(*_NOT_OURS):
            row = json.loads(store.read(name) or b"")
            events.append(
                Event(
                    time=float(row.pop("time")),
                    driver=row.pop("driver"),
                    kind=row.pop("kind"),
                    fields=row,
                )
            )
    return sorted(events, key=lambda event: event.time)


def shows_life(run: Store, seconds: float = SIGN_OF_LIFE_SECONDS) -> bool:
    """Whether a driver writes to the journal within some seconds. By what changes and
    no stamp in it: clocks of two machines may differ by any amount.
    """
    before = _signs(run)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(_POLL_SECONDS, seconds))
        if _signs(run) != before:
            return True
    return False


def _signs(run: Store) -> tuple[int, float]:
    return len(run.below(FOLDER).names()), read_usage(run).time


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Nodes, as far as the drivers of a run have seen them."""

    time: float = 0.0
    """When a driver last looked, in seconds since 1970."""
    node_seconds: Mapping[str, float] = field(default_factory=dict)
    """By node type, of all drivers."""
    alive: Mapping[str, int] = field(default_factory=dict)
    """By node type, when a driver last looked."""


def read_usage(run: Store) -> Usage:
    """Nodes that the drivers of a run have seen."""
    store = run.below(FOLDER)
    last, alive = 0.0, {}
    total: dict[str, float] = {}
    for name in store.names():
        if not name.startswith(f"{_USAGE}-"):
            continue
        with contextlib.suppress(*_NOT_OURS):
            row = json.loads(store.read(name) or b"")
            for kind, seconds in row["node_seconds"].items():
                total[kind] = total.get(kind, 0.0) + float(seconds)
            if row["time"] > last:
                last, alive = row["time"], dict(row["alive"])
    return Usage(time=last, node_seconds=total, alive=alive)
