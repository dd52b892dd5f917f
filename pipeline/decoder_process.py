"""The child process of `pipeline.decoder`: `python -m pipeline.decoder_process`.

Owns what is done to each image there, and the limits under which it is done. Does not
own decoding (`pipeline.images`), filters (`pipeline.filters`), or what is made of this
process's death (`pipeline.decoder`). Linux only: the limits are the kernel's.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import mmap
import os
import pickle
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.filters import Candidate, Filtered, check_source_size, load_function
from pipeline.images import EncodedImage, ImageError, decode_image, encode_picture
from pipeline.options import FilterOptions, ImageOptions
from pipeline.shared_pipe import SharedPipe, release

# An image that waits rather than computes (a user's filter may) gets this much longer.
_WALL_PER_CPU = 10
# Stands in the mark beside an image's number while the user's filter has the image.
IN_FUNCTION = 1 << 63
# What of an image does not go through JSON.
BLOBS = ("data", "thumbnail")
_FIELDS = [
    key.name for key in dataclasses.fields(EncodedImage) if key.name not in BLOBS
]


def _serve(pipe: SharedPipe) -> None:
    """Answer until the parent closes its end or is gone."""
    options, filters, hash_pixels = pickle.loads(pipe.receive()[0])
    try:
        function = load_function(filters.function) if filters.function else None
    except ValueError as error:
        pipe.send(_json([_fault(error)]))
        return
    work = _Work(
        options=options,
        filters=filters,
        function=function,
        hash_pixels=hash_pixels,
        pipe=pipe,
    )
    # What is there now stays: the garbage collector need not visit it again and again.
    gc.freeze()
    _limit_memory(options.memory_limit_mb)
    pipe.send(_json([]))
    while True:
        pickled, images = pipe.receive_in_place()
        shown = pickle.loads(pickled) if pickled else [([], {})] * len(images)
        replies, files = [], []
        for number, data in enumerate(images):
            pipe.mark = number
            reply, blobs = work.answer(data, *shown[number])
            replies.append(reply)
            files += blobs
        release(images)
        pipe.send(_json(replies), files)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is done to every image."""

    options: ImageOptions
    filters: FilterOptions
    function: Callable[[Candidate], None] | None
    hash_pixels: bool
    pipe: SharedPipe

    def answer(
        self, data: memoryview, captions: list[str], columns: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[bytes]]:
        """What the parent is told, and the blobs of an image."""
        try:
            with _limited_time(self.options.time_limit_s):
                image = self._encode(data, captions, columns)
        except Filtered as error:
            return _rejected("filtered", error.reason, error.detail), []
        except (ImageError, MemoryError) as error:
            reason = getattr(error, "reason", "memory_limit")
            detail = str(getattr(error, "detail", ""))
            if reason == "memory_limit":
                # Where exactly it ran out is chance.
                detail = f"more than {self.options.memory_limit_mb} MB"
            return _rejected("failed", reason, detail), []
        except (RuntimeError, ValueError) as error:
            return _fault(error), []
        fields = {name: getattr(image, name) for name in _FIELDS}
        return {"kind": "image", **fields}, [getattr(image, name) for name in BLOBS]

    def _encode(
        self, data: memoryview, captions: list[str], columns: Mapping[str, Any]
    ) -> EncodedImage:
        picture = decode_image(data, self.options, self._check_size)
        if self.function is not None:
            width, height = picture.header.shown_size
            candidate = Candidate(
                image=picture.image(),
                captions=captions,
                width=width,
                height=height,
                columns=columns,
            )
            with self._in_function():
                self.function(candidate)
        return encode_picture(picture, self.options, hash_pixels=self.hash_pixels)

    @contextmanager
    def _in_function(self) -> Iterator[None]:
        """What happens now is the function's doing. It has the limit's time for itself,
        and so has what comes after it.
        """
        self.pipe.mark |= IN_FUNCTION
        _start_timers(self.options.time_limit_s)
        try:
            yield
        finally:
            _start_timers(self.options.time_limit_s)
            self.pipe.mark &= ~IN_FUNCTION

    def _check_size(self, width: int, height: int) -> None:
        check_source_size(width, height, self.filters)


def _limit_memory(limit_mb: int) -> None:
    """Refuse this process more memory than it has now and `limit_mb`."""
    with open("/proc/self/statm") as file:
        data_pages = int(file.read().split()[5])
    limit = data_pages * mmap.PAGESIZE + (limit_mb << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Have the kernel end the process when it has computed this long, or waited for ten
    times as long, whatever code it is in.
    """
    _start_timers(seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _start_timers(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _WALL_PER_CPU * seconds)


def _fault(error: Exception) -> dict[str, Any]:
    """Of the run, not of an image: the parent raises it."""
    return {"kind": type(error).__name__, "message": str(error)}


def _rejected(kind: str, reason: str, detail: str) -> dict[str, Any]:
    return {"kind": kind, "reason": reason, "detail": detail}


def _json(value: Sequence[Mapping[str, Any]]) -> bytes:
    return json.dumps(value).encode()


def main() -> None:
    """Serve one parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of what it decodes all the same.
    warnings.filterwarnings("ignore", module="PIL")
    timers = (signal.SIGPROF, signal.SIGALRM)
    for timer in timers:
        signal.signal(timer, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)
    memory = int(sys.argv[1])
    pipe = SharedPipe(reads=os.dup(0), writes=os.dup(1), memory=memory)
    os.close(memory)
    # What a filter function prints must not end up among the replies, and what decoders
    # print in C (libtiff, a line for every damaged one) not in the log.
    sys.stdout = sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    try:
        _serve(pipe)
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
