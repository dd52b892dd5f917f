"""Decoding in a child process that a hostile image may hang, bloat or kill.

Owns the child: its start, its limits of time and memory, and what its death says about
the image under way. Does not own decoding itself (`pipeline.images`) or the filters
that run beside it (`pipeline.filters`). Linux only, as its limits are the kernel's.

Parent and child take turns, so a task uses one core, and at most one image is ever
under way: the one that a death is about. Encoded bytes go over in shared memory, all
else in pipes. Replies are JSON: whoever takes over a decoder must not get an unpickler.

A verdict never depends on what came before (law 4): an image that dies or runs out of
memory in a child that has done others is tried once more, first and alone in a new one.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.filters import Candidate, Filtered, check_source_size, load_function
from pipeline.images import EncodedImage, ImageError, decode_image, encode_picture
from pipeline.options import FilterOptions, ImageOptions

# Sizes of the image, of the shared buffer, and of the pickle that follows.
_REQUEST = struct.Struct("<QQQ")
# Sizes of the JSON and of the encoded image that follow.
_REPLY = struct.Struct("<QQ")
_FIRST_BUFFER = 1 << 20
# An image that waits rather than computes (a user's filter may) gets this much longer.
_WALL_PER_CPU = 10
_TIMERS = (signal.SIGPROF, signal.SIGALRM)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to decode, and what a filter function may look at."""

    data: bytes
    captions: list[str] = field(default_factory=list)
    columns: Mapping[str, Any] = field(default_factory=dict)


class _Died(Exception):
    """The child died of the image under way."""

    def __init__(self, returncode: int) -> None:
        super().__init__(returncode)
        self.timed_out = -returncode in _TIMERS


class Decoder:
    """`encode_image` and the image filters, in a process of their own.

    A context manager; leaving it ends the child. The child starts with the first image,
    and lasts until then or until an image kills it.
    """

    def __init__(self, options: ImageOptions, filters: FilterOptions) -> None:
        self._options = options
        self._filters = filters
        self._child: _Child | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def encode(
        self, requests: Sequence[Request]
    ) -> list[EncodedImage | ImageError | Filtered]:
        """What became of each image, in order.

        Raises:
            ValueError: `filter.function` cannot be loaded, or returns nonsense.
            RuntimeError: it raises, or the child process cannot start.
        """
        return [self._encode(request) for request in requests]

    def _encode(self, request: Request) -> EncodedImage | ImageError | Filtered:
        fresh = self._child is None or self._child.images == 0
        result = self._attempt(request)
        if result is None or getattr(result, "reason", "") == "memory_limit":
            if not fresh:
                self._stop()
                result = self._attempt(request)
            elif result is None:
                result = self._attempt(request)
        if result is None:
            return ImageError("killed_decoder", "its process died of it twice")
        return result

    def _attempt(self, request: Request) -> EncodedImage | ImageError | Filtered | None:
        """The result, or None where the child died of it."""
        try:
            if self._child is None:
                self._child = _Child(self._options, self._filters)
            return self._child.encode(request)
        except _Died as death:
            self._stop()
            if death.timed_out:
                limit = self._options.time_limit_s
                return ImageError("time_limit", f"more than {limit:g} s")
            return None
        except BaseException:
            # A reply may be outstanding: the next image must not get it.
            self._stop()
            raise

    def _stop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


class _Child:
    """The parent's end of a child process."""

    def __init__(self, options: ImageOptions, filters: FilterOptions) -> None:
        self.images = 0
        file = os.memfd_create("images")
        os.ftruncate(file, _FIRST_BUFFER)
        self._buffer = mmap.mmap(file, _FIRST_BUFFER)
        # No shell, no fork of our threads; no Ctrl-C from the terminal's group.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.decoder", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(file,),
            process_group=0,
            env=_environment(),
        )
        os.close(file)
        try:
            self._send(pickle.dumps((options, filters)))
            self._receive()
        except _Died as death:
            self.close()
            raise RuntimeError(
                f"the image decoder's process ended at its start, {death}: its own "
                "message stands above in the log of this process"
            ) from None
        except BaseException:
            self.close()
            raise

    def encode(self, request: Request) -> EncodedImage | ImageError | Filtered:
        """Raises _Died, and what the user's filter function raises."""
        self.images += 1
        size = len(request.data)
        if size > len(self._buffer):
            self._buffer.resize(1 << (size - 1).bit_length())
        self._buffer[:size] = request.data
        self._send(pickle.dumps((request.captions, request.columns)), size)
        reply, data = self._receive()
        kind = reply.pop("kind")
        if kind == "image":
            return EncodedImage(data=data, **reply)
        return (Filtered if kind == "filtered" else ImageError)(**reply)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._buffer.close()

    def _send(self, pickled: bytes, size: int = 0) -> None:
        assert self._process.stdin is not None
        head = _REQUEST.pack(size, len(self._buffer), len(pickled))
        try:
            _write(self._process.stdin.fileno(), head + pickled)
        except BrokenPipeError:
            raise _Died(self._process.wait()) from None

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        try:
            text_size, size = _REPLY.unpack(_read(pipe, _REPLY.size))
            reply = json.loads(_read(pipe, text_size))
            data = _read(pipe, size)
        except EOFError:
            raise _Died(self._process.wait()) from None
        if reply.get("kind") == "stop":
            raise {"ValueError": ValueError}.get(reply["type"], RuntimeError)(
                reply["message"]
            )
        return reply, data


