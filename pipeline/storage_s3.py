"""A storage on S3 and on what speaks its protocol.

Owns conditional writes (If-None-Match, If-Match), the sizes of parts, and that every
single request is tried again, not the transfer that it is part of. Does not own
connections and errors (`pipeline.remote`). Needs a store that obeys conditional writes:
S3 does, and recent MinIO, Ceph and R2. A process killed while it uploads in parts
leaves parts that nobody sees; a lifecycle rule for incomplete uploads removes them.
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.remote import error_code, explained, http_status
from pipeline.retries import TRANSIENT_STATUS, RetryPolicy, Tries, transient_reason
from pipeline.storage import checked_name
from pipeline.storage_remote import RemoteStorage

# Memory of an upload: this many parts of this size are held at once, in all about
# 130 MB with what is being sent.
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_MAX_PARTS = 10_000
_DELETED_AT_ONCE = 1000
# Answers that come with a status that alone would not say that they may pass.
_TRANSIENT_CODES = frozenset(
    (
        *("InternalError", "SlowDown", "ServiceUnavailable", "Throttling"),
        *("ThrottlingException", "RequestLimitExceeded", "TooManyRequests"),
        *("RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest"),
        *("XAmzContentSHA256Mismatch", "ConditionalRequestConflict"),
        "OperationAborted",
    )
)
# Metadata of an object that says which call wrote it.
_MARK = "palimpsest-write"


class S3Storage(RemoteStorage):
    """A folder in a bucket."""

    def read(self, name: str) -> bytes:
        return self._call(name, lambda: self._get(name)[0])

    def size(self, name: str) -> int | None:
        try:
            return int(self._head(name)["ContentLength"])
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        return self._put_if(name, data, IfNoneMatch="*")

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        try:
            return self._call(name, lambda: self._get(name))
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes, version: str) -> bool:
        return self._put_if(name, data, IfMatch=version)

    def discard(self, name: str, version: str) -> bool:
        def call() -> bool:
            try:
                self._request("delete_object", name, IfMatch=version)
            except OSError as error:
                if http_status(error) in (404, 412) and not _no_bucket(error):
                    return False
                raise
            return True

        return self._call(name, call)

    def remove_tree(self, prefix: str) -> None:
        names = self.names(checked_name(prefix))
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = names[start : start + _DELETED_AT_ONCE]
            self._call(prefix, functools.partial(self._delete, some))

    def _put_if(self, name: str, data: bytes, **condition: str) -> bool:
        mark = uuid.uuid4().hex

        def call() -> bool:
            put = {"Body": data, "Metadata": {_MARK: mark}, **condition}
            try:
                self._request("put_object", name, **put)
            except OSError as error:
                if http_status(error) == 501:
                    raise ValueError(
                        f"{self.url}: this store has no conditional writes, without "
                        "which two drivers could write one dataset; choose another"
                    ) from error
                if http_status(error) not in (404, 412) or _no_bucket(error):
                    raise
                # The write that is in the way may be this one: an earlier try whose
                # answer was lost.
                return self._mark(name) == mark
            return True

        return self._call(name, call)

    def _mark(self, name: str) -> str | None:
        try:
            return self._head(name)["Metadata"].get(_MARK)
        except FileNotFoundError:
            return None

    def _head(self, name: str) -> Any:
        return self._call(name, lambda: self._request("head_object", name))

    def _get(self, name: str) -> tuple[bytes, str]:
        from fsspec.asyn import sync

        answer = self._request("get_object", name)
        return sync(self.fs.loop, _body, answer), answer["ETag"]

    def _delete(self, names: list[str]) -> None:
        bucket = self.fs.split_path(self._root)[0]
        keys = [{"Key": self.fs.split_path(self._remote(name))[1]} for name in names]
        doomed = {"Objects": keys, "Quiet": True}
        answer = self.fs.call_s3("delete_objects", Bucket=bucket, Delete=doomed)
        for error in answer.get("Errors", []):
            if error["Code"] in _TRANSIENT_CODES:
                raise TimeoutError(error["Message"])
            raise PermissionError(f"{error['Key']}: {error['Message']}")

    def _request(self, method: str, name: str, **given: Any) -> Any:
        bucket, key, _ = self.fs.split_path(self._remote(name))
        return self.fs.call_s3(method, Bucket=bucket, Key=key, **given)

    def _pipe(self, path: str, data: bytes, mode: str) -> None:
        self.fs.pipe_file(path, data, mode=mode, **_parts(len(data)))

    def _upload(self, path: Path, name: str) -> None:
        remote, parts = self._remote(name), _parts(path.stat().st_size)
        self._call(name, lambda: self.fs.put_file(str(path), remote, **parts))

    def _make_folder(self, path: str) -> None:
        """Nothing: a folder is part of the name."""


def s3_file_system(policy: RetryPolicy) -> Any:
    """s3fs with the user's settings, whose requests are tried again by `policy`."""
    import fsspec

    settings = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    own = {
        "connect_timeout": 10,
        # A copy or a completion answers when it is done.
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        # Other processes write there too.
        use_listings_cache=False,
        config_kwargs={**own, **settings},
    )
    fs.retries = 1
    with explained("s3://"):
        events = fs.s3.meta.events
    events.register("needs-retry.s3", _pauses(policy))
    return fs


def _pauses(policy: RetryPolicy) -> Callable[..., float | None]:
    """What botocore asks after every request: None, or the pause before the next."""

    def pause(
        *, request_dict: dict[str, Any], response: Any, caught_exception: Any, **_: Any
    ) -> float | None:
        reason = _reason(response, caught_exception)
        if reason is None:
            return None
        tries = request_dict["context"].setdefault("palimpsest", Tries(policy))
        return tries.pause_after(reason)

    return pause


def _reason(response: Any, error: Exception | None) -> str | None:
    if error is not None:
        return transient_reason(error)
    http, parsed = response
    code = parsed.get("Error", {}).get("Code")
    if http.status_code in TRANSIENT_STATUS:
        return str(http.status_code)
    return code if code in _TRANSIENT_CODES else None


def _parts(size: int) -> dict[str, int]:
    part = max(_PART_BYTES, math.ceil(size / _MAX_PARTS))
    return {"chunksize": part, "max_concurrency": _PARTS_AT_ONCE}


def _no_bucket(error: BaseException) -> bool:
    return error_code(error) == "NoSuchBucket"


async def _body(answer: Any) -> bytes:
    async with answer["Body"] as body:
        return await body.read()
