"""Small files below a directory that every node sees, or below a URL.

Owns writing them whole, with tries. Does not own what they say (`cluster.journal`) or
large files: shards and checkpoints are written by the commands that make them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
_TRIES = 4
_FIRST_WAIT_S = 0.5


class Store:
    """A folder of small files.

    Args:
        url: absolute path, or anything that fsspec opens.

    Raises:
        ValueError: a relative path, or a scheme or package that is not known.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if "://" not in url and not Path(url).is_absolute():
            raise ValueError(
                f"{url} is relative, and a job runs in a temporary copy of its working "
                "directory: give an absolute path that every node sees, or a URL such "
                "as s3://bucket/run"
            )
        local = url.removeprefix("file://") if url.startswith("file://") else url
        self.path = Path(local) if "://" not in local else None
        self._fs: Any = None
        self._root = ""
        if self.path is None:
            self._fs, self._root = _connected(self.url)

    def below(self, name: str) -> Store:
        """The folder `name` in this one."""
        return Store(f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            OSError: storage does not take it.
        """
        self._tried(lambda: self._write(name, data))

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        try:
            return self._tried(lambda: self._read(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tail(self, name: str, size: int) -> bytes | None:
        """The last `size` bytes of a file, None where there is none."""
        try:
            return self._tried(lambda: self._tail(name, size))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self) -> list[str]:
        """Names of the files that lie directly in the folder, sorted."""
        try:
            return sorted(self._tried(self._names))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self) -> list[str]:
        """Names of the folders that lie directly in the folder, sorted."""
        try:
            return sorted(self._tried(self._folders))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            if self.path:
                (self.path / name).unlink()
            else:
                self._fs.rm_file(f"{self._root}/{name}")

    def refuse_unwritable(self) -> None:
        """Raise OSError, naming the cure, where nothing can be written."""
        name = f"probe-{uuid.uuid4().hex}"
        try:
            self.write(name, b"")
            self.remove(name)
        except Exception as error:
            raise OSError(
                f"cannot write to {without_password(self.url)}: "
                f"{first_line(error.__cause__ or error)}; "
                "check that it exists, that this node reaches it, and that its "
                "credentials may write there"
            ) from error

    def _write(self, name: str, data: bytes) -> None:
        if not self.path:
            self._fs.pipe_file(f"{self._root}/{name}", data)
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, name: str) -> bytes:
        if self.path:
            return (self.path / name).read_bytes()
        found: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return found

    def _tail(self, name: str, size: int) -> bytes:
        if self.path:
            with (self.path / name).open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - size, 0))
                return file.read()
        where = f"{self._root}/{name}"
        end = self._fs.info(where)["size"]
        found: bytes = self._fs.cat_file(where, start=max(end - size, 0), end=end)
        return found

    def _names(self) -> list[str]:
        if self.path:
            return [
                entry.name
                for entry in os.scandir(self.path)
                if entry.is_file() and not entry.name.startswith(".")
            ]
        return self._listed("file")

    def _folders(self) -> list[str]:
        if self.path:
            return [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
        return self._listed("directory")

    def _listed(self, kind: str) -> list[str]:
        rows = self._fs.ls(self._root, detail=True, refresh=True)
        names = [row["name"].rstrip("/") for row in rows if row["type"] == kind]
        return [name.rpartition("/")[2] for name in names]

    def _tried(self, call: Callable[[], Result]) -> Result:
        wait_s = _FIRST_WAIT_S
        for tries in range(_TRIES):
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                raise
            except OSError:
                if self.path or tries == _TRIES - 1:
                    raise
            except Exception as error:
                # Clients of stores have errors of their own for a network that is away
                # and for credentials that are not there.
                if self.path:
                    raise
                if tries == _TRIES - 1:
                    raise OSError(
                        f"{without_password(self.url)}: {first_line(error)}; check "
                        "that this machine reaches it and has credentials for it"
                    ) from error
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last try returns or raises")


def without_password(url: str) -> str:
    """`url` as it may be shown and written down."""
    return re.sub(r"(?<=://)[^/@\s\"']*@", "", url)


def run_id(output: str) -> str:
    """Of a run, the same for all of its drivers, however they write its `output`."""
    path = output.removeprefix("file://")
    one = output.rstrip("/") if "://" in path else os.path.realpath(path)
    return hashlib.sha256(one.encode()).hexdigest()[:32]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _connected(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{without_password(url)}: a package is missing ({error}); add it to the "
            "cluster's setup_commands"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{without_password(url)}: {error}; give an absolute path, s3://, gs:// or "
            "another URL that fsspec knows"
        ) from error
    return fs, root.rstrip("/")
