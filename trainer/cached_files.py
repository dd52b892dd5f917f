"""Files behind a URL, fetched into a folder of this node before they are read.

Owns when a file is fetched: ahead, as a reader says what it will read, or at once, when
a reader is there before it; and how long readers were blocked. Does not own requests
(`trainer.fetch`) or the folder, which all processes of a node share
(`trainer.shard_cache`).

Whoever fetches a file for a reader opens it before it can be evicted, so that every
reader gets on even where the cache is too small for all that are reading.
"""

from __future__ import annotations

import errno
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
from trainer.shard_cache import PINNED, ShardCache
from trainer.storage import Files, StorageConfig, StorageError, Wanted

_AHEAD_THREADS = 4
# Between looks at a file that another process is fetching.
_POLL_S = 0.02
# A file that changes while it is read is read again, so often.
_CHANGES = 4


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
        return os.fdopen(self._descriptor(name, version), "rb", buffering=0)

    def at(self, name: str) -> Path | None:
        """None: what was evicted is as good as before to whoever has it open."""
        return None

    def refresh(self, name: str, version: str = "") -> Path:
        path = self._cache.path(name, version)
        if not version:
            self._pin(path)
        try:
            os.close(self._descriptor(name, version, since_ns=time.time_ns()))
        except FileNotFoundError:
            path.unlink(missing_ok=True)
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
            self._publish()
            more = max(min(_AHEAD_THREADS, len(wanted)) - self._threads, 0)
            self._threads += more
        for _ in range(more):
            threading.Thread(target=self._go_ahead, name="ahead", daemon=True).start()

    def check(self, largest: int) -> None:
        most = self._cache.most_bytes
        if largest > most:
            raise ValueError(
                f"{self.root} has a file of {largest} bytes, which no cache of {most} "
                f"can hold: give --storage.cache_bytes {largest} or more, best what "
                "the lanes of a node shuffle at once (lanes x shuffle_shards shards)"
            )

    def figures(self) -> Mapping[str, int]:
        names = ("bytes", "requests", "hedges", "retries")
        counts = {name: self._remote.figures[name] for name in names}
        return {**counts, "evictions": self._evictions}

    def find_tar(self) -> str | None:
        return self._remote.first_tar()

    def above(self) -> Files | None:
        folder = self._url.rstrip("/").rpartition("/")[0]
        has_name = bool(folder.partition("://")[2])
        return CachedFiles(folder, self._config) if has_name else None

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._queue.clear()
        self._remote.close()

    @property
    def waited(self) -> float:
        return self._waited

    def _descriptor(self, name: str, version: str, *, since_ns: int = 0) -> int:
        """Descriptor of a whole file, fetched no earlier than `since_ns`."""
        path = self._cache.path(name, version)
        found = self._cache.opened(path, since_ns=since_ns)
        if found is not None:
            return found
        began = time.monotonic()
        try:
            while True:
                found = self._get(path, name, since_ns=since_ns, must=True)
                if found is not None:
                    return found
                self._pause()
        finally:
            with self._lock:
                self._waited += time.monotonic() - began

    def _get(self, path: Path, name: str, *, since_ns: int, must: bool) -> int | None:
        """Descriptor of a file that is there or was fetched by this call; None where
        another is fetching it. Where it need not be and there is no room, an OSError.
        """
        place = self._cache.claim(path)
        if place is None:
            return None
        kept = False
        try:
            # It may have come between the last look and the claim.
            found = self._cache.opened(path, since_ns=since_ns)
            if found is not None:
                return found
            self._fetch(place, path, name, must=must)
            kept = True
            return place
        finally:
            if not kept:
                self._cache.drop(place, path)

    def _fetch(self, place: int, path: Path, name: str, *, must: bool) -> None:
        """Fetch a file into its claimed place."""
        for _ in range(_CHANGES):
            began_ns = time.time_ns()
            info = self._remote.info(name)
            self._make_room(place, path, int(info["size"]), must=must)
            if self._fill(place, name, info):
                self._cache.keep(place, path, began_ns=began_ns)
                return
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

    def _make_room(self, place: int, path: Path, size: int, *, must: bool) -> None:
        self.check(size)
        while True:
            room = self._cache.make_room(place, path, size, must=must)
            with self._lock:
                self._evictions += room.evicted
                warn = room.wanted_bytes and not self._warned
                self._warned |= bool(warn)
            if warn:
                warnings.warn(
                    f"the shards that are read at once do not fit into the cache "
                    f"{self._cache.root}: those in use stay on its disk beyond the "
                    "bound, others may be fetched twice: give --storage.cache_bytes "
                    f"{room.wanted_bytes} or more, on a disk that has as much",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if room.made:
                return
            if not must:
                raise _NoRoomError(errno.ENOSPC, "no room in the cache", str(path))
            # Others are fetching what fills the cache; then it can make room.
            self._pause()

    def _pause(self) -> None:
        if self._closed.wait(_POLL_S):
            raise StorageError(f"{self.root}: closed while it was read")

    def _pin(self, path: Path) -> None:
        with self._lock:
            if path not in self._pinned:
                self._pinned[path] = None
                self._publish()

    def _publish(self) -> None:
        """Tell what must not go: what is pinned, then what is wanted, first first."""
        pinned = [(path, PINNED) for path in self._pinned]
        wanted = [
            (self._cache.path(name, version), size)
            for name, version, size in self._wanted
        ]
        self._cache.publish([*pinned, *wanted])

    def _go_ahead(self) -> None:
        while (wanted := self._next()) is not None:
            try:
                self._get_ahead(wanted)
            except FileNotFoundError:
                # Whoever reads it will say so.
                continue
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
            found = self._get(path, wanted.name, since_ns=0, must=False)
        if found is not None:
            os.close(found)


class _NoRoomError(OSError):
    """A file that need not be fetched now and would drive out what is needed sooner."""
