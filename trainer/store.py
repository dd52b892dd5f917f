"""Writing to the folder at a URL: whole files, conditional updates, deletion.

Owns how files get behind fsspec: in parts where they are large and the store is S3,
each part tried again by itself; and updates that one of several writers wins. Does not
own reading, time limits and tries (`trainer.fetch`), connections (`trainer.remote`) or
what the files mean (`trainer.run_copy`).

On object stores a file is there whole or not at all. A process that is killed while it
uploads in parts leaves parts that nobody sees; `abort_uploads` removes them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import math
import os
from collections.abc import Collection, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainer.fetch import RANGE_BYTES, Remote
from trainer.files import write_with
from trainer.remote import error_code
from trainer.storage import StorageConfig, StorageError

_MAX_PARTS = 10_000
# Of a file that goes in one request, besides the time limit of a small one.
_SLOWEST_BYTES_PER_S = 1 << 20
_READS = 3
_AT_ONCE = 16
# Folders are part of a name there; `makedirs` would make a bucket.
_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"))


class Store(Remote):
    """The folder at a URL, to read and to write, for several threads at once.

    All raise ValueError and OSError as `Remote.info`, with the cure in the message.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        super().__init__(
            url,
            parallel=config.parallel,
            timeout_s=config.timeout_s,
            tries=config.tries,
            hedge=config.hedge,
        )
        protocol = self._fs.protocol
        kinds = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_s3 = bool(kinds & {"s3", "s3a"})
        self._has_folders = not kinds & _OBJECT_STORES

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of all files below the folder `prefix`, by name, sorted."""
        start = f"{self._root}/{prefix}".rstrip("/")

        async def find() -> Mapping[str, Any]:
            if not self._is_s3:
                self._fs.invalidate_cache()
            return await self._call("find", start, detail=True)

        try:
            found = self._wait(prefix, find)
        except FileNotFoundError:
            return {}
        cut = len(self._root) + 1
        return {
            path[cut:]: int(found[path].get("size") or 0)
            for path in sorted(found)
            if path.startswith(f"{start}/") and not path.endswith("/")
        }

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises FileNotFoundError where there is none."""
        return self._wait(name, partial(self._call, "cat_file", self._path(name)))

    def download(self, name: str, path: Path) -> int:
        """Fetch a file, which appears at `path` once it is whole; its bytes.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: it changed again and again.
        """
        for _ in range(_READS):
            info = self.info(name)
            write_with(path, partial(self._save, name, info))
            if self.info(name) == info:
                return int(info["size"])
        raise StorageError(f"{self._where(name)} changes while it is read: try again")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all; replaces."""

        async def put() -> None:
            await self._make_folder(name)
            await self._call("pipe_file", self._path(name), data)

        self._wait(name, put)

    def upload(self, name: str, path: Path) -> None:
        """Write a file from a disk, as long as it is now; it may be growing. Holds at
        most `storage.parallel` ranges of it in memory.
        """
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= RANGE_BYTES:
                self.write(name, os.pread(file.fileno(), size, 0))
            elif self._is_s3:
                self._upload_parts(name, file.fileno(), size)
            else:
                self._upload_whole(name, path, size)

    def remove(self, names: Collection[str]) -> None:
        """Remove files; no error where there are none."""
        left = list(names)
        while left:
            some, left = left[:_AT_ONCE], left[_AT_ONCE:]
            running = [
                self._start(self._again(name, partial(self._remove, name)))
                for name in some
            ]
            for future in running:
                self._result(future)

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """Content and version of a small file, for `replace`; None where there is
        none.
        """

        async def get() -> tuple[bytes, str]:
            if not self._is_s3:
                data = await self._call("cat_file", self._path(name))
                return data, hashlib.sha256(data).hexdigest()
            answer = await self._s3("get_object", name)
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        try:
            return self._wait(name, get)
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        """Write a small file unless it is no longer of this version (None: there is
        none); then False, or where an answer was lost: read it again to know. Atomic on
        S3 and on what obeys its conditions; elsewhere a comparison that another writer
        may come behind.
        """
        written = self._put_if(name, data, version) if self._is_s3 else None
        if written is not None:
            return written
        found = self.read_version(name)
        if (found[1] if found else None) != version:
            return False
        self.write(name, data)
        return True

    def abort_uploads(self, prefix: str) -> None:
        """Give up all uploads in parts below `prefix` that have not ended."""
        if not self._is_s3:
            return
        bucket, start, _ = self._fs.split_path(self._path(prefix))

        async def find() -> Mapping[str, Any]:
            return await self._fs._call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=start
            )

        for upload in self._wait(prefix, find).get("Uploads", []):
            key = upload["Key"].removeprefix(self._fs.split_path(self._path(""))[1])
            self._abort(key.lstrip("/"), upload["UploadId"])

    def _put_if(self, name: str, data: bytes, version: str | None) -> bool | None:
        """As `replace`, by a condition; None where the store knows none."""
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}

        async def put() -> bool | None:
            try:
                await self._s3("put_object", name, Body=data, **condition)
            except OSError as error:
                code = error_code(error)
                if code in ("PreconditionFailed", "NoSuchKey"):
                    return False
                if code == "NotImplemented":
                    return None
                raise
            return True

        return self._wait(name, put)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _wait(self, name: str, call: Any, limit_s: float | None = None) -> Any:
        return self._result(self._start(self._again(name, call, limit_s=limit_s)))

    def _save(self, name: str, info: Mapping[str, Any], path: str) -> None:
        try:
            with open(path, "wb") as file:
                for offset, data in self.ranges(name, info):
                    file.seek(offset)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                f"the disk of {path} is full: give a folder on another disk as "
                "--storage.work"
            ) from error

    def _s3(self, method: str, name: str, **given: Any) -> Coroutine[Any, Any, Any]:
        bucket, key, _ = self._fs.split_path(self._path(name))
        return self._fs._call_s3(method, Bucket=bucket, Key=key, **given)

    async def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self._call("rm_file", self._path(name))

    async def _make_folder(self, name: str) -> None:
        if self._has_folders:
            folder = self._path(name).rpartition("/")[0]
            await self._call("makedirs", folder, exist_ok=True)

    def _upload_whole(self, name: str, path: Path, size: int) -> None:
        async def put() -> None:
            await self._make_folder(name)
            await self._call("put_file", str(path), self._path(name))

        limit_s = self._timeout_s + size / _SLOWEST_BYTES_PER_S
        self._wait(name, put, limit_s)

    def _upload_parts(self, name: str, descriptor: int, size: int) -> None:
        step = max(RANGE_BYTES, math.ceil(size / _MAX_PARTS))
        made = self._wait(name, partial(self._s3, "create_multipart_upload", name))
        upload: str = made["UploadId"]
        try:
            parts = self._put_parts(name, descriptor, upload, range(0, size, step))
            self._complete(name, upload, parts, size)
        except BaseException:
            # What cannot be given up now is when the next trainer starts.
            with contextlib.suppress(OSError, ValueError):
                self._abort(name, upload)
            raise

    def _put_parts(
        self, name: str, descriptor: int, upload: str, starts: range
    ) -> list[dict[str, Any]]:
        """Put the ranges that begin at `starts`; what completes the upload."""
        running: dict[concurrent.futures.Future[Any], int] = {}
        tags: dict[int, str] = {}

        def settle(when: str) -> None:
            done, _ = concurrent.futures.wait(running, return_when=when)
            for future in done:
                tags[running.pop(future)] = self._result(future)["ETag"]

        try:
            for number, start in enumerate(starts, 1):
                if len(running) >= self._parallel:
                    settle(concurrent.futures.FIRST_COMPLETED)
                data = os.pread(
                    descriptor, min(starts.step, starts.stop - start), start
                )
                put = partial(
                    self._s3,
                    "upload_part",
                    name,
                    UploadId=upload,
                    PartNumber=number,
                    Body=data,
                )
                running[self._start(self._again(name, put))] = number
            settle(concurrent.futures.FIRST_EXCEPTION)
        finally:
            for future in running:
                future.cancel()
        return [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]

    def _complete(
        self, name: str, upload: str, parts: list[dict[str, Any]], size: int
    ) -> None:
        async def complete() -> None:
            try:
                await self._s3(
                    "complete_multipart_upload",
                    name,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                )
            except OSError as error:
                # The answer of a first try may have been lost.
                if error_code(error) != "NoSuchUpload":
                    raise
                info = await self._call("info", self._path(name))
                if info["size"] != size:
                    raise

        self._wait(name, complete)

    def _abort(self, name: str, upload: str) -> None:
        async def abort() -> None:
            try:
                await self._s3("abort_multipart_upload", name, UploadId=upload)
            except OSError as error:
                if error_code(error) != "NoSuchUpload":
                    raise

        self._wait(name, abort)
