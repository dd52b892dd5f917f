"""Decoding in a child process that a hostile image may hang, bloat or kill.

Owns the parent's side: the child's start and end, and what its death says about the
image under way. Does not own what the child does and its limits
(`pipeline.decoder_process`), or how messages travel (`pipeline.shared_pipe`).

Parent and child take turns, so a task uses one core. Images go over a few at a time, in
shared memory; the child marks which one is under way, and that one a death is about.
Replies are JSON: whoever takes over a decoder must not get an unpickler.

A verdict never depends on what came before (law 4): an image that dies or runs out of
memory is tried once more, first and alone in a new child. A death inside the user's
filter function is no verdict on an image: it stops the run.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import allocation
from pipeline.decoder_process import BLOBS, IN_FUNCTION
from pipeline.filters import FUNCTION_CURE, Filtered
from pipeline.images import EncodedImage, ImageError
from pipeline.options import FilterOptions, ImageOptions
from pipeline.shared_pipe import SharedPipe, shared_memory

# What goes over together: enough to be worth the switch, few enough to be held twice
# and to stay in the processor's cache.
CHUNK_IMAGES = 32
CHUNK_BYTES = 4 << 20
# Deaths that an image need not be guilty of: somebody's kill, or the kernel's for want
# of memory. Tried this often alone before it is held to be.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
_TRIES = 3
# What ends a child whose image has used up its time.
_TIMERS = (signal.SIGPROF, signal.SIGALRM)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to decode, and what a filter function may look at."""

    data: bytes
    captions: list[str] = field(default_factory=list)
    columns: Mapping[str, Any] = field(default_factory=dict)


Result = EncodedImage | ImageError | Filtered


class FunctionError(RuntimeError):
    """A fault of the user's filter function, and the request that it met."""

    def __init__(self, message: str, request: Request) -> None:
        super().__init__(message)
        self.request = request


class _Died(Exception):
    """The child died of an image."""

    def __init__(self, returncode: int, image: int, *, in_function: bool) -> None:
        super().__init__(returncode, image)
        self.returncode = returncode
        self.image = image
        """Its number among those that were sent together."""
        self.in_function = in_function


