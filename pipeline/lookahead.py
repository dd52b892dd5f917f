"""Work ahead of whoever takes the results, in order, within bounds.

Owns the window of jobs that are under way, and the bytes that they may hold. Does not
own the jobs (`pipeline.fetch`, `pipeline.download`).

The bounds cannot lock up: the job whose result is waited for is never refused room,
and a job that is refused gives back what it held and starts again when its turn comes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.images import ImageError

Item = TypeVar("Item")
Failure = TypeVar("Failure", bound=Exception)


class NoRoom(Exception):
    """A job ahead of its turn found no room for its bytes."""


class Room:
    """Bytes that jobs hold until their results are taken."""

    def __init__(self) -> None:
        self.held = 0
        self._lock = threading.Lock()

    def add(self, size: int, limit: float) -> bool:
        """Count `size` more bytes, unless that passes `limit`."""
        with self._lock:
            if size > 0 and self.held + size > limit:
                return False
            self.held += size
            return True


class Share:
    """What one job holds of a room; used by one thread at a time."""

    def __init__(self, room: Room, limit: float) -> None:
        self.room = room
        self._limit = limit
        self._held = 0

    def take(self, size: int) -> None:
        """Hold `size` more bytes. Raises NoRoom."""
        if not self.room.add(size, self._limit):
            raise NoRoom
        self._held += size

    def hold(self, size: int) -> None:
        """Hold `size` more bytes that are there already; never refused."""
        self.room.add(size, float("inf"))
        self._held += size

    def drop(self) -> None:
        """Hold nothing: the bytes are gone, or another's."""
        self.room.add(-self._held, 0)
        self._held = 0


Start = Callable[[Item, Share], "Future[bytes]"]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far jobs may run ahead."""

    jobs: int
    """Jobs under way or done whose results are not yet taken."""
    begin_bytes: int = 64 << 20
    """No job begins while this much is held."""
    held_bytes: int = 256 << 20
    """More than this is held only by the job whose turn it is."""


@dataclass(frozen=True, kw_only=True)
class _Pending(Generic[Item]):
    item: Item
    share: Share
    future: Future[bytes]


def in_order(
    items: Iterable[Item], start: Start[Item], bounds: Bounds
) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Every item with its job's bytes or the ImageError that it raised, in the order of
    `items`. `start(item, share)` begins a job, which takes its bytes from the share and
    drops them where it fails. Every other exception ends the iteration.
    """
    room = Room()
    pending: deque[_Pending[Item]] = deque()
    try:
        for item in items:
            share = Share(room, bounds.held_bytes)
            future = start(item, share)
            pending.append(_Pending(item=item, share=share, future=future))
            while pending and (
                len(pending) >= bounds.jobs
                or room.held >= bounds.begin_bytes
                or pending[0].future.done()
            ):
                yield _taken(pending.popleft(), start, room)
        while pending:
            yield _taken(pending.popleft(), start, room)
    finally:
        for each in pending:
            each.future.cancel()


def bare(error: Failure) -> Failure:
    """An exception without the frames that it went through: they keep whole bodies
    alive, for as long as it waits to be looked at.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _taken(
    first: _Pending[Item], start: Start[Item], room: Room
) -> tuple[Item, bytes | ImageError]:
    try:
        try:
            data = first.future.result()
        except NoRoom:
            share = Share(room, float("inf"))
            data = start(first.item, share).result()
            share.drop()
        return first.item, data
    except ImageError as error:
        return first.item, bare(error)
    finally:
        first.share.drop()
