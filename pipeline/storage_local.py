"""A storage on a disk, local or mounted by all nodes.

Owns how files get there: temporary name, fsync, rename or link, fsync of the folder,
and that no link in a dataset of anybody's leads out of it. Does not own the contract
(`pipeline.storage`) or what fsync is for (`pipeline.durable`). After `kill -9` at any
moment there are whole files, and below `.palimpsest/staging` perhaps some that are not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from pipeline.durable import make_folder, sync, sync_directory, write_durably
from pipeline.retries import RetryPolicy
from pipeline.storage import STAGING, Result, Storage, checked_name

# A folder may be removed with its last file just before the next is placed there.
_PLACING_TRIES = 20
# Who holds the lock of a folder writes one small file meanwhile.
_LOCK_SECONDS = 30.0
_LOCK_POLL_SECONDS = 0.01
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def local_path(url: str) -> Path | None:
    """The absolute path that a path or `file://` URL means; None for other URLs.

    Raises:
        ValueError: a file URL of another host.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        path = Path(url)
        return (path.expanduser() if url.startswith("~/") else path).absolute()
    if scheme.lower() not in ("file", "local"):
        return None
    rest = rest.removeprefix("localhost")
    if not rest.startswith("/"):
        raise ValueError(
            f"{url} names the host {rest.partition('/')[0]!r}; a file URL has three "
            "slashes (file:///data/corpus), and a relative path no scheme"
        )
    return Path(unquote(rest))


