"""Files of a dataset, on a local disk or behind any URL that fsspec knows.

Owns what a dataset asks of storage: a file by name, whole and local; which are fetched
ahead; and the words for a folder that is no dataset. Does not own how files behind a
URL become local (`trainer.cached_files`) or what they mean (`trainer.dataset`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    Manifest,
    load_manifest,
    manifest_seal,
)

# manifest.json and its seal are replaced one after the other.
_MANIFEST_READS, _MANIFEST_PAUSE_S = 5, 0.25
# Entries of a local folder that are looked at for a tar.
_LOOKED_AT = 10_000
# How WebDataset is told of tars: one, shard-{000000..000099}.tar or *.tar.
_NAMES_TARS = re.compile(r"\.tar$|[*{][^/]*$")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Datasets and runs behind a URL: whole shards are fetched ahead into a folder on
    the node, once for all its ranks; a run is written to a working copy and brought to
    its URL with each checkpoint. Of no use for what lies on a local disk.
    """

    cache: str | None = None
    """Folder for fetched files, on a local disk; runs may share it. Default:
    $XDG_CACHE_HOME/palimpsest, or ~/.cache/palimpsest."""
    cache_bytes: int = 100 << 30
    """Most bytes of datasets in it; of runs that share it the largest bound holds. It
    should have room for two windows of each lane that a node reads, 2 x lanes x
    shuffle_shards shards. Samples of shards without a place in it are read one by one,
    which is slow."""
    parallel: int = 8
    """Ranges of 8 MiB that each rank reads, or writes, at once."""
    timeout_s: float = 30.0
    """Seconds after which a request is given up, and made again."""
    tries: int = 10
    """Times that a request is made before the run stops."""
    work: str | None = None
    """Folder for the working copy of a run whose --output is a URL, one below it for
    each URL. Default: `runs` in the cache."""
    writer: str | None = None
    """Name of whoever starts the trainers of a run behind a URL: the next one under it
    takes over at once from the one before, which stops if it is alive. Others wait half
    a minute for one that may be dead."""
    hedge: float = 3.0
    """A second request is sent, and the first answer taken, when one takes this many
    times the median of the latest; 0 for never."""

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "parallel", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"storage.{name} is {getattr(self, name)}: it must be 1 or more"
                )
        if not self.timeout_s > 0:
            raise ValueError(f"storage.timeout_s is {self.timeout_s}: above 0")
        if self.hedge != 0 and not self.hedge > 1:
            raise ValueError(f"storage.hedge is {self.hedge}: above 1, or 0 for never")

    @property
    def folder(self) -> Path:
        """The folder for fetched files."""
        if self.cache:
            return Path(self.cache).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "palimpsest"

    def working_copy(self, url: str) -> Path:
        """The folder on this node that stands for a run at a path or URL."""
        path = local_path(url)
        if path is not None:
            return path
        _, _, rest = url.rstrip("/").partition("://")
        base = Path(self.work).expanduser().absolute() if self.work else None
        shown = re.sub(r"[^A-Za-z0-9._-]+", "-", rest.rpartition("@")[2])[-80:]
        digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:8]
        return (base or self.folder / "runs") / f"{shown}-{digest}"


class StorageError(OSError):
    """Storage failed for good: whatever was worth a try was tried."""


class NoRoomError(OSError):
    """A streamed file has no place in the cache as long as others are read."""


class Wanted(NamedTuple):
    """A file that will be read."""

    name: str
    """Path below the dataset."""
    version: str = ""
    """Hex sha256 of its bytes, as far as the caller knows it."""
    size: int = 0
    """Bytes, as far as the caller knows them."""
    streamed: bool = False
    """Whether it is opened to be read in parts, for a long time."""


