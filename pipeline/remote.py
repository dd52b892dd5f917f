"""Single files and connections behind fsspec.

Owns one connection for each server and process, errors in words that name a cure, and
reading, listing and sizing files by URL. Does not own folders that are written to
(`pipeline.storage_remote`) or what is special about S3 (`pipeline.storage_s3`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from pipeline.retries import RetryPolicy, retry

# Of botocore, google-auth and azure-identity, by name: see `pipeline.retries`.
_NO_CREDENTIALS = frozenset(
    (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("ProfileNotFound", "TokenRetrievalError", "DefaultCredentialsError"),
        *("ClientAuthenticationError", "SSOError"),
    )
)


class RemoteReader(io.RawIOBase):
    """A remote file that is read by ranges, each tried again on its own."""

    def __init__(self, url: str, file: Any, policy: RetryPolicy) -> None:
        super().__init__()
        self._url = url
        self._file = file
        self._policy = policy
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}
        if start[whence] + offset < 0:
            raise ValueError(f"{self._url}: no position {start[whence] + offset}")
        self._at = start[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._at)
        if size <= 0:
            return 0

        def call() -> bytes:
            self._file.seek(self._at)
            return self._file.read(size)

        with explained(self._url):
            data = retry(call, url=self._url, policy=self._policy)
        if len(data) != size:
            raise OSError(
                f"{self._url} ended {size - len(data)} bytes early at {self._at}: it "
                "was replaced while it was read; run the same command again"
            )
        buffer[:size] = data
        self._at += size
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_remote(url: str, policy: RetryPolicy) -> Any:
    """A remote file, opened for reading without a buffer."""
    with explained(url):
        fs, path = connect(url, policy)
        if "http" in fs.protocol and not retry(
            lambda: fs.info(path).get("partial"), url=url, policy=policy
        ):
            return _downloaded(fs, path, url, policy)
        # Every read is a request of its own: the buffer is the caller's.
        opened = functools.partial(fs.open, path, "rb", cache_type="none")
        file = retry(opened, url=url, policy=policy)
        if getattr(file, "details", {}).get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder", url)
        return RemoteReader(url, file, policy)


def list_remote(url: str, policy: RetryPolicy) -> list[str]:
    """As `pipeline.storage.list_files`."""
    with explained(url):
        fs, path = connect(url, policy)
        fs.invalidate_cache()

        def call() -> list[str]:
            if fs.isfile(path):
                return [path]
            # A name that exists is meant literally, whatever characters it has.
            found = fs.find(path) or _globbed(fs, path)
            return [name for name in found if not name.endswith("/")]

        try:
            found = retry(call, url=url, policy=policy)
        except FileNotFoundError:
            return []
        return sorted(fs.unstrip_protocol(name) for name in found)


def remote_size(url: str, policy: RetryPolicy) -> int:
    """As `pipeline.storage.file_size`."""
    with explained(url):
        fs, path = connect(url, policy)
        fs.invalidate_cache()
        size = retry(lambda: fs.info(path)["size"], url=url, policy=policy)
    if size is None:
        raise ValueError(f"{url}: the server does not tell its size; download it first")
    return int(size)


def connect(url: str, policy: RetryPolicy) -> tuple[Any, str]:
    """fsspec's file system for a URL, one for each server and process, and the path in
    it. Raises ValueError as `pipeline.storage.open_storage`.
    """
    from fsspec.core import strip_protocol, url_to_fs

    check_scheme(url)
    if "::" in url:
        return url_to_fs(url)
    scheme, _, rest = url.partition("://")
    server = f"{scheme}://{rest.partition('/')[0]}"
    return _file_system(server, policy, os.getpid()), str(strip_protocol(url))


@functools.cache
def _file_system(server: str, policy: RetryPolicy, pid: int) -> Any:
    """`pid`: connections must not be shared with a parent."""
    from fsspec.core import url_to_fs

    if server.startswith(("s3:", "s3a:")):
        from pipeline.storage_s3 import s3_file_system

        return s3_file_system(policy)
    return url_to_fs(server, skip_instance_cache=True)[0]


def check_scheme(url: str) -> None:
    from fsspec import get_filesystem_class

    scheme = url.partition("://")[0].partition("::")[0]
    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise ValueError(
            f"{url}: unknown scheme {scheme!r}; use a path, file://, s3://, gs://, "
            "az://, http(s):// or another that fsspec knows"
        ) from error
    except ImportError as error:
        raise ValueError(f"{url}: a package is missing: {error}") from error


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Say what storage answered in words that name the URL and a cure."""
    try:
        yield
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise ValueError(
                f"{url}: there is no such bucket; create it, or correct its name"
            ) from error
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from error
    except PermissionError as error:
        raise PermissionError(
            f"{url}: access denied ({error}); check the credentials (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID, ...) and what they may do there"
        ) from error
    except OSError as error:
        if not error_code(error):
            raise
        # The message is the server's and does not say what it speaks of.
        raise OSError(f"{url}: {error_code(error)}: {error}") from error
    except Exception as error:
        if not _NO_CREDENTIALS & {kind.__name__ for kind in type(error).__mro__}:
            status = http_status(error)
            if status is None:
                raise
            refused = PermissionError if status in (401, 403) else OSError
            raise refused(f"{url}: the server answered {status}") from error
        raise ValueError(
            f"{url}: no credentials ({error}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or for a public bucket FSSPEC_S3_ANON=true"
        ) from error


def error_code(error: BaseException) -> str:
    """The storage's own name of an error that s3fs put into Python's words."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code", "") if isinstance(response, dict) else ""


def http_status(error: BaseException) -> int | None:
    """Status of the answer that an error was made of."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return response["ResponseMetadata"].get("HTTPStatusCode")
    return getattr(error, "status", None)


def _globbed(fs: Any, path: str) -> list[str]:
    if not any(mark in path for mark in "*?["):
        return []
    found = fs.glob(path, detail=True)
    return [name for name, about in found.items() if about["type"] == "file"]


def _downloaded(fs: Any, path: str, url: str, policy: RetryPolicy) -> Any:
    """A file whose server answers no ranges, so that no part of it could be read again:
    all of it, in a file without a name.
    """
    file = tempfile.TemporaryFile(prefix="palimpsest-")  # noqa: SIM115

    def call() -> None:
        file.seek(0)
        file.truncate()
        fs.get_file(path, file)

    retry(call, url=url, policy=policy)
    file.seek(0)
    return file
