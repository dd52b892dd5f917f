"""Image cells of a corpus in, encoded bytes out: in order, ahead of whoever reads.

Owns what a cell may be, files and fsspec URLs of images, and the check against an
expected hash. Does not own which places may be named (`pipeline.addresses`), the web
(`pipeline.download`), the bounds of reading ahead (`pipeline.lookahead`) or what is
done with the bytes (`pipeline.decoder`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.addresses import Network, Place, Places
from pipeline.images import ImageError
from pipeline.lookahead import Bounds, NoRoom, Share, in_order
from pipeline.options import FetchOptions
from pipeline.storage import open_file

if TYPE_CHECKING:
    from pipeline.download import Downloader

# What a wrong path can meet. Every other error is the storage's.
_FAULTS_OF_THE_PATH = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
# How folders list bytes of a name that are not UTF-8.
_NO_UTF8 = re.compile(r"\\udc[89a-f][0-9a-f]")
_SHA256, _DIGEST_BYTES = re.compile("[0-9a-f]{64}"), 32
_PATH_ERRORS = FileNotFoundError, NotADirectoryError, IsADirectoryError
_READS = 4
_RETRY_SECONDS = 0.5
# After a local read that waits for longer this many files are read by threads, several
# at a time.
_QUICK_SECONDS = 0.0005
_SLOW_FILES = 256
# One slow image must not empty the window: requests that are done wait behind it.
_WINDOW_PER_REQUEST = 16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The image cell of an input."""

    value: Any
    """Encoded bytes, `{"bytes", "path"}`, a path, a URL, a list of those, or None."""
    sha256: Any = None
    """Expected hash of the bytes, where the corpus has one: hex digits, as text or
    bytes, with `sha256:` before them or not, or 32 bytes."""


class ImageReader:
    """Reads the images of cells. A context manager: it holds threads and sockets.

    Args:
        options: how URLs are fetched, and what may be named.
        base: folder or URL prefix that relative paths are relative to.
        max_bytes: longer images fail as `too_large`, as far as can be without reading.
        image_list: `refuse` or `first`, for lists of several images.
        hashes: name of the column that expected hashes come from.
        network: hosts that may be connected to. Default: by `options`.

    Raises:
        ValueError: a prefix of `fetch.allow` that is none.
    """

    def __init__(
        self,
        options: FetchOptions,
        *,
        base: str,
        max_bytes: int,
        image_list: str,
        hashes: str | None = None,
        network: Network | None = None,
    ) -> None:
        self._options = options
        self._places = Places(base=base, allow=options.allowed)
        self._max_bytes = max_bytes
        self._takes_first = image_list == "first"
        self._hashes = hashes
        self._network = network or Network(allow_private=options.allow_private)
        self._files = FileReader(options.concurrency, max_bytes)
        self._web: Downloader | None = None

    def read(self, cells: Iterable[Cell]) -> Iterator[bytes | ImageError]:
        """The bytes of every cell, or why there are none; in order. Cells are taken
        ahead, within bounds of number and bytes.

        Raises:
            OSError: storage failed, which is no fault of an input.
        """
        bounds = Bounds(jobs=_WINDOW_PER_REQUEST * self._options.concurrency)
        for cell, found in in_order(cells, self._start, bounds):
            expected = _expected_sha256(cell.sha256)
            if isinstance(found, bytes) and expected:
                yield _verified(found, expected, self._hashes)
            else:
                yield found

    @property
    def retried(self) -> Mapping[str, int]:
        """Requests and reads that were made again, by reason."""
        web = self._web.retried if self._web else Counter[str]()
        return dict(sorted((web + self._files.retried).items()))

    def close(self) -> None:
        """Give up what is under way; no thread or socket is left."""
        self._files.close()
        if self._web:
            self._web.close()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, cell: Cell, share: Share) -> Future[bytes]:
        try:
            value = self._single(cell.value)
            if not isinstance(value, bytes):
                return self._begin(self._places.locate(value), value, share)
            if len(value) > self._max_bytes:
                raise _too_large(self._max_bytes)
        except ImageError as error:
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed
        # Counted, but never refused: the bytes are here already.
        share.hold(len(value))
        done: Future[bytes] = Future()
        done.set_result(value)
        return done

    def _begin(self, place: Place, cell: str, share: Share) -> Future[bytes]:
        if place.web is None:
            return self._files.start(place, cell, share)
        if self._web is None:
            from pipeline.download import Downloader

            self._web = Downloader(
                self._options, max_bytes=self._max_bytes, network=self._network
            )
        return self._web.start(place.web, share)

    def _single(self, value: Any) -> bytes | str:
        """What a cell means: bytes, or a path or URL."""
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            if len(value) > 1 and not self._takes_first:
                detail = f"{len(value)} images (--columns.image_list=first takes one)"
                raise ImageError("several_images", detail)
            value = value[0] if value else None
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if value is None or value in ("", b""):
            raise ImageError("missing_image", "the cell is empty")
        if not isinstance(value, (bytes, str)):
            detail = f"the cell holds {type(value).__name__}, no image, path or URL"
            raise ImageError("missing_image", detail)
        return value


