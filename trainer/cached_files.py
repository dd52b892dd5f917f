"""Files behind a URL, fetched into a folder of this node before they are read.

Owns when a file is fetched: ahead, as a reader says what it will read, or at once, when
a reader is there before it; and how long readers were blocked. Does not own requests
(`trainer.fetch`) or the folder, which all processes of a node share
(`trainer.shard_cache`).

What is streamed stays in the cache as long as somebody has it open. Where the cache is
too small for all that are read, some are not fetched: readers get on, because parts of
them can be had from storage (but for web servers that give whole files alone), and
because a share of the cache is kept for files that are read at once.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.fetch import Remote, ShortReadError
from trainer.shard_cache import Room, ShardCache
from trainer.storage import Files, NoRoomError, StorageConfig, StorageError, Wanted

_AHEAD_THREADS = 4
# Between looks at a file that another process is fetching; between looks for room at
# most.
_POLL_S, _LONGEST_POLL_S = 0.02, 0.5
# A file that changes while it is read is read again, so often.
_CHANGES = 4
# Share of the cache that streamed files leave to others, at least.
_SPARE_SHARE = 1 / 16
# A streamed file waits so long for files that are being fetched and may make room then;
# and is not tried again so soon.
_ROOM_S, _FULL_S = 5.0, 1.0


class CachedFiles(Files):
    """The folder at a URL.

    Raises:
        ValueError: unknown scheme, or a package that is missing.
        OSError: the cache cannot be written to.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        self._url, self._config = url, config
        self._remote = Remote(
            url,
            parallel=config.parallel,
            timeout_s=config.timeout_s,
            tries=config.tries,
            hedge=config.hedge,
        )
        self.root = self._remote.shown
        self._cache = ShardCache(
            config.folder, self.root, most_bytes=config.cache_bytes
        )
        weakref.finalize(self, self._cache.close)
        self._lock = threading.Lock()
        self._waited, self._evictions = 0.0, 0
        self._beside = 0
        self._full_until = 0.0
        self._infos: dict[str, Mapping[str, Any]] = {}
        self._pinned: dict[Path, None] = {}
        self._wanted: tuple[Wanted, ...] = ()
        self._queue: deque[Wanted] = deque()
        self._threads = 0
        self._closed = threading.Event()
        self._warned = False

    def local(self, name: str, version: str = "") -> Path:
        os.close(self._descriptor(name, version))
        return self._cache.path(name, version)

    def open(self, name: str, version: str = "") -> BinaryIO:
        descriptor = self._descriptor(name, version, streamed=True)
        return os.fdopen(descriptor, "rb", buffering=0)

    def span(self, name: str, offset: int, size: int) -> bytes:
        began = time.monotonic()
        try:
            info = self._infos.get(name) or self._remote.info(name)
            self._infos[name] = info
            stop = min(offset + size, int(info["size"]))
            if stop < offset + size:
                # It may be another by the next time.
                self._infos.pop(name, None)
            if stop <= offset:
                return b""
            return self._remote.span(name, info, offset, stop)
        except ShortReadError:
            # It is another by now.
            self._infos.pop(name, None)
            return b""
        finally:
            self._was_blocked(time.monotonic() - began)

    def at(self, name: str, version: str = "") -> Path:
        return self._cache.path(name, version)

    def refresh(self, name: str, version: str = "", *, streamed: bool = False) -> Path:
        path = self._cache.path(name, version)
        if not version:
            self._pin(path)
        now = time.time_ns()
        try:
            os.close(self._descriptor(name, version, since_ns=now, streamed=streamed))
        except FileNotFoundError:
            self._cache.remove(path)
            raise
        return path

    def pin(self, name: str, version: str = "") -> Path:
        self._pin(self._cache.path(name, version))
        return self.local(name, version)

    def ahead(self, files: Sequence[Wanted]) -> None:
        wanted = tuple(files)
        with self._lock:
            if wanted == self._wanted or self._closed.is_set():
                return
            self._wanted, self._queue = wanted, deque(wanted)
            # What is read no more has left its place.
            self._full_until = 0.0
            self._infos.clear()
            self._publish()
            more = max(min(_AHEAD_THREADS, len(wanted)) - self._threads, 0)
            self._threads += more
        for _ in range(more):
            threading.Thread(target=self._go_ahead, name="ahead", daemon=True).start()

    def check(self, largest: int, *, beside: int) -> None:
        self._beside = beside
        self._check(largest, streamed=True)

    def figures(self) -> Mapping[str, int]:
        names = ("bytes", "requests", "hedges", "retries", "spans")
        counts = {name: self._remote.figures[name] for name in names}
        return {**counts, "evictions": self._evictions}

    def find_tar(self) -> str | None:
        return self._remote.first_tar()

    def above(self) -> Files | None:
        folder = self._url.rstrip("/").rpartition("/")[0]
        has_name = bool(folder.partition("://")[2])
        return CachedFiles(folder, self._config) if has_name else None

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            self._queue.clear()
            self._cache.close()
        self._remote.close()

    @property
    def waited(self) -> float:
        return self._waited

    def _was_blocked(self, seconds: float) -> None:
        with self._lock:
            self._waited += seconds

    def _descriptor(
        self, name: str, version: str, *, since_ns: int = 0, streamed: bool = False
    ) -> int:
        """Descriptor of a whole file, fetched no earlier than `since_ns`."""
        path = self._cache.path(name, version)
        found = self._cache.opened(path, since_ns=since_ns)
        if found is not None:
            return found
        began = time.monotonic()
        try:
            while True:
                if streamed and time.monotonic() < self._full_until:
                    raise _no_room(path)
                found = self._get_now(path, name, since_ns=since_ns, streamed=streamed)
                if found is not None:
                    return found
                self._pause()
        finally:
            self._was_blocked(time.monotonic() - began)

    def _get_now(
        self, path: Path, name: str, *, since_ns: int, streamed: bool
    ) -> int | None:
        """`_get` of what must be; without room, nobody looks for it again so soon."""
        try:
            return self._get(
                path, name, since_ns=since_ns, must=True, streamed=streamed
            )
        except NoRoomError:
            self._full_until = time.monotonic() + _FULL_S
            raise

    def _get(
        self, path: Path, name: str, *, since_ns: int, must: bool, streamed: bool
    ) -> int | None:
        """Descriptor of a file that is there or was fetched by this call; None where
        another is fetching it. Without room, a NoRoomError for one that need not be or
        is streamed.
        """
        place = self._cache.claim(path)
        if place is None:
            return None
        claimed = True
        try:
            # It may have come between the last look and the claim.
            found = self._cache.opened(path, since_ns=since_ns)
            if found is not None:
                return found
            began_ns = self._fetch(place, path, name, must=must, streamed=streamed)
            self._cache.keep(place, path, began_ns=began_ns)
            claimed = False
            return place
        finally:
            if claimed:
                self._cache.drop(place, path)

    def _fetch(
        self, place: int, path: Path, name: str, *, must: bool, streamed: bool
    ) -> int:
        """Fetch a file into its claimed place; when that began, in ns."""
        for _ in range(_CHANGES):
            began_ns = time.time_ns()
            info = self._remote.info(name)
            size = int(info["size"])
            self._make_room(place, path, size, must=must, streamed=streamed)
            if self._fill(place, name, info):
                return began_ns
        raise StorageError(
            f"{self.root}/{name} changes while it is read, or is shorter than storage "
            "says: the same command continues once whoever writes it is done"
        )

    def _fill(self, place: int, name: str, info: Mapping[str, Any]) -> bool:
        """Whether all bytes that came in are of one and the same file."""
        try:
            for offset, data in self._remote.ranges(name, info):
                self._write(place, data, offset)
        except ShortReadError:
            return False
        return self._remote.info(name) == info

    def _write(self, place: int, data: memoryview, offset: int) -> None:
        try:
            while data:
                done = os.pwrite(place, data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                f"the disk of {self._cache.root} is full: give a folder on one that "
                "holds what the lanes of a node shuffle at once (lanes x "
                "shuffle_shards shards) as --storage.cache"
            ) from error

    def _make_room(
        self, place: int, path: Path, size: int, *, must: bool, streamed: bool
    ) -> None:
        self._check(size, streamed=streamed)
        began = stuck = time.monotonic()
        pause = _POLL_S
        while True:
            room = self._cache.make_room(
                place, path, size, must=must, streamed=streamed, spare=self._spare
            )
            self._say(room)
            if room.made:
                return
            now = time.monotonic()
            if room.possible:
                stuck = now
            if not must or (streamed and not (room.possible and now < began + _ROOM_S)):
                raise _no_room(path)
            if now > stuck + self._config.timeout_s:
                raise StorageError(
                    f"the cache {self._cache.root} is full of shards that are being "
                    "read: give more as --storage.cache_bytes, or another folder as "
                    "--storage.cache"
                )
            # Others are fetching what fills the cache; then it can make room.
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_POLL_S)

    def _say(self, room: Room) -> None:
        with self._lock:
            self._evictions += room.evicted
            warn = room.wanted_bytes and not self._warned
            self._warned |= bool(warn)
        if warn:
            warnings.warn(
                f"the shards that are read at once do not fit into the cache "
                f"{self._cache.root}: some are fetched twice, and samples of those "
                "without a place are read one by one, which is slow: give "
                f"--storage.cache_bytes {self._bound_for(room.wanted_bytes)} or more, "
                "on a disk that has as much",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def _spare(self) -> int:
        """Bytes that streamed files leave to others."""
        return max(int(self._cache.most_bytes * _SPARE_SHARE), self._beside)

    def _bound_for(self, streamed: int) -> int:
        """The least bound that has room for so many bytes of streamed files, and for
        others beside them.
        """
        return max(math.ceil(streamed / (1 - _SPARE_SHARE)), streamed + self._beside)

    def _check(self, size: int, *, streamed: bool) -> None:
        """Raise ValueError where a file of `size` bytes could never be had."""
        least = self._bound_for(size) if streamed else size
        if least > self._cache.most_bytes:
            raise ValueError(
                f"{self.root} has a file of {size} bytes, which a cache of "
                f"{self._cache.most_bytes} cannot hold: give --storage.cache_bytes "
                f"{least} or more, best what the lanes of a node shuffle at once "
                "(lanes x shuffle_shards shards)"
            )

    def _pause(self, seconds: float = _POLL_S) -> None:
        if self._closed.wait(seconds):
            raise StorageError(f"{self.root}: closed while it was read")

    def _pin(self, path: Path) -> None:
        with self._lock:
            if path not in self._pinned:
                self._pinned[path] = None
                self._publish()

    def _publish(self) -> None:
        """Tell what must not go; the caller has the lock."""
        if self._closed.is_set():
            return
        path = self._cache.path
        wanted = [(path(file.name, file.version), file.size) for file in self._wanted]
        self._cache.publish(self._pinned, wanted)

    def _go_ahead(self) -> None:
        while (wanted := self._next()) is not None:
            try:
                self._get_ahead(wanted)
            except FileNotFoundError:
                # Whoever reads it will say so.
                continue
            except NoRoomError:
                with self._lock:
                    small = (file for file in self._queue if not file.streamed)
                    self._queue = deque(small)
            except (OSError, ValueError):
                with self._lock:
                    self._queue.clear()

    def _next(self) -> Wanted | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._threads -= 1
            return None

    def _get_ahead(self, wanted: Wanted) -> None:
        """Fetch a file unless it is there or another process is fetching it."""
        path = self._cache.path(wanted.name, wanted.version)
        found = self._cache.opened(path)
        if found is None:
            found = self._get(
                path,
                wanted.name,
                since_ns=0,
                must=False,
                streamed=wanted.streamed,
            )
        if found is not None:
            os.close(found)


def _no_room(path: Path) -> NoRoomError:
    return NoRoomError(errno.ENOSPC, "no room in the cache", str(path))
