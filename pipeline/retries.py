"""Trying storage again: what is worth it, how often, and after which pause.

Owns the policy (exponential pauses with full jitter, bounded in number and in total
time), which errors pass by themselves, and the count of what was tried again. Does not
own the calls (`pipeline.storage`) or how URLs of images are fetched (`pipeline.fetch`).
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

TRANSIENT_STATUS = frozenset((408, 429, 500, 502, 503, 504))
_TRANSIENT_ERRNO = frozenset(
    (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EREMOTEIO, errno.ETIMEDOUT)
)
# Errors of the libraries below fsspec. By name, because importing all of those
# libraries to name their classes would take longer than most calls.
_TRANSIENT_NAMES: Mapping[str, str] = {
    "ReadTimeoutError": "time-out",
    "ConnectTimeoutError": "time-out",
    "ServerTimeoutError": "time-out",
    "FSTimeoutError": "time-out",
    "ClientPayloadError": "truncated body",
    "IncompleteRead": "truncated body",
    "IncompleteReadError": "truncated body",
    "ResponseStreamingError": "truncated body",
    "FlexibleChecksumError": "damaged body",
    "ResponseParserError": "unreadable answer",
    "ClientConnectionError": "dropped connection",
    "ConnectionClosedError": "dropped connection",
    "ConnectionError": "dropped connection",
    "HTTPClientError": "dropped connection",
}
# Of this process, whichever storage the calls went to.
_retried: Counter[str] = Counter()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a storage call is tried, and how long in all."""

    tries: int = 10
    """Times that one call is made, the first included."""
    seconds: float = 300.0
    """Time after the first failure in which another try may begin."""
    first_pause_s: float = 0.2
    """Longest pause after the first try; it doubles with every further one."""
    longest_pause_s: float = 20.0


class Tries:
    """The tries of one call."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._end: float | None = None
        self.made = 0

    def pause_after(self, reason: str) -> float:
        """Seconds to wait before the next try, which is counted under `reason`.

        Raises:
            SpentError: there shall be none.
        """
        now = time.monotonic()
        self._end = self._end or now + self._policy.seconds
        self.made += 1
        if self.made >= self._policy.tries or now >= self._end:
            raise SpentError(reason, self.made)
        with _lock:
            _retried[reason] += 1
        longest = self._policy.first_pause_s * 2 ** (self.made - 1)
        # Full jitter: workers that failed together must not come back together.
        return random.uniform(0, min(longest, self._policy.longest_pause_s))


class SpentError(OSError):
    """A request that was tried as often as the policy allows."""

    def __init__(self, reason: str, tries: int) -> None:
        super().__init__(f"{reason} after {tries} tries")
        self.reason = reason
        self.tries = tries


def retry(call: Callable[[], Result], *, url: str, policy: RetryPolicy) -> Result:
    """The result of `call`, made again while it fails in a way that may pass.

    Raises:
        OSError: all tries are spent. The message names `url`, the cause and the cure.
    """
    tries = Tries(policy)
    while True:
        try:
            return call()
        except SpentError as error:
            raise _failure(url, error) from error
        except Exception as error:
            reason = transient_reason(error)
            if reason is None:
                raise
            try:
                pause = tries.pause_after(reason)
            except SpentError as spent:
                raise _failure(url, spent) from error
        time.sleep(pause)


def transient_reason(error: BaseException) -> str | None:
    """Short name of a failure that may pass by itself; None for any other."""
    if hasattr(error.__cause__, "response"):
        # An answer of S3, judged where it came in (`pipeline.storage_s3`).
        return None
    for attribute in ("status", "code", "status_code"):
        status = getattr(error, attribute, None)
        if isinstance(status, int) and status in TRANSIENT_STATUS:
            return str(status)
    for kind in type(error).__mro__:
        if kind.__name__ in _TRANSIENT_NAMES:
            return _TRANSIENT_NAMES[kind.__name__]
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return errno.errorcode[error.errno]
    return "time-out" if isinstance(error, TimeoutError) else None


def retried() -> dict[str, int]:
    """Storage calls that this process made again, by reason."""
    with _lock:
        return dict(sorted(_retried.items()))


def _failure(url: str, spent: SpentError) -> OSError:
    return OSError(
        f"{url}: storage failed {spent.tries} times, last with: {spent.reason}; "
        "nothing committed is lost, and the same command continues once it answers"
    )