class Decoder:
    """`encode_image` and the image filters, in a process of their own.

    A context manager; leaving it ends the child. The child starts with the first image,
    and lasts until then or until an image kills it.
    """

    def __init__(
        self,
        options: ImageOptions,
        filters: FilterOptions,
        *,
        hash_pixels: bool = True,
    ) -> None:
        self._options = options
        self._filters = filters
        self._hash_pixels = hash_pixels
        self._child: _Child | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def encode(self, requests: Sequence[Request]) -> list[Result]:
        """What became of each image, in order.

        Raises:
            ValueError: `filter.function` cannot be loaded.
            FunctionError: it raises, returns nonsense, or ends or stops the child.
            RuntimeError: the child process cannot start.
        """
        results: list[Result] = []
        for chunk in _chunks(requests):
            results += self._encode(chunk)
        return results

    def _encode(self, requests: Sequence[Request]) -> list[Result]:
        if not requests:
            return []
        try:
            results = self._attempt(requests)
        except _Died as death:
            request = requests[death.image]
            before, after = requests[: death.image], requests[death.image + 1 :]
            verdict = self._verdict(death, request) or self._alone(request)
            # What came before is done again: its results died, too.
            return [*self._encode(before), verdict, *self._encode(after)]
        return [
            self._alone(request)
            if getattr(result, "reason", None) == "memory_limit"
            else result
            for request, result in zip(requests, results, strict=True)
        ]

    def _alone(self, request: Request) -> Result:
        """The result in a child that has done nothing else."""
        for left in reversed(range(_TRIES)):
            self._stop()
            try:
                return self._attempt([request])[0]
            except _Died as death:
                verdict = self._verdict(death, request, last=not left)
                if verdict is not None:
                    return verdict
                if death.returncode not in _FROM_OUTSIDE:
                    break
        return ImageError("killed_decoder", "its process died of it, also alone")

    def _verdict(
        self, death: _Died, request: Request, *, last: bool = False
    ) -> ImageError | None:
        """What a death says at once; None where the image is to be tried alone.

        Raises:
            FunctionError: it was the filter function's doing, unless that may have come
                from outside and this was not the `last` try.
        """
        late = -death.returncode in _TIMERS
        limit = f"more than {self._options.time_limit_s:g} s"
        if death.in_function and (last or death.returncode not in _FROM_OUTSIDE):
            did = f"took {limit} (--image.time_limit_s)" if late else _ending(death)
            caption = request.captions[0] if request.captions else ""
            raise FunctionError(
                f"--filter.function {self._filters.function} {did}, on an image with "
                f"caption {caption!r}; {FUNCTION_CURE}",
                request,
            )
        return ImageError("time_limit", limit) if late else None

    def _attempt(self, requests: Sequence[Request]) -> list[Result]:
        try:
            if self._child is None:
                self._child = self._start()
            return self._child.encode(requests)
        except BaseException:
            # A reply may be outstanding: the next images must not get it.
            self._stop()
            raise

    def _start(self) -> _Child:
        for tries in range(_TRIES):
            try:
                return _Child(self._options, self._filters, self._hash_pixels)
            except _Died as death:
                if death.returncode not in _FROM_OUTSIDE or tries == _TRIES - 1:
                    raise RuntimeError(
                        "the image decoder's process ended at its start "
                        f"({death.returncode}): what it said stands above in the log"
                    ) from None
        raise AssertionError("the last try returns or raises")

    def _stop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def _chunks(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Few enough to hold in memory twice, many enough to be worth the switch."""
    chunk: list[Request] = []
    size = 0
    for request in requests:
        size += len(request.data)
        if chunk and (size > CHUNK_BYTES or len(chunk) == CHUNK_IMAGES):
            yield chunk
            chunk, size = [], len(request.data)
        chunk.append(request)
    if chunk:
        yield chunk


class _Child:
    """The parent's end of a child process; _Died where that ends at its start."""

    def __init__(
        self, options: ImageOptions, filters: FilterOptions, hash_pixels: bool
    ) -> None:
        self._has_function = bool(filters.function)
        memory = shared_memory()
        # No shell, no fork of our threads; no Ctrl-C from the terminal's group.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.decoder_process", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(memory,),
            process_group=0,
            env=_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._pipe = SharedPipe(
            reads=self._stdout.fileno(), writes=self._stdin.fileno(), memory=memory
        )
        os.close(memory)
        settings = pickle.dumps((options, filters, hash_pixels))
        try:
            for reply in self._exchange(settings)[0]:
                _result(reply, iter(()))
        except BaseException:
            self.close()
            raise

    def encode(self, requests: Sequence[Request]) -> list[Result]:
        """Raises _Died, and what the user's filter function raises."""
        pickled = b""
        if self._has_function:
            pickled = pickle.dumps([(each.captions, each.columns) for each in requests])
        images = [request.data for request in requests]
        replies, encoded = self._exchange(pickled, images)
        blobs = iter(encoded)
        answers = zip(requests, replies, strict=True)
        return [_answered(request, reply, blobs) for request, reply in answers]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._pipe.close()

    def _exchange(
        self, pickled: bytes, images: Sequence[bytes] = ()
    ) -> tuple[list[dict[str, Any]], list[bytes]]:
        self._pipe.mark = 0
        try:
            self._pipe.send(pickled, images)
            text, encoded = self._pipe.receive()
        except (BrokenPipeError, EOFError):
            mark = self._pipe.mark
            image = min(mark & ~IN_FUNCTION, max(len(images) - 1, 0))
            inside = bool(mark & IN_FUNCTION)
            raise _Died(self._process.wait(), image, in_function=inside) from None
        return json.loads(text), encoded


def _answered(
    request: Request, reply: dict[str, Any], blobs: Iterator[bytes]
) -> Result:
    try:
        return _result(reply, blobs)
    except (ValueError, RuntimeError) as error:
        raise FunctionError(str(error), request) from None


def _ending(death: _Died) -> str:
    if death.returncode >= 0:
        return f"ended the decoder's process with exit status {death.returncode}"
    return f"crashed the decoder's process ({signal.Signals(-death.returncode).name})"


def _result(reply: dict[str, Any], blobs: Iterator[bytes]) -> Result:
    kind = reply.pop("kind")
    if kind == "image":
        reply |= {name: next(blobs) for name in BLOBS}
        return EncodedImage(**reply)
    if kind == "failed":
        return ImageError(**reply)
    if kind == "filtered":
        return Filtered(**reply)
    raise (ValueError if kind == "ValueError" else RuntimeError)(reply["message"])


def _environment() -> dict[str, str]:
    # What the parent can import the child can: a job's working directory, too.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **allocation.ENVIRONMENT, "PYTHONPATH": path}
