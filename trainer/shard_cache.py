"""A folder of fetched files that all processes of a node share.

Owns which process fetches a file, how much lies in the folder, which file makes room
for another, and that a process may die anywhere: there is no daemon and no state but
files. A file is claimed by a lock of the kernel's, which ends with its process, and
appears whole, by a rename. What a dead process left is what nobody has locked. A file
that somebody has open is locked too, and stays: its bytes would not be gone. Does not
own the bytes (`trainer.fetch`) or which files are wanted (`trainer.storage`).

    CACHE/palimpsest.lock           held while room is made
    CACHE/palimpsest-live/ID.lock   a running process
    CACHE/palimpsest-live/ID.needs  what it will read, in order
    CACHE/DATASET/URL               where DATASET, 32 hex digits, comes from
    CACHE/DATASET/parts/KEY         being fetched, of its full size and locked
    CACHE/DATASET/VERSION/NAME      whole

Nothing else in the folder is looked at, counted or removed: a user may have named one
that holds other things.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LOCK, _LIVE = "palimpsest.lock", "palimpsest-live"
_PARTS, _URL = "parts", "URL"
_ID = re.compile(r"[0-9a-f]{32}")
# Of the disk, for others: beyond it even a cache below its bound makes room.
_DISK_LEFT_BYTES = 256 << 20
# Told in place of a file's bytes.
_PINNED = "pinned"


@dataclass(frozen=True, kw_only=True)
class Room:
    """What came of making room."""

    made: bool
    possible: bool = True
    """Whether there will be room once nobody is fetching; what is open may leave too
    little."""
    evicted: int = 0
    """Files that went."""
    wanted_bytes: int = 0
    """All that running processes will read, where that is more than fits; else 0."""


class Need(NamedTuple):
    """A file that running processes will read."""

    place: int
    """In the order in which it will be read, the earliest of all processes."""
    size: int
    """Bytes, 0 where nobody knows."""
    pinned: bool
    """Needed all the time."""


class ShardCache:
    """The cache at `root`, for one dataset.

    Args:
        root: folder of the cache; made if need be.
        url: of the dataset, as it may be written down.
        most_bytes: bound on everything below `root`, other datasets included.

    Raises:
        OSError: the folder cannot be written to, or knows no locks.
    """

    def __init__(self, root: Path, url: str, *, most_bytes: int) -> None:
        self.root = root
        self.most_bytes = most_bytes
        self.dataset = hashlib.sha256(url.encode()).hexdigest()[:32]
        self._live = root / _LIVE / uuid.uuid4().hex
        for folder in (root, root / _LIVE, root / self.dataset / _PARTS):
            # Whoever may not read the dataset may not read it here.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = root / self.dataset / _URL
        if not note.exists():
            note.write_text(f"{url}\n")
        self.remove_left()
        self._live_lock = self._stay_alive()

    def path(self, name: str, version: str) -> Path:
        """Where a file of the dataset lies once it is whole. `version` is a hash of its
        bytes, or empty where that is not known before.
        """
        return self.root / self.dataset / (version[:16] or "newest") / name

    def opened(self, path: Path, *, since_ns: int = 0) -> int | None:
        """Descriptor of a file that is there whole and whose fetch began at `since_ns`
        or later; it counts as used now, and is not evicted until it is closed.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fetched = os.fstat(descriptor).st_mtime_ns
        if fetched < since_ns or not _is_held(descriptor):
            os.close(descriptor)
            return None
        with contextlib.suppress(PermissionError):
            os.utime(descriptor, ns=(time.time_ns(), fetched))
        return descriptor

    def claim(self, path: Path) -> int | None:
        """Descriptor of the locked, empty place to fetch a file into; None while
        another thread or process has it. It must go to `keep` or to `drop`.
        """
        descriptor = _claim(self._part(path))
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
        return descriptor

    def keep(self, descriptor: int, path: Path, *, began_ns: int) -> bool:
        """Let a claimed place that is filled appear as `path`, and hold it open to
        read. False where it has been evicted already: the descriptor is closed.
        """
        os.utime(descriptor, ns=(time.time_ns(), began_ns))
        while True:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Whoever makes room removes empty folders.
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._part(path), path)
                break
        if _is_held(descriptor):
            return True
        os.close(descriptor)
        return False

    def drop(self, descriptor: int, path: Path) -> None:
        """Give a claimed place back."""
        self._part(path).unlink(missing_ok=True)
        os.close(descriptor)

    def make_room(
        self, descriptor: int, path: Path, size: int, *, must: bool, spare: int = 0
    ) -> Room:
        """Give the claimed place of `path` its size, with the cache within its bound
        and `spare` bytes below it. Files that no running process needs go first, the
        longest unused before others; where it `must` be, then those that are needed
        last; where it must be and nothing is spared, pinned ones at the end and for the
        bound alone. What somebody has open stays.
        """
        with _locked(self.root / _LOCK):
            self.remove_left()
            os.ftruncate(descriptor, 0)
            found, taken = self._files()
            needs = self.needs()
            free = shutil.disk_usage(self.root).free - _DISK_LEFT_BYTES
            bound = self.most_bytes - spare
            most = min(bound, taken + free)
            unknown = Need(0, size, pinned=False)
            wanted = _wanted(found, {self._below(path): unknown, **needs}, size)
            wanted_bytes = wanted if wanted > most else 0
            with contextlib.ExitStack() as locks:
                dispensable, victims = [], []
                if taken + size > most:
                    dispensable = [
                        name
                        for name in _dispensable(found, needs, needed_too=must)
                        if not (spare and name in needs and needs[name].pinned)
                        and self._lock_idle(name, locks)
                    ]
                least = taken + size - sum(found[name].size for name in dispensable)
                for name in dispensable:
                    need = needs.get(name)
                    # A disk that others have filled drives nothing out in vain.
                    bound_alone = need and (need.pinned or least > most)
                    if taken + size <= (bound if bound_alone else most):
                        break
                    victims.append(name)
                    taken -= found[name].size
                # A disk that is full of other things does not stop what must be.
                made = taken + size <= (bound if must and not spare else most)
                if not made:
                    fetching = self._fetching_bytes()
                    return Room(
                        made=False,
                        possible=least - fetching <= most,
                        wanted_bytes=wanted_bytes,
                    )
                for name in victims:
                    self._evict(name)
            os.ftruncate(descriptor, size)
            return Room(made=True, evicted=len(victims), wanted_bytes=wanted_bytes)

    def publish(
        self, pinned: Iterable[Path], wanted: Iterable[tuple[Path, int]]
    ) -> None:
        """Tell all processes what this one needs all the time, and the files that it
        will read in this order, and their bytes, 0 where it does not know; in place of
        what it told before. Not for two threads at once.
        """
        told = [(path, _PINNED) for path in pinned]
        told += [(path, str(size)) for path, size in wanted]
        written = self._live.with_suffix(".new")
        written.write_text(
            "".join(f"{how} {self._below(path)}\n" for path, how in told)
        )
        os.replace(written, self._live.with_suffix(".needs"))

    def needs(self) -> dict[str, Need]:
        """What running processes need, by path below the cache."""
        found: dict[str, Need] = {}
        for file in (self.root / _LIVE).glob("*.needs"):
            with contextlib.suppress(FileNotFoundError):
                for place, line in enumerate(file.read_text().split("\n")[:-1]):
                    how, _, path = line.partition(" ")
                    size = 0 if how == _PINNED else int(how)
                    before = found.get(path, Need(place, 0, pinned=False))
                    found[path] = Need(
                        place=min(place, before.place),
                        size=max(size, before.size),
                        pinned=how == _PINNED or before.pinned,
                    )
        return found

    def remove_left(self) -> None:
        """Remove what processes left that are no more."""
        parts = (part for at in self._datasets() for part in (at / _PARTS).iterdir())
        for part in parts:
            if (descriptor := _claim(part, make=False)) is not None:
                part.unlink()
                os.close(descriptor)
        self._bury()

    def close(self) -> None:
        """This process needs nothing any more."""
        _unlink_all(self._live)
        if self._live_lock >= 0:
            os.close(self._live_lock)
            self._live_lock = -1

    def _bury(self) -> None:
        for lock in (self.root / _LIVE).glob("*.lock"):
            if (descriptor := _claim(lock, make=False)) is not None:
                _unlink_all(lock.with_suffix(""))
                os.close(descriptor)

    def _stay_alive(self) -> int:
        while True:
            lock = _claim(self._live.with_suffix(".lock"))
            if lock is not None:
                return lock

    def _part(self, path: Path) -> Path:
        name = hashlib.sha256(self._below(path).encode()).hexdigest()[:32]
        return self.root / self.dataset / _PARTS / name

    def _below(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _files(self) -> tuple[dict[str, _Entry], int]:
        """Whole files by their path below the cache, and the bytes of all files."""
        found, taken = {}, 0
        for dataset in self._datasets():
            for folder in dataset.iterdir():
                for path in _below(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(path)
                        taken += status.st_size
                        if folder.name != _PARTS:
                            entry = _Entry(status.st_size, status.st_atime_ns)
                            found[os.path.relpath(path, self.root)] = entry
        return found, taken

    def _datasets(self) -> list[Path]:
        """Folders of all datasets."""
        return [
            path
            for path in self.root.iterdir()
            if _ID.fullmatch(path.name) and (path / _PARTS).is_dir()
        ]

    def _fetching_bytes(self) -> int:
        """Bytes of all files that are being fetched."""
        total = 0
        for dataset in self._datasets():
            for part in _below(dataset / _PARTS):
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(part).st_size
        return total

    def _lock_idle(self, path: str, locks: contextlib.ExitStack) -> bool:
        """Whether nobody has a file open; then nobody opens it before `locks` end."""
        try:
            descriptor = os.open(self.root / path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        locks.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _evict(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)
        for folder in Path(path).parents[:-2]:
            with contextlib.suppress(OSError):
                (self.root / folder).rmdir()


def _below(folder: Path) -> Iterator[str]:
    """Paths of all files at any depth below a folder."""
    for at, _, names in os.walk(folder):
        for name in names:
            yield os.path.join(at, name)


class _Entry(NamedTuple):
    size: int
    used_ns: int


def _dispensable(
    found: Mapping[str, _Entry], needs: Mapping[str, Need], *, needed_too: bool
) -> list[str]:
    """Files in the order in which they may go."""
    spare = [path for path in found if path not in needs]
    spare.sort(key=lambda path: found[path].used_ns)
    if not needed_too:
        return spare
    needed = [path for path in found if path in needs]
    return spare + sorted(
        needed, key=lambda path: (needs[path].pinned, -needs[path].place)
    )


def _wanted(found: Mapping[str, _Entry], needs: Mapping[str, Need], usual: int) -> int:
    """Bytes of all needed files; those of unknown size are as large as `usual`."""
    none = _Entry(0, 0)
    return sum(
        max(found.get(path, none).size, need.size) or usual
        for path, need in needs.items()
    )


def _is_held(descriptor: int) -> bool:
    """Keep a file from being evicted as long as it is open here; False where it has
    been, so that its bytes count no more.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return os.fstat(descriptor).st_nlink > 0


def _claim(path: Path, *, make: bool = True) -> int | None:
    """Descriptor of the locked file at `path`, made if need be; None where another has
    it, or it has gone meanwhile. The lock ends with the descriptor or the process.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if make:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have renamed or removed the file.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise OSError(
            f"{path.parent} is on a file system without locks: give a folder on a "
            "local disk as --storage.cache"
        ) from error
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unlink_all(live: Path) -> None:
    for suffix in (".new", ".needs", ".lock"):
        live.with_suffix(suffix).unlink(missing_ok=True)
