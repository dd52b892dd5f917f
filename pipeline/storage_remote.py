"""A storage behind fsspec: Google Cloud Storage, Azure, memory and what else it knows.

Owns what works alike on all of fsspec's file systems. Does not own what only S3 can do
(`pipeline.storage_s3`), connections (`pipeline.remote`) or the contract
(`pipeline.storage`). A file is there whole or not at all because object stores make it
so; through file systems that show files while they are written (sftp), fsspec promises
less. Conditional updates are a comparison before the write.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.remote import check_scheme, connect, explained, http_status, open_remote
from pipeline.retries import RetryPolicy
from pipeline.storage import Result, Storage, checked_name

_COPY_BYTES = 8 << 20


class RemoteStorage(Storage):
    """A folder behind fsspec. Connections are this process's and made when needed."""

    path: None

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        super().__init__(url, None, policy)

    @property
    def fs(self) -> Any:
        """The file system of fsspec."""
        return connect(self.url, self._policy)[0]

    def read(self, name: str) -> bytes:
        path = self._remote(name)
        return self._call(name, lambda: self.fs.cat_file(path))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = self._remote(name)

        def call() -> bytes:
            try:
                return self.fs.cat_file(path, start=offset, end=offset + size)
            except Exception as error:
                # Nothing lies at or after `offset`: not an error in the contract.
                if http_status(error) == 416:
                    return b""
                raise

        return self._call(name, call) if size > 0 else b""

    def size(self, name: str) -> int | None:
        path = self._remote(name)
        self.fs.invalidate_cache()
        try:
            found = self._call(name, lambda: self.fs.info(path))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def names(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        root = self._root
        start = self._remote(prefix) if prefix else root
        self.fs.invalidate_cache()
        try:
            found = self._call(prefix, lambda: self.fs.find(start, detail=True))
        except FileNotFoundError:
            return {}
        below = f"{start.rstrip('/')}/"
        cut = len(root.rstrip("/")) + 1
        # A file that has the folder's own name is found too, and folders' markers.
        return {
            path[cut:]: int(found[path]["size"])
            for path in sorted(found)
            if path.startswith(below) and not path.endswith("/")
        }

    def write(self, name: str, data: bytes) -> None:
        path = self._remote(name)
        self._call(name, lambda: self._pipe(path, data, "overwrite"))

    def create(self, name: str, data: bytes) -> bool:
        path = self._remote(name)
        try:
            self._call(name, lambda: self._pipe(path, data, "create"))
        except FileExistsError:
            return False
        return True

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def replace(self, name: str, data: bytes, version: str) -> bool:
        found = self.read_version(name)
        if found is None or found[1] != version:
            return False
        self.write(name, data)
        return True

    def discard(self, name: str, version: str) -> bool:
        found = self.read_version(name)
        if found is None or found[1] != version:
            return False
        self.remove(name)
        return True

    def remove(self, name: str) -> None:
        path = self._remote(name)
        with contextlib.suppress(FileNotFoundError):
            self._call(name, lambda: self.fs.rm_file(path))

    def remove_tree(self, prefix: str) -> None:
        for name in self.names(checked_name(prefix)):
            self.remove(name)

    def copy(self, name: str, target: str) -> None:
        source, destination = self._remote(name), self._remote(target)

        def call() -> None:
            self._make_folder(destination)
            self.fs.cp_file(source, destination)

        # Stores refuse to copy an object to itself.
        if name != target:
            self._call(name, call)

    def move(self, name: str, target: str) -> None:
        if name != target:
            self.copy(name, target)
            self.remove(name)

    @contextlib.contextmanager
    def stage(self, prefix: str) -> Iterator[Path]:
        checked_name(prefix)
        with tempfile.TemporaryDirectory(prefix="palimpsest-") as directory:
            root = Path(directory)
            yield root
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                self._upload(path, f"{prefix}/{path.relative_to(root).as_posix()}")

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="palimpsest-") as directory:
            path = Path(directory, name.rpartition("/")[2])
            with open_remote(f"{self.url}/{checked_name(name)}", self._policy) as file:
                _save(file, path)
            yield path

    @property
    def _root(self) -> str:
        return connect(self.url, self._policy)[1]

    def _remote(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{checked_name(name)}"

    def _call(self, name: str, call: Callable[[], Result]) -> Result:
        with explained(f"{self.url}/{name}"):
            return self._retry(name, call)

    def _pipe(self, path: str, data: bytes, mode: str) -> None:
        self._make_folder(path)
        self.fs.pipe_file(path, data, mode=mode)

    def _upload(self, path: Path, name: str) -> None:
        remote = self._remote(name)

        def call() -> None:
            self._make_folder(remote)
            self.fs.put_file(str(path), remote)

        self._call(name, call)

    def _make_folder(self, path: str) -> None:
        """Where folders are more than a part of the name."""
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def remote_storage(url: str, policy: RetryPolicy) -> Storage:
    """The storage at a URL that is not local. Raises ValueError as `open_storage`."""
    check_scheme(url)
    if url.partition("://")[0] in ("s3", "s3a"):
        from pipeline.storage_s3 import S3Storage

        return S3Storage(url, policy)
    return RemoteStorage(url, policy)


def _save(file: Any, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(file, target, _COPY_BYTES)