class FileReader:
    """Files, local and behind fsspec, read by a few threads.

    A local file that is read in no time, as those of the page cache are, is read where
    it is asked for: handing it to a thread takes longer. After one that was not, the
    next ones go to the threads.
    """

    def __init__(self, threads: int, max_bytes: int) -> None:
        self.retried: Counter[str] = Counter()
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(threads, "palimpsest-files")
        self._lock = threading.Lock()
        self._slow = 0
        """Local files that are still to go to the threads."""

    def start(self, place: Place, cell: str, share: Share) -> Future[bytes]:
        """Begin to read the file that `cell` names."""
        local = place.path is not None
        if not local or self._slow:
            self._slow -= local
            return self._threads.submit(self._read, place, cell, share)
        done: Future[bytes] = Future()
        begun, waits = time.monotonic(), _waits()
        try:
            done.set_result(self._read(place, cell, share))
        except (ImageError, NoRoom, OSError) as error:
            done.set_exception(error)
        # Time alone would blame the file for what else runs on this core.
        if time.monotonic() - begun > _QUICK_SECONDS and _waits() > waits:
            self._slow = _SLOW_FILES
        return done

    def close(self) -> None:
        """Wait for what is being read."""
        self._threads.shutdown(cancel_futures=True)

    def _read(self, place: Place, cell: str, share: Share) -> bytes:
        name = place.path or place.url or ""
        try:
            if place.path is not None:
                return self._local(place.path, share)
            # Tries again by itself.
            return self._content(open_file(name), share)
        except _PATH_ERRORS as error:
            raise _missing(cell) from error
        except OSError as error:
            if error.errno in _FAULTS_OF_THE_PATH:
                raise _missing(cell) from error
            tries = f", {_READS} times" if place.path else ""
            raise OSError(
                f"{name} cannot be read ({error.strerror or error}{tries}): this is "
                "the storage's fault or its permissions', not the image's; the same "
                "command continues once it is mended"
            ) from error

    def _local(self, path: str, share: Share) -> bytes:
        """The file's bytes, tried again where storage may have failed for a moment."""
        for left in reversed(range(_READS)):
            try:
                # Opening a pipe or a device could wait for ever.
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                return self._content(open(path, "rb", buffering=0), share)
            except OSError as error:
                share.drop()
                if not left or error.errno in _FAULTS_OF_THE_PATH:
                    raise
                with self._lock:
                    self.retried["storage"] += 1
                time.sleep(_RETRY_SECONDS)
        raise AssertionError("the last read returns or raises")

    def _content(self, file: BinaryIO, share: Share) -> bytes:
        """All of a file, its size checked first."""
        with file:
            size = file.seek(0, os.SEEK_END)
            if size > self._max_bytes:
                raise _too_large(self._max_bytes)
            share.take(size)
            file.seek(0)
            # No more than was checked, should the file be growing.
            parts = [file.read(size)]
            while parts[-1] and (missing := size - sum(map(len, parts))):
                parts.append(file.read(missing))
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _waits() -> int:
    """How often this thread has waited for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _expected_sha256(cell: Any) -> str:
    """The text that a cell holds in place of 64 hex digits; empty where it is."""
    if isinstance(cell, bytes):
        if len(cell) == _DIGEST_BYTES:
            return cell.hex()
        cell = cell.decode("ascii", "replace")
    return str(cell or "").strip().lower().removeprefix("sha256:")


def _verified(data: bytes, expected: str, column: str | None) -> bytes | ImageError:
    if hashlib.sha256(data).hexdigest() == expected:
        return data
    why = "not the bytes that the corpus was made of"
    if not _SHA256.fullmatch(expected):
        why = f"column {column!r} holds no sha256, 64 hex digits or 32 bytes"
    return ImageError("hash_mismatch", why)


def _missing(cell: str) -> ImageError:
    why = ": its name is not UTF-8; rename the file" if _NO_UTF8.search(cell) else ""
    return ImageError("missing_file", f"{cell}{why}")


def _too_large(limit: int) -> ImageError:
    return ImageError("too_large", f"more than {limit} bytes (--image.max_bytes)")
