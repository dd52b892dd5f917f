"""Reading whole files behind fsspec: ranges at once, time limits, hedges, retries.

Owns how much is read at once, when a read is sent a second time and when it is tried
again. Does not own connections and what their errors mean (`trainer.remote`), writing
(`trainer.store`), where the bytes are kept (`trainer.shard_cache`) or which files are
wanted when (`trainer.cached_files`).

All requests run on fsspec's event loop, a daemon thread: one that hangs is cancelled
where the file system is asynchronous and left alone in a daemon thread where it is not,
so neither a read nor the end of the process waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import random
import statistics
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from trainer.remote import (
    ShortReadError,
    connect,
    raise_lasting,
    said,
    without_password,
)
from trainer.storage import StorageError

RANGE_BYTES = 8 << 20
# A request is hedged by what the latest of its size took, once this many are known;
# before that, and at most, after this share of the time limit.
_KNOWN_ENOUGH, _LATEST = 8, 64
_PATIENCE_SHARE = 0.25
_PATIENCE_FLOOR_S = 0.25
# Where everything is slow, hedges would only add to the load: at most this share of all
# requests, after a few.
_HEDGES_FREE, _HEDGES_SHARE = 4, 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 20.0
Result = TypeVar("Result")


class Remote:
    """The folder at a URL, for several threads at once.

    Args:
        url: any that fsspec knows; settings and credentials are fsspec's own
            (`FSSPEC_S3_ENDPOINT_URL`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...).
        parallel: ranges held at once.
        timeout_s: seconds that one request may take.
        tries: times that one request is made before it is an error.
        hedge: times the median of the latest requests after which a second one is sent;
            0 for never.
        range_bytes: size of a range.

    Raises:
        ValueError: unknown scheme, or a package that is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        parallel: int,
        timeout_s: float,
        tries: int,
        hedge: float,
        range_bytes: int = RANGE_BYTES,
    ) -> None:
        self.url = url.rstrip("/")
        self.shown = without_password(self.url)
        self.figures: Counter[str] = Counter()
        self._timeout_s, self._tries, self._hedge = timeout_s, tries, hedge
        self._range_bytes = range_bytes
        self._connect = partial(connect, self.url, parallel, timeout_s)
        self._fs, self._root, self._loop = self._connect()
        self._idle = [self._fs]
        self._parallel = parallel
        self._slots = threading.Semaphore(parallel)
        # Whoever asks for a part waits for it, and for no whole file before it.
        self._span_slots = threading.Semaphore(parallel)
        self._seconds: dict[int, deque[float]] = defaultdict(
            partial(deque, maxlen=_LATEST)
        )
        self._running: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._lock = threading.Lock()

    def info(self, name: str) -> Mapping[str, Any]:
        """What storage says of a file: its `size`, and whatever tells it from another
        version of it. Equal as long as the file is the same.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: storage failed `tries` times. The message has the cure.
            ValueError: no credentials, no such bucket, or no size.
        """
        path = f"{self._root}/{name}"
        found = self._start(self._again(name, lambda: self._call("info", path)))
        info = self._result(found)
        if info.get("type") == "directory":
            raise FileNotFoundError(
                errno.ENOENT, "there is no such file", self._where(name)
            )
        if info.get("size") is None:
            raise ValueError(
                f"{self._where(name)}: the server does not tell its size; copy the "
                "dataset to a disk, and give that as --data"
            )
        return info

    def ranges(
        self, name: str, info: Mapping[str, Any]
    ) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of all of a file, in the order in which they come in.

        Raises:
            ShortReadError: it is not as long as `info` says.
            FileNotFoundError, OSError, ValueError: as `info`.
        """
        size, step = int(info["size"]), self._range_bytes
        if self._serves_whole_files(info):
            step = max(size, 1)
        starts = deque(range(0, size, step))
        running: dict[concurrent.futures.Future[bytes], int] = {}
        try:
            while starts or running:
                # One is always held, so that this goes on wherever the others are.
                while (
                    starts
                    and len(running) < self._parallel
                    and self._slots.acquire(blocking=not running)
                ):
                    start = starts.popleft()
                    running[self._submit(name, start, min(start + step, size))] = start
                for future in _first(running):
                    # The slot is held until the caller has done with the bytes.
                    data = memoryview(self._result(future))
                    yield running[future], data
                    self._count(bytes=len(data))
                    del running[future]
                    self._slots.release()
        finally:
            for future in running:
                future.cancel()
                self._slots.release()

    def span(self, name: str, info: Mapping[str, Any], start: int, stop: int) -> bytes:
        """Bytes of a part of a file.

        Raises:
            ShortReadError: the file ends before.
            FileNotFoundError, OSError, ValueError: as `info`; also where the server
                gives whole files alone.
        """
        if self._serves_whole_files(info):
            raise StorageError(
                f"{self._where(name)} has no place in the cache, and the server gives "
                "no parts of files: give more as --storage.cache_bytes, on a disk that "
                "has as much"
            )
        with self._span_slots:
            data = self._result(self._start_read(name, start, stop))
        self._count(bytes=len(data), spans=1)
        return data

    def first_tar(self) -> str | None:
        """Name of a tar in the folder or up to three folders below it, if a listing
        that is cut short by the time limit finds one.

        Raises:
            ValueError: no credentials, or no such bucket.
        """
        walk = partial(_in_thread, partial(self._walk_to_tar, time.monotonic()))
        with contextlib.suppress(OSError):
            return self._result(self._start(self._again("", walk)))
        return None

    def close(self) -> None:
        """End what is running: whoever waits for it gets an OSError."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for future in running:
            future.cancel()

    def _walk_to_tar(self, began: float) -> str | None:
        for at, _, names in self._fs.walk(self._root, maxdepth=4):
            for name in names:
                if name.endswith(".tar"):
                    return f"{at}/{name}".removeprefix(self._root).lstrip("/")
            if time.monotonic() > began + self._timeout_s:
                break
        return None

    def _serves_whole_files(self, info: Mapping[str, Any]) -> bool:
        return "http" in self._fs.protocol and not info.get("partial")

    def _where(self, name: str) -> str:
        return f"{self.shown}/{name}" if name else self.shown

    def _submit(
        self, name: str, start: int, stop: int
    ) -> concurrent.futures.Future[bytes]:
        """Begin to read a range with the slot that the caller took for it."""
        try:
            return self._start_read(name, start, stop)
        except OSError:
            self._slots.release()
            raise

    def _start_read(
        self, name: str, start: int, stop: int
    ) -> concurrent.futures.Future[bytes]:
        """Begin to read a range."""
        read = partial(self._read, f"{self._root}/{name}", start, stop)
        return self._start(self._again(name, read))

    def _start(
        self, coroutine: Coroutine[Any, Any, Result]
    ) -> concurrent.futures.Future[Result]:
        with self._lock:
            if self._closed:
                coroutine.close()
                raise StorageError(f"{self.shown}: closed while it was read")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._running.add(future)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._running.discard(future)

    def _result(self, future: concurrent.futures.Future[Result]) -> Result:
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise StorageError(f"{self.shown}: closed while it was read") from None

    def _count(self, **more: int) -> None:
        with self._lock:
            self.figures.update(more)

    async def _again(
        self,
        name: str,
        call: Callable[[], Awaitable[Result]],
        *,
        limit_s: float | None = None,
    ) -> Result:
        """The result of `call`, made again while it fails in a way that may pass, or
        takes longer than `limit_s` (None: the time limit of all requests).
        """
        tried, limit_s = 0, limit_s or self._timeout_s
        while True:
            tried += 1
            try:
                return await _limited(call(), limit_s)
            except Exception as error:
                last = error
                raise_lasting(self._where(name), error)
            if tried >= self._tries:
                raise StorageError(
                    f"{self._where(name)}: storage failed {tried} times, last with: "
                    f"{said(last)}; the same command continues once it answers "
                    "(--storage.tries and --storage.timeout_s say how long to try)"
                ) from last
            self._count(retries=1)
            longest = min(_FIRST_PAUSE_S * 2 ** (tried - 1), _LONGEST_PAUSE_S)
            # Full jitter: ranks that failed together must not come back together.
            await asyncio.sleep(random.uniform(0, longest))

    async def _read(self, path: str, start: int, stop: int) -> bytes:
        """A range: of one request, or of two, the first answer."""
        began = time.monotonic()
        tasks = {self._range(path, start, stop)}
        patience = self._patience(stop - start)
        try:
            done, _ = await asyncio.wait(tasks, timeout=patience)
            if not done and self._may_hedge():
                self._count(hedges=1)
                tasks.add(self._range(path, start, stop))
            data = await _first_answer(tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._seconds[(stop - start).bit_length()].append(time.monotonic() - began)
        if len(data) < stop - start:
            raise ShortReadError(f"{len(data)} bytes where {stop - start} should be")
        return data[: stop - start]

    def _range(self, path: str, start: int, stop: int) -> asyncio.Future[bytes]:
        self._count(requests=1)
        return self._call("cat_file", path, start=start, end=stop)

    def _patience(self, size: int) -> float | None:
        """Seconds after which a second request is sent; None for never."""
        if not self._hedge:
            return None
        most, known = (
            self._timeout_s * _PATIENCE_SHARE,
            self._seconds[size.bit_length()],
        )
        if len(known) < _KNOWN_ENOUGH:
            return most
        usual = self._hedge * statistics.median(known)
        return min(max(usual, _PATIENCE_FLOOR_S), most)

    def _may_hedge(self) -> bool:
        most = _HEDGES_FREE + self.figures["requests"] * _HEDGES_SHARE
        return self.figures["hedges"] < most

    def _call(self, method: str, *given: Any, **named: Any) -> asyncio.Future[Any]:
        if self._fs.async_impl:
            future = asyncio.ensure_future(
                getattr(self._fs, f"_{method}")(*given, **named)
            )
        else:
            future = _in_thread(partial(self._alone, method, *given, **named))
        future.add_done_callback(_retrieved)
        return future

    def _alone(self, method: str, *given: Any, **named: Any) -> Any:
        """A call on a connection that no other thread uses meanwhile: few file systems
        that are not asynchronous bear that. One that hangs or fails is not used again.
        """
        with self._lock:
            fs = self._idle.pop() if self._idle else None
        if fs is None:
            fs, _, _ = self._connect()
        result = getattr(fs, method)(*given, **named)
        with self._lock:
            self._idle.append(fs)
        return result


def _in_thread(call: Callable[[], Result]) -> asyncio.Future[Result]:
    """`call` in a thread of its own, which nobody waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = call(), None
        except Exception as failure:
            result, error = None, failure
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="read", daemon=True).start()
    return future


async def _limited(call: Awaitable[Result], seconds: float) -> Result:
    """As `asyncio.wait_for`, which would wait for a call that does not end when it is
    cancelled.
    """
    task = asyncio.ensure_future(call)
    task.add_done_callback(_retrieved)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError(f"no answer in {seconds:g} s")
        return task.result()
    finally:
        task.cancel()


async def _first_answer(tasks: set[asyncio.Future[bytes]]) -> bytes:
    """The result of the first to succeed, or the error of the last to fail."""
    left = set(tasks)
    while True:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        good = [task for task in done if not task.cancelled() and not task.exception()]
        if good or not left:
            return (good or list(done))[0].result()


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Look at an error that nobody waits for any more, or the loop would print it."""
    if not future.cancelled():
        future.exception()


def _first(
    running: Mapping[concurrent.futures.Future[bytes], int],
) -> set[concurrent.futures.Future[bytes]]:
    return concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
    ).done
