"""A folder of fetched files that all processes of a node share.

Owns which process fetches a file, how much lies in the folder, which file makes room
for another, and that a process may die anywhere: there is no daemon and no state but
files. A file is claimed by a lock of the kernel's, which ends with its process, and
appears whole, by a rename. What a dead process left is what nobody has locked. A file
that somebody has open is locked too, and stays: its bytes would not be gone. Does not
own the bytes (`trainer.fetch`) or which files are wanted (`trainer.storage`).

    CACHE/palimpsest.lock           held while room is made
    CACHE/palimpsest-live/ID.lock   a running process
    CACHE/palimpsest-live/ID.needs  its bound, and what it will read, in order
    CACHE/DATASET/URL               where DATASET, 32 hex digits, comes from
    CACHE/DATASET/parts/KEY         being fetched, of its full size and locked
    CACHE/DATASET/VERSION/NAME      whole
    CACHE/DATASET/replaced/ID       whole, of which there is another by now

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LOCK, _LIVE = "palimpsest.lock", "palimpsest-live"
_PARTS, _URL, _REPLACED = "parts", "URL", "replaced"
_ID = re.compile(r"[0-9a-f]{32}")
# Of the disk, for others: beyond it even a cache below its bound makes room.
_DISK_LEFT_BYTES = 256 << 20
# Told in place of a file's bytes.
_PINNED, _BOUND = "pinned", "bound"


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
    """All that running processes will read, as far as they have told, where there is no
    room for it; else 0."""


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
        most_bytes: bound on the files of all datasets below `root`. Of the bounds of
            processes that share it the largest holds.

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
        held = False
        try:
            held = fetched >= since_ns and _is_held(descriptor)
        finally:
            if not held:
                os.close(descriptor)
        if not held:
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

    def keep(self, descriptor: int, path: Path, *, began_ns: int) -> None:
        """Let a claimed place that is filled appear as `path`, and hold it open to
        read.

        Raises:
            OSError: somebody has removed the cache.
        """
        os.utime(descriptor, ns=(time.time_ns(), began_ns))
        # Nobody counts or removes files meanwhile.
        with _locked(self.root / _LOCK):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            before = self._set_aside(path)
            try:
                os.replace(self._part(path), path)
            except FileNotFoundError:
                raise OSError(
                    errno.ESTALE, "somebody removed it while it was fetched", str(path)
                ) from None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if before:
                self._evict(before)

    def drop(self, descriptor: int, path: Path) -> None:
        """Give a claimed place back."""
        os.ftruncate(descriptor, 0)
        self._part(path).unlink(missing_ok=True)
        os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Have a file no more; its bytes count as long as somebody has it open."""
        with _locked(self.root / _LOCK):
            before = self._set_aside(path)
            path.unlink(missing_ok=True)
            if before:
                self._evict(before)

    def make_room(
        self,
        descriptor: int,
        path: Path,
        size: int,
        *,
        must: bool,
        streamed: bool,
        spare: int,
    ) -> Room:
        """Give the claimed place of `path` its size, with the cache within its bound;
        one that is `streamed` leaves `spare` bytes of it to others. Files that no
        running process needs go first, the longest unused before others; where it
        `must` be, then those that are needed last; where it is not streamed, pinned
        ones at the end and for the bound alone. What somebody has open stays.
        """
        with _locked(self.root / _LOCK):
            self.remove_left()
            os.ftruncate(descriptor, 0)
            found, taken, fetching, unwritten = self._files()
            needs, bound = self.needs()
            # What is pinned lies in what is spared.
            shared = bound - max(spare - self._pinned_bytes(found, needs), 0)
            free = shutil.disk_usage(self.root).free - unwritten - _DISK_LEFT_BYTES
            bound = shared if streamed else bound
            most = min(bound, taken + free)
            order: list[str] = []
            if taken + size > most:
                order = [
                    name
                    for name in _dispensable(found, needs, needed_too=must)
                    if not (streamed and name in needs and needs[name].pinned)
                    and self._is_idle(name)
                ]
            least = taken + size - sum(found[name].size for name in order)
            limit = most
            if must and not streamed:
                # A disk that is full of other things does not stop what must be, nor
                # does what is open since others had a larger bound.
                much_open = least - size - fetching > shared
                limit = max(bound, least) if much_open else bound
            victims, left = _victims(order, found, needs, taken + size, most, bound)
            evicted = []
            if left <= limit:
                evicted = [name for name in victims if self._evict(name)]
                left = taken + size - sum(found[name].size for name in evicted)
            made = left <= limit
            if made:
                os.ftruncate(descriptor, size)
            wanted = 0
            if must and (not made or any(name in needs for name in evicted)):
                spent = [found[name].size for name in order if name not in needs]
                wanted = max(_wanted(found, needs), taken + size - sum(spent))
            return Room(
                made=made,
                possible=least - fetching <= limit,
                evicted=len(evicted),
                wanted_bytes=wanted,
            )

    def publish(
        self, pinned: Iterable[Path], wanted: Iterable[tuple[Path, int]]
    ) -> None:
        """Tell all processes what this one needs all the time, and the files that it
        will read in this order, and their bytes, 0 where it does not know; in place of
        what it told before. Not for two threads at once.
        """
        told = [(path, _PINNED) for path in pinned]
        told += [(path, str(size)) for path, size in wanted]
        lines = [f"{_BOUND} {self.most_bytes}\n"]
        lines += [f"{how} {self._below(path)}\n" for path, how in told]
        written = self._live.with_suffix(".new")
        written.write_text("".join(lines))
        os.replace(written, self._live.with_suffix(".needs"))

    def needs(self) -> tuple[dict[str, Need], int]:
        """What running processes need, by path below the cache; and the bound."""
        found: dict[str, Need] = {}
        bound = self.most_bytes
        for file in (self.root / _LIVE).glob("*.needs"):
            with contextlib.suppress(FileNotFoundError):
                for place, line in enumerate(file.read_text().split("\n")[:-1]):
                    how, _, path = line.partition(" ")
                    if how == _BOUND:
                        bound = max(bound, int(path))
                        continue
                    size = 0 if how == _PINNED else int(how)
                    before = found.get(path, Need(place, 0, pinned=False))
                    found[path] = Need(
                        place=min(place, before.place),
                        size=max(size, before.size),
                        pinned=how == _PINNED or before.pinned,
                    )
        return found, bound

    def remove_left(self) -> None:
        """Remove what processes left that are no more."""
        parts = (part for at in self._datasets() for part in (at / _PARTS).iterdir())
        for part in parts:
            if (descriptor := _claim(part, make=False)) is not None:
                os.ftruncate(descriptor, 0)
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

    def _files(self) -> _Contents:
        found, taken, fetching, unwritten = {}, 0, 0, 0
        for dataset in self._datasets():
            for folder in dataset.iterdir():
                for path in _below(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(path)
                        size = status.st_size
                        taken += size
                        if folder.name == _PARTS:
                            fetching += size
                            unwritten += max(size - 512 * status.st_blocks, 0)
                        else:
                            entry = _Entry(size, status.st_atime_ns)
                            found[os.path.relpath(path, self.root)] = entry
        return _Contents(found, taken, fetching, unwritten)

    def _pinned_bytes(
        self, found: Mapping[str, _Entry], needs: Mapping[str, Need]
    ) -> int:
        """Bytes of pinned files of this dataset that are there."""
        return sum(
            found[name].size
            for name, need in needs.items()
            if need.pinned and name in found and name.startswith(f"{self.dataset}/")
        )

    def _datasets(self) -> list[Path]:
        """Folders of all datasets."""
        return [
            path
            for path in self.root.iterdir()
            if _ID.fullmatch(path.name) and (path / _PARTS).is_dir()
        ]

    def _set_aside(self, path: Path) -> str | None:
        """Give a file that is to go another name, if it is there: its bytes are there
        as long as somebody has it open.
        """
        aside = self.root / self.dataset / _REPLACED / uuid.uuid4().hex
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        # Some file systems have no hard links.
        with contextlib.suppress(OSError):
            os.link(path, aside)
            return self._below(aside)
        return None

    def _is_idle(self, path: str) -> bool:
        """Whether nobody has a file open."""
        descriptor = self._locked_idle(path)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def _evict(self, path: str) -> bool:
        """Remove a file; False where somebody has opened it."""
        descriptor = self._locked_idle(path)
        if descriptor is None:
            return False
        (self.root / path).unlink(missing_ok=True)
        os.close(descriptor)
        for folder in Path(path).parents[:-2]:
            with contextlib.suppress(OSError):
                (self.root / folder).rmdir()
        return True

    def _locked_idle(self, path: str) -> int | None:
        """Descriptor of a file that nobody opens as long as it is there; None where
        somebody has it open. A cache may hold more files than a process may open: one
        at a time.
        """
        try:
            descriptor = os.open(self.root / path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


def _below(folder: Path) -> Iterator[str]:
    """Paths of all files at any depth below a folder, none where it is no folder.
    Raises OSError.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for at, _, names in os.walk(folder, onerror=fail):
        for name in names:
            yield os.path.join(at, name)


class _Entry(NamedTuple):
    size: int
    used_ns: int


class _Contents(NamedTuple):
    found: dict[str, _Entry]
    """Whole files by their path below the cache."""
    taken: int
    """Bytes of all files."""
    fetching: int
    """Bytes of those that are being fetched."""
    unwritten: int
    """Bytes of these that the disk does not hold yet."""


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


def _victims(
    order: Sequence[str],
    found: Mapping[str, _Entry],
    needs: Mapping[str, Need],
    total: int,
    most: int,
    bound: int,
) -> tuple[list[str], int]:
    """Which of the files in `order` go so that `total` bytes become no more than
    `most`, and what is left; those that are needed, if `most` is out of reach, and
    those that are pinned, for the `bound` alone: a disk that others have filled drives
    nothing out in vain.
    """
    victims: list[str] = []
    in_vain = total - sum(found[name].size for name in order) > most
    for name in order:
        need = needs.get(name)
        bound_alone = need is not None and (need.pinned or in_vain)
        if total <= (bound if bound_alone else most):
            break
        victims.append(name)
        total -= found[name].size
    return victims, total


def _wanted(found: Mapping[str, _Entry], needs: Mapping[str, Need]) -> int:
    """Bytes of all needed files, as far as they are known."""
    none = _Entry(0, 0)
    return sum(
        max(found.get(path, none).size, need.size) for path, need in needs.items()
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