class LocalStorage(Storage):
    """A folder on a disk."""

    path: Path

    def __init__(self, url: str, path: Path, policy: RetryPolicy) -> None:
        super().__init__(url, path, policy)
        self._staging = path / STAGING

    def read(self, name: str) -> bytes:
        path = self._local(name)

        def call() -> bytes:
            _refuse_other_than_file(path)
            return path.read_bytes()

        return self._retry(name, call)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        def call() -> bytes:
            with self._local(name).open("rb") as file:
                file.seek(offset)
                return file.read(size)

        return self._retry(name, call)

    def size(self, name: str) -> int | None:
        try:
            found = self._retry(name, self._local(name).stat)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def names(self, prefix: str = "") -> list[str]:
        start = self._folder(prefix)
        return self._retry(prefix, lambda: _names_below(start, self.path))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        start = self._folder(prefix)
        return self._retry(prefix, lambda: _sizes_below(start, self.path))

    def write(self, name: str, data: bytes) -> None:
        self._retry(name, lambda: self._write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self._retry(name, lambda: self._create(name, data))

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def replace(self, name: str, data: bytes, version: str) -> bool:
        with self._locked(name) as current:
            if current != version:
                return False
            self.write(name, data)
        return True

    def discard(self, name: str, version: str) -> bool:
        with self._locked(name) as current:
            if current != version:
                return False
            self.remove(name)
        return True

    def remove(self, name: str) -> None:
        target = self._local(name)
        self._retry(name, lambda: target.unlink(missing_ok=True))
        self._prune(target.parent)

    def remove_tree(self, prefix: str) -> None:
        tree = self._local(prefix)
        if tree.is_symlink():
            # What it points to belongs to somebody else.
            self.remove(prefix)
        elif tree.is_dir():
            self._retry(prefix, lambda: self._remove_folder(tree))

    def copy(self, name: str, target: str) -> None:
        source, destination = self._local(name), self._local(target)
        second = self._unique()

        def call() -> None:
            try:
                os.link(source, second)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(source, second)
                sync(second)

        try:
            self._retry(name, lambda: self._placed(second, call, needs=source))
            replace = functools.partial(os.replace, second, destination)
            self._retry(
                target, lambda: self._placed(destination, replace, needs=second)
            )
        finally:
            second.unlink(missing_ok=True)
            self._prune(self._staging)

    def move(self, name: str, target: str) -> None:
        source, destination = self._local(name), self._local(target)

        def call() -> None:
            os.replace(source, destination)
            if name != target:
                # Renaming a link onto another link of one file leaves both.
                source.unlink(missing_ok=True)

        self._retry(name, lambda: self._placed(destination, call, needs=source))
        if source.parent != destination.parent:
            sync_directory(source.parent)
            self._prune(source.parent)

    @contextlib.contextmanager
    def stage(self, prefix: str) -> Iterator[Path]:
        self._folder(checked_name(prefix))
        directory = self._unique()
        self._placed(directory, directory.mkdir)
        try:
            yield directory
            self._publish(directory, prefix)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            self._prune(self._staging)

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        path = self._local(name)
        self._retry(name, lambda: _refuse_other_than_file(path))
        yield path

    def _local(self, name: str) -> Path:
        path = self.path / checked_name(name)
        self._refuse_links_out(path.parent)
        return path

    def _folder(self, prefix: str) -> Path:
        """The folder `prefix`, the root where that is empty."""
        if not prefix:
            return self.path
        folder = self._local(prefix)
        self._refuse_links_out(folder)
        return folder

    def _refuse_links_out(self, folder: Path) -> None:
        """The root may be a link, a folder in it only to another in it: whoever made
        the dataset decides what is in there, but not what is beside it.
        """
        at = folder
        while at != self.path:
            # Asking for the real path takes ten times as long.
            if os.path.islink(at):
                root = os.path.realpath(self.path)
                if not Path(os.path.realpath(folder)).is_relative_to(root):
                    raise ValueError(
                        f"{at} leads out of {self.path} by a link: remove the link"
                    )
            at = at.parent

    def _unique(self) -> Path:
        """A name below the staging folder that no other attempt has."""
        return self._local(f"{STAGING}/{uuid.uuid4().hex}")

    def _write(self, name: str, data: bytes) -> None:
        target = self._local(name)
        with self._temporary(data) as temporary:
            call = functools.partial(os.replace, temporary, target)
            self._placed(target, call, needs=temporary)

    def _create(self, name: str, data: bytes) -> bool:
        target = self._local(name)
        with self._temporary(data) as temporary:
            call = functools.partial(os.link, temporary, target)
            try:
                self._placed(target, call, needs=temporary)
            except FileExistsError:
                # NFS may answer so to a link that it made and whose answer was lost.
                return temporary.stat().st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                with self._locked(name) as current:
                    if current is not None:
                        return False
                    self._write(name, data)
        return True

    def _publish(self, directory: Path, prefix: str) -> None:
        names = _names_below(directory, directory)
        for name in names:
            sync(directory / name)
        folders = set()
        for name in names:
            source, target = directory / name, self._local(f"{prefix}/{name}")
            call = functools.partial(os.replace, source, target)
            self._placed(target, call, needs=source, durable=False)
            folders.add(target.parent)
        for folder in folders:
            sync_directory(folder)

    def _remove_folder(self, tree: Path) -> None:
        doomed = tree
        if not self._staging.is_relative_to(tree):
            # Moved away first: all of it vanishes at once.
            doomed = self._unique()
            with contextlib.suppress(FileNotFoundError):
                call = functools.partial(os.rename, tree, doomed)
                self._placed(doomed, call, needs=tree)
        shutil.rmtree(doomed, onerror=_unless_gone)
        self._prune(doomed.parent)
        self._prune(tree.parent)

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A durable file."""
        temporary = self._unique()
        try:
            self._placed(temporary, lambda: write_durably(temporary, data))
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            self._prune(self._staging)

    def _placed(
        self,
        target: Path,
        call: Callable[[], Result],
        *,
        needs: Path | None = None,
        durable: bool = True,
    ) -> Result:
        """Result of `call`, which puts something at `target`, its folder made before
        and synchronised after. `needs`: a file without which there is no use in trying.
        """
        for tries in range(_PLACING_TRIES):
            try:
                make_folder(target.parent)
                result = call()
                if durable:
                    sync_directory(target.parent)
                return result
            except FileNotFoundError:
                gone = needs is not None and not needs.exists()
                if gone or tries == _PLACING_TRIES - 1:
                    raise
        raise AssertionError("the last try returns or raises")

    def _prune(self, folder: Path) -> None:
        """Remove a folder below the root that is empty, and those above that it empties
        in turn.
        """
        with contextlib.suppress(OSError):
            while folder != self.path and folder.is_relative_to(self.path):
                folder.rmdir()
                folder = folder.parent

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[str | None]:
        """The version of a file (None: there is none) that no `replace` changes
        meanwhile. The folder is locked: that ends with the process and leaves no file.

        Raises:
            TimeoutError: another process keeps the lock, a suspended one for instance.
        """
        folder = self._local(name).parent
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        try:
            self._lock(descriptor, folder)
            found = self.read_version(name)
            yield found[1] if found else None
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, folder: Path) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process has kept {folder} locked for "
                        f"{_LOCK_SECONDS:.0f} s, which takes it milliseconds: it is "
                        "suspended, or its disk hangs; let it go on, or end it "
                        f"(`fuser -v {folder}` names it)"
                    ) from None
            except OSError:
                # Some network disks lock no folders: only the comparison remains.
                return
            time.sleep(_LOCK_POLL_SECONDS)


def _refuse_other_than_file(path: Path) -> None:
    """Raise FileNotFoundError where a folder, a pipe (which would be waited for) or a
    link to itself stands in the place of a file.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        regular = False
    if not regular:
        raise FileNotFoundError(errno.ENOENT, "is no regular file", str(path))


def _names_below(start: Path, root: Path) -> list[str]:
    found = [
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(start)
        for name in names
    ]
    return sorted(str(PurePosixPath(path)) for path in found)


def _sizes_below(start: Path, root: Path) -> dict[str, int]:
    sizes = {}
    for name in _names_below(start, root):
        # Others may remove files meanwhile; a link to nothing is none.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = (root / name).stat()
            if stat.S_ISREG(found.st_mode):
                sizes[name] = found.st_size
    return sizes


def _unless_gone(
    _: object, __: object, info: tuple[type, BaseException, object]
) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