class Files(ABC):
    """The files of one dataset, by their paths below it. For several threads at once.

    `version` is the hex sha256 that the manifest has of a file: what was fetched of
    another version of the dataset is not taken for it. It is not checked.

    All raise FileNotFoundError where there is no such file, StorageError where storage
    failed for good, and ValueError where nothing can be right (no credentials, a cache
    that is too small). The message has the cure.
    """

    root: str
    """As given, without a password and a slash at the end."""

    @abstractmethod
    def local(self, name: str, version: str = "") -> Path:
        """A local path of the whole file, which may go when others are fetched."""

    @abstractmethod
    def open(self, name: str, version: str = "") -> BinaryIO:
        """The whole file, unbuffered, to be streamed: its bytes stay until it is
        closed. NoRoomError where it has no place: `span` has its parts.
        """

    @abstractmethod
    def span(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file as storage has it now, fewer bytes where it ends. Slow where
        it is not local.
        """

    @abstractmethod
    def pin(self, name: str, version: str = "") -> Path:
        """As `local`, and the path stays as long as this process runs."""

    @abstractmethod
    def at(self, name: str, version: str = "") -> Path:
        """Where an open file lies: what is deleted or replaced there is not what it
        still reads.
        """

    @abstractmethod
    def refresh(self, name: str, version: str = "", *, streamed: bool = False) -> Path:
        """As `local`, and as storage has the file now: for files that change, and for
        one that was damaged on its way. Without a version it stays, as with `pin`. One
        that is `streamed` has its place or a NoRoomError, as with `open`.
        """

    @abstractmethod
    def ahead(self, files: Sequence[Wanted]) -> None:
        """Say which files will be read, in this order, in place of what was said
        before: they are fetched in the background, and kept. Does not block.
        """

    @abstractmethod
    def check(self, largest: int, *, beside: int) -> None:
        """Raise ValueError where a streamed file of `largest` bytes could never be had
        with `beside` bytes of others at once.
        """

    @abstractmethod
    def figures(self) -> Mapping[str, int]:
        """Counts since the start of this process: bytes, requests, hedges, retries,
        evictions and spans.
        """

    @abstractmethod
    def find_tar(self) -> str | None:
        """Name of some tar in or below the folder, as far as a short look finds one."""

    @abstractmethod
    def above(self) -> Files | None:
        """The files of the folder that this one lies in; None where there is none."""

    @abstractmethod
    def close(self) -> None:
        """Fetch no more; whoever waits for a file gets an OSError."""

    @property
    def waited(self) -> float:
        """Seconds that callers were blocked on storage, all threads together."""
        return 0.0


def open_files(root: str | Path, config: StorageConfig) -> Files:
    """The files of the dataset at a path or URL.

    Raises:
        ValueError: unknown scheme, or a package that is missing.
        OSError: the cache cannot be written to.
    """
    path = local_path(str(root))
    if path is not None:
        return LocalFiles(path)
    from trainer.cached_files import CachedFiles

    return CachedFiles(str(root), config)


def local_path(url: str) -> Path | None:
    """The path that a path or file URL means; None for other URLs."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url).expanduser() if url.startswith("~/") else Path(url)
    if scheme.lower() not in ("file", "local"):
        return None
    return Path(unquote(rest.removeprefix("localhost")))


def read_manifest(files: Files) -> tuple[Manifest, bytes]:
    """The dataset's manifest as it is now, finished or not, and its seal; read again
    while both are being replaced.

    Raises:
        ValueError: as `pipeline.manifest.load_manifest`; for tars that have no manifest
            the message has the command that makes one.
        OSError: storage failed.
    """
    for left in reversed(range(_MANIFEST_READS)):
        try:
            folder = _fresh_manifest(files)
        except FileNotFoundError as error:
            raise explain_missing(files) from error
        seal = _seal(folder)
        try:
            manifest = load_manifest(folder, allow_incomplete=True)
            if seal == _seal(folder):
                return manifest, seal
        except ValueError as error:
            if not left or not _is_torn(folder):
                # What is wrong is there, not in the copy.
                said = str(error).replace(str(folder), files.root)
                raise ValueError(said) from error
        time.sleep(_MANIFEST_PAUSE_S)
    raise ValueError(
        f"{files.root}/{MANIFEST} was rewritten each time it was read: try again when "
        "preprocessing has gone on"
    )


def read_seal(files: Files) -> bytes:
    """The manifest's seal as it is now. Raises OSError."""
    return files.refresh(MANIFEST_SHA256).read_bytes()


def explain_missing(files: Files) -> ValueError:
    """The error for a path that has no manifest: no folder of a dataset."""
    named = bool(_NAMES_TARS.search(files.root))
    folder = files.above() if named else files
    tar = folder.find_tar() if folder else None
    if folder is None or tar is None:
        return ValueError(
            f"{files.root} has no {MANIFEST}: not a finished dataset. Make one with "
            "`python -m pipeline.preprocess --input ... --output ...`, or of tars that "
            "are there with `python -m pipeline.index`"
        )
    dataset = _dataset_around(folder)
    if dataset:
        return ValueError(
            f"{files.root} has no {MANIFEST}: it is a part of the dataset "
            f"{dataset.root}; give {dataset.root} instead"
        )
    having = (
        f"{files.root} names tars, and a dataset is given by its folder"
        if named
        else f"{files.root} has no {MANIFEST}, but tars ({tar})"
    )
    then = f", and give {folder.root} then" if named else ""
    return ValueError(
        f"{having}: index them first, which leaves them as they are: `python -m "
        f"pipeline.index {folder.root} --tokenizer DIRECTORY_OR_HUB_NAME` (or "
        f"`--tokenizer train:8000`){then}"
    )


def _dataset_around(folder: Files) -> Files | None:
    """The dataset that a folder of tars is, or is a split of."""
    with contextlib.suppress(OSError, ValueError):
        for files in (folder, folder.above()):
            if files and _is_dataset(files):
                return files
    return None


def _is_dataset(files: Files) -> bool:
    """Whether a folder has a seal: a manifest.json may be anybody's."""
    try:
        return files.refresh(MANIFEST_SHA256).is_file()
    except FileNotFoundError:
        return False


class LocalFiles(Files):
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.root = str(path)

    def local(self, name: str, version: str = "") -> Path:
        return self._path / name

    def open(self, name: str, version: str = "") -> BinaryIO:
        return (self._path / name).open("rb", buffering=0)

    def pin(self, name: str, version: str = "") -> Path:
        return self._path / name

    def at(self, name: str, version: str = "") -> Path:
        return self._path / name

    def refresh(self, name: str, version: str = "", *, streamed: bool = False) -> Path:
        return self._path / name

    def span(self, name: str, offset: int, size: int) -> bytes:
        with self.open(name) as file:
            return os.pread(file.fileno(), size, offset)

    def ahead(self, files: Sequence[Wanted]) -> None:
        """Nothing: they are there."""

    def check(self, largest: int, *, beside: int) -> None:
        """Nothing: no file is copied."""

    def figures(self) -> Mapping[str, int]:
        return {}

    def above(self) -> Files | None:
        path = self._path
        return LocalFiles(path / ".." if path.name in ("", "..") else path.parent)

    def close(self) -> None:
        """Nothing: nobody waits."""

    def find_tar(self) -> str | None:
        below = (
            os.path.join(at, name)
            for at, _, names in os.walk(self._path)
            for name in sorted(names)
        )
        for path in itertools.islice(below, _LOOKED_AT):
            if path.endswith(".tar"):
                return os.path.relpath(path, self._path)
        return None


def _fresh_manifest(files: Files) -> Path:
    """The local folder that has the manifest and its seal as they are now. Raises
    FileNotFoundError where there is no manifest.
    """
    path = files.refresh(MANIFEST)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    # A seal that is missing is for `load_manifest` to tell.
    with contextlib.suppress(FileNotFoundError):
        files.refresh(MANIFEST_SHA256)
    return path.parent


def _seal(folder: Path) -> bytes:
    """The seal, empty where there is none."""
    try:
        return (folder / MANIFEST_SHA256).read_bytes()
    except FileNotFoundError:
        return b""


def _is_torn(folder: Path) -> bool:
    """Whether manifest and seal are both there and of different states."""
    seal = _seal(folder)
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return False
    return bool(seal) and seal != manifest_seal(text).encode()
