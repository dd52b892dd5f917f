"""From host batches to the device, ahead of the step, and how long the device waits.

Owns the copy stream, what guards reuse of host buffers, and the measure of waiting.
Does not own the batches (`trainer.loader`) or what the wait says (`trainer.limits`).

On a GPU a thread copies the next step on a stream of its own while the current one is
computed. On a CPU there is nothing to copy, and the device waits as long as the host.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.loader import STEPS_AHEAD, StepBatch

# How far beyond the step that is asked for the loader may be asked: one step waits on
# the device, one is on its way there.
STEPS_BEYOND = STEPS_AHEAD + 3
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class _Copied:
    """A step on the device once `done` has come to pass, or why there is none."""

    batch: StepBatch | None = None
    begun: Any = None
    done: Any = None
    error: BaseException | None = None


class Feed:
    """Steps on a device, one after another.

    A step's tensors are valid until the next one is asked for.

    Args:
        batches: steps on the host; in pinned memory the copy does not block.
        device: where they are wanted.
    """

    def __init__(self, batches: Iterator[StepBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._host_wait = 0.0
        if device.type == "cuda" and device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._copier = _Copier(batches, self._device) if device.type == "cuda" else None
        self._last: _Copied | None = None
        # Events of the compute stream.
        self._before: Any = None
        self._ended: Any = None
        self._asked: Any = None
        self._ready: Any = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copier:
            self._copier.close()

    def next(self) -> StepBatch:
        """The next step.

        Raises:
            StopIteration: there is none.
            ValueError, OSError: what the loader raised.
        """
        begun = time.perf_counter()
        if self._copier is None:
            batch = next(self._batches)
            self._host_wait = time.perf_counter() - begun
            return batch
        copied = self._copier.take()
        self._host_wait = time.perf_counter() - begun
        compute = torch.cuda.current_stream(self._device)
        self._before = self._ended
        self._asked = compute.record_event(torch.cuda.Event(enable_timing=True))
        compute.wait_event(copied.done)
        self._ready = compute.record_event(torch.cuda.Event(enable_timing=True))
        self._last = copied
        assert copied.batch is not None
        for micro in copied.batch.micro_batches:
            # The allocator must not reuse them for the copy stream while they are read.
            for tensor in micro.tensors():
                tensor.record_stream(compute)
        return copied.batch

    def ended(self) -> None:
        """All work of the step is queued on the device."""
        if self._copier is not None:
            compute = torch.cuda.current_stream(self._device)
            self._ended = compute.record_event(torch.cuda.Event(enable_timing=True))

    def waited(self) -> float:
        """Seconds that the device waited for the step's data: while the host had none,
        as far as it had no work left of the step before, and for the copy. Only once a
        result of the step is on the host.
        """
        if self._copier is None:
            return self._host_wait
        assert self._asked is not None
        stall = self._asked.elapsed_time(self._ready) / 1e3
        if self._before is None:
            return self._host_wait + stall
        idle = max(self._before.elapsed_time(self._asked) / 1e3, 0.0)
        return min(idle, self._host_wait) + stall

    def copy_seconds(self) -> float:
        """Seconds that the step's copy took on its stream; 0 on a CPU."""
        if self._last is None:
            return 0.0
        return self._last.begun.elapsed_time(self._last.done) / 1e3


class _Copier:
    """A thread that keeps one step ahead on the device."""

    def __init__(self, batches: Iterator[StepBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._steps: queue.Queue[_Copied] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copy", daemon=True)
        self._thread.start()

    def take(self) -> _Copied:
        copied = self._steps.get()
        if copied.error is not None:
            # Whoever asks again is told again.
            self._steps.put(copied)
            raise copied.error
        return copied

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
            for batch in self._batches:
                copied = self._copy(batch, stream)
                # The loader fills the host buffers again once it is asked for more.
                copied.done.synchronize()
                if not self._put(copied):
                    return
            self._put(_Copied(error=StopIteration()))
        except BaseException as error:  # it belongs to whoever waits for the step
            self._put(_Copied(error=error))

    def _copy(self, batch: StepBatch, stream: Any) -> _Copied:
        with torch.cuda.stream(stream):
            begun = stream.record_event(torch.cuda.Event(enable_timing=True))
            micros = [micro.to(self._device) for micro in batch.micro_batches]
            done = stream.record_event(torch.cuda.Event(enable_timing=True))
        moved = replace(batch, micro_batches=micros)
        return _Copied(batch=moved, begun=begun, done=done)

    def _put(self, copied: _Copied) -> bool:
        while not self._closed.is_set():
            try:
                self._steps.put(copied, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
