"""Connections behind fsspec, and what their errors mean.

Owns settings of a connection, which errors last, and the words for them, with their
cure. Does not own requests (`trainer.fetch`).
"""

from __future__ import annotations

import asyncio
import errno
import re
from typing import Any

from trainer.storage import StorageError

_PACKAGES = {
    **{"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub"},
    **{"http": "aiohttp", "https": "aiohttp"},
}
# Of botocore, google-auth and azure-identity, by name: none need be installed.
_NO_CREDENTIALS = frozenset(
    (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("ProfileNotFound", "TokenRetrievalError", "DefaultCredentialsError"),
        *("ClientAuthenticationError", "SSOError"),
    )
)


class AccessDeniedError(StorageError, PermissionError):
    """Storage is there, and does not give."""


class ShortReadError(OSError):
    """A range that has fewer bytes than the file should have there."""


def without_password(url: str) -> str:
    """`url` as it may be shown and written down."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def connect(
    url: str, parallel: int, timeout_s: float
) -> tuple[Any, str, asyncio.AbstractEventLoop]:
    """fsspec's file system for the folder at a URL, the folder's path in it, and the
    loop, of a daemon thread, that it runs on.

    Raises:
        ValueError: unknown scheme, or a package that is missing.
        OSError: no connection, where one is made at once.
    """
    scheme = url.partition("://")[0].partition("::")[0]
    try:
        import fsspec
        from fsspec.asyn import get_loop
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"skip_instance_cache": True}
        if scheme in ("s3", "s3a") and "::" not in url:
            options |= _s3_options(parallel, timeout_s)
        fsspec.get_filesystem_class(scheme)
        fs, root = url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme, scheme)
        missing = package if error.name != "fsspec" else "fsspec"
        raise ValueError(
            f"{without_password(url)}: a package is missing ({error}): "
            f"`pip install {missing}`"
        ) from error
    except OSError as error:
        raise StorageError(
            f"{without_password(url)}: no connection: {said(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{without_password(url)}: {error}; give a path, s3://, gs://, az://, "
            "http(s):// or another URL that fsspec knows"
        ) from error
    if scheme in ("s3", "s3a"):
        # Tries are made here, where they are counted and bounded.
        fs.retries = 1
    return fs, root.rstrip("/"), get_loop()


def _s3_options(parallel: int, timeout_s: float) -> dict[str, Any]:
    import fsspec

    own = {
        "connect_timeout": min(timeout_s, 10),
        "read_timeout": timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        # Each may be hedged, and cancelled ones still hold a connection for a moment.
        "max_pool_connections": 4 * parallel,
    }
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    # A run reads files that others write, so no listing may be remembered.
    return {"use_listings_cache": False, "config_kwargs": {**own, **given}}


def raise_lasting(where: str, error: Exception) -> None:
    """Raise what trying again would not change, in words that name a cure; return for
    a failure that may pass. `where`: what was read.
    """
    if isinstance(error, ShortReadError):
        raise error
    if error_code(error) == "InvalidRange" or _status(error) == 416:
        raise ShortReadError(f"{where} has no such range") from error
    if error_code(error) == "NoSuchBucket":
        raise ValueError(
            f"{where}: there is no such bucket; create it, or correct its name"
        ) from error
    if _is_missing(error):
        raise FileNotFoundError(errno.ENOENT, "there is no such file", where) from error
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        raise AccessDeniedError(
            f"{where}: access denied ({said(error)}); check the credentials "
            "(AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) and what they may do there"
        ) from error
    if _NO_CREDENTIALS & {kind.__name__ for kind in type(error).__mro__}:
        raise ValueError(
            f"{where}: no credentials ({said(error)}); set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket "
            "FSSPEC_S3_ANON=true"
        ) from error


def _is_missing(error: BaseException) -> bool:
    """Whether a file is not there, and not the server: fsspec calls every failed
    request of HTTP a missing file.
    """
    if not isinstance(
        error, FileNotFoundError | IsADirectoryError | NotADirectoryError
    ):
        return False
    cause = error.__cause__
    # In memory, a file that is not there is a missing key.
    if cause is None or isinstance(cause, KeyError):
        return True
    if isinstance(getattr(cause, "response", None), dict):
        return True
    return _is_missing(cause) or getattr(cause, "status", None) in (404, 410)


def error_code(error: BaseException) -> str:
    """S3's own name of an error that s3fs put into Python's words."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code", "")
    return ""


def _status(error: BaseException) -> int | None:
    return getattr(error, "status", None) or getattr(error.__cause__, "status", None)


def said(error: BaseException) -> str:
    """An error in a few words."""
    return str(error) or type(error).__name__
