"""Files of inputs and outputs, wherever they lie: on a disk, or behind fsspec.

Owns the contract of `Storage` (a folder in which nothing partial is ever visible and
updates can be conditional), and reading single files by URL. Does not own how it is
kept on disks (`pipeline.storage_local`) and behind fsspec (`pipeline.storage_remote`,
`pipeline.storage_s3`, `pipeline.remote`), when a call is tried again
(`pipeline.retries`) or what the files mean (`pipeline.dataset`).
"""

from __future__ import annotations

import glob
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.retries import RetryPolicy, retried, retry

# What belongs to whoever writes a dataset, and not to the dataset.
STATE = ".palimpsest"
# Where files lie while they are not whole, below the root of a storage: a process
# killed there leaves nothing beside the data.
STAGING = f"{STATE}/staging"
# One request of a reader that goes through a remote file.
_BLOCK_BYTES = 4 << 20

Result = TypeVar("Result")


class Storage(ABC):
    """A folder, local or remote. Names are relative POSIX paths of files in it; folders
    come with their first file and go with their last.

    Pickles into a few hundred bytes and may be used by several threads. All calls try
    again what may pass by itself; once that is spent, they raise an OSError that says
    so. All raise ValueError for a name that leaves the folder.
    """

    url: str
    """As given, without a slash at the end."""
    path: Path | None
    """The folder where it is local, else None."""

    def __init__(self, url: str, path: Path | None, policy: RetryPolicy) -> None:
        self.url = url
        self.path = path
        self._policy = policy

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError where there is none."""

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Files at any depth below the folder `prefix`, sorted; relative to the root
        also then.
        """

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of all files at any depth below the folder `prefix`, by name, from one
        listing: on S3 that is a request for a thousand files. Sorted by name.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file durably, whole or not at all; replaces."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file where there is none yet. Of several at once one gets True.

        Atomic on disks and on S3; elsewhere as good as fsspec's `mode="create"` is.
        """

    @abstractmethod
    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """Content and version, for a conditional update; None where there is none."""

    @abstractmethod
    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Write a file unless it is no longer of this version; then False.

        Atomic on S3 and on disks that support locks; elsewhere a comparison before the
        write, which another writer may come between.
        """

    @abstractmethod
    def discard(self, name: str, version: str) -> bool:
        """Remove a file unless it is no longer of this version; then False. Atomic
        where `replace` is.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; no error where there is none."""

    @abstractmethod
    def remove_tree(self, prefix: str) -> None:
        """Remove all files below a folder; no error where there are none."""

    @abstractmethod
    def copy(self, name: str, target: str) -> None:
        """Give a file a second name, replacing what is at `target`: a hard link where
        there are such, else a copy that moves no byte through this process.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def move(self, name: str, target: str) -> None:
        """Rename a file, on object stores by copying it there; replaces `target`.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def stage(self, prefix: str) -> AbstractContextManager[Path]:
        """A local directory to write files in. After a clean exit all of them are below
        the folder `prefix`, durable, each placed whole; after an error in the block
        none is.
        """

    @abstractmethod
    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """A local path with a file's content, until the exit: itself where it is local.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @property
    def retried(self) -> Mapping[str, int]:
        """Storage calls that this process made again, by reason; those of other
        storages and of `open_file` included.
        """
        return retried()

    def _retry(self, name: str, call: Callable[[], Result]) -> Result:
        return retry(call, url=f"{self.url}/{name}", policy=self._policy)


# What would be a local folder of that name, or no place at all.
_NO_BUCKET = re.compile(
    r"(s3a?|gs|gcs|az|abfss?|https?):(?!//[^/])|[a-z0-9+.\-]+://$", re.IGNORECASE
)


def open_storage(url: str | Path, *, policy: RetryPolicy | None = None) -> Storage:
    """The folder at a local path, `file://` URL or any URL that fsspec knows. It need
    not exist yet.

    Raises:
        ValueError: unknown scheme, a package that is missing, or no credentials; the
            message names the cure.
    """
    from pipeline.storage_local import LocalStorage, local_path

    if not str(url):
        raise ValueError("a folder has no name: give a path or a URL")
    if _NO_BUCKET.match(str(url)):
        raise ValueError(
            f"{url} names no bucket or host: write scheme://bucket/folder (is a "
            "variable in it empty?)"
        )
    policy = policy or RetryPolicy()
    given = str(url).rstrip("/") or "/"
    path = local_path(given)
    if path is not None:
        return LocalStorage(given, path, policy)
    from pipeline.storage_remote import remote_storage

    return remote_storage(given, policy)


def open_file(url: str, *, policy: RetryPolicy | None = None) -> BinaryIO:
    """A file at a local path or any URL that fsspec knows, opened for reading. Remote
    ones are read in blocks of 4 MiB; a file that is replaced meanwhile is an error
    where the storage can tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `open_storage`.
    """
    from pipeline.storage_local import local_path

    path = local_path(url)
    if path is not None:
        return path.open("rb")
    from pipeline.remote import open_remote

    return io.BufferedReader(open_remote(url, policy or RetryPolicy()), _BLOCK_BYTES)


def list_files(url: str, *, policy: RetryPolicy | None = None) -> list[str]:
    """The files at a path or URL: itself where it is a file, all below it where it is a
    folder, those that match where it is a glob. Sorted; none where nothing is there.
    Local ones are absolute paths, the others URLs.

    Raises:
        ValueError: as `open_storage`.
    """
    from pipeline.storage_local import local_path

    path = local_path(url)
    if path is None:
        from pipeline.remote import list_remote

        return list_remote(url, policy or RetryPolicy())
    if path.is_dir():
        below = os.walk(path)
        return sorted(
            os.path.join(at, name) for at, _, names in below for name in names
        )
    # A name that exists is meant literally, whatever characters it has.
    found = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    return sorted(name for name in found if os.path.isfile(name))


def file_size(url: str, *, policy: RetryPolicy | None = None) -> int:
    """Bytes of the file at a path or URL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `open_storage`.
    """
    from pipeline.storage_local import local_path

    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    from pipeline.remote import remote_size

    return remote_size(url, policy or RetryPolicy())


def checked_name(name: str) -> str:
    """`name`, unless it leaves the folder that it is relative to (ValueError)."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise ValueError(
            f"{name!r} is no file name inside a folder: names are relative, with '/' "
            "between their parts and no '.' or '..'"
        )
    return name