def _environment() -> dict[str, str]:
    # What the parent can import the child can: a job's working directory, too.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


def _read(pipe: int, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(pipe, [view])
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _serve(requests: int, replies: int, buffer_file: int) -> None:
    """The child: answer requests until the parent closes them or is gone."""
    size, capacity, pickled_size = _REQUEST.unpack(_read(requests, _REQUEST.size))
    options, filters = pickle.loads(_read(requests, pickled_size))
    try:
        function = load_function(filters.function) if filters.function else None
    except ValueError as error:
        _reply(replies, _stop(error))
        return
    _reply(replies, {"kind": "ready"})
    buffer = mmap.mmap(buffer_file, capacity)
    while True:
        size, capacity, pickled_size = _REQUEST.unpack(_read(requests, _REQUEST.size))
        captions, columns = pickle.loads(_read(requests, pickled_size))
        if capacity > len(buffer):
            buffer.close()
            buffer = mmap.mmap(buffer_file, capacity)
        request = Request(data=buffer[:size], captions=captions, columns=columns)
        _reply(replies, *_result(request, options, filters, function))


def _result(
    request: Request,
    options: ImageOptions,
    filters: FilterOptions,
    function: Callable[[Candidate], None] | None,
) -> tuple[dict[str, Any], bytes]:
    try:
        with _limited(options):
            image = _encoded(request, options, filters, function)
    except Filtered as error:
        return {"kind": "filtered", "reason": error.reason, "detail": error.detail}, b""
    except ImageError as error:
        if error.reason != "memory_limit":
            return {
                "kind": "failed",
                "reason": error.reason,
                "detail": error.detail,
            }, b""
    except MemoryError:
        pass
    except (RuntimeError, ValueError) as error:
        return _stop(error), b""
    else:
        fields = {key.name: getattr(image, key.name) for key in _FIELDS}
        return {"kind": "image", **fields}, image.data
    detail = f"more than {options.memory_limit_mb} MB"
    return {"kind": "failed", "reason": "memory_limit", "detail": detail}, b""


_FIELDS = [key for key in dataclasses.fields(EncodedImage) if key.name != "data"]


def _encoded(
    request: Request,
    options: ImageOptions,
    filters: FilterOptions,
    function: Callable[[Candidate], None] | None,
) -> EncodedImage:
    picture = decode_image(
        request.data,
        options,
        lambda width, height: check_source_size(width, height, filters),
    )
    if function is not None:
        width, height = picture.header.shown_size
        function(
            Candidate(
                image=picture.image(),
                captions=request.captions,
                width=width,
                height=height,
                columns=request.columns,
            )
        )
    return encode_picture(picture, options)


@contextmanager
def _limited(options: ImageOptions) -> Iterator[None]:
    """The image's limits. The kernel ends the process when its time is over, whatever
    code it is in; memory beyond the limit is refused.
    """
    with open("/proc/self/statm") as file:
        data_pages = int(file.read().split()[5])
    used = data_pages * mmap.PAGESIZE
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = used + (options.memory_limit_mb << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, options.time_limit_s)
    signal.setitimer(signal.ITIMER_REAL, _WALL_PER_CPU * options.time_limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _stop(error: Exception) -> dict[str, Any]:
    """A fault of the run, not of an image: the parent raises it."""
    return {"kind": "stop", "type": type(error).__name__, "message": str(error)}


def _reply(replies: int, value: Mapping[str, Any], data: bytes = b"") -> None:
    text = json.dumps(value).encode()
    _write(replies, _REPLY.pack(len(text), len(data)) + text + data)


def main() -> None:
    """Serve one parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for timer in _TIMERS:
        signal.signal(timer, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TIMERS)
    requests, replies = os.dup(0), os.dup(1)
    # What a filter function prints must not end up among the replies.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        _serve(requests, replies, int(sys.argv[1]))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
