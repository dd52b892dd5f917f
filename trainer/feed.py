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


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How a step came to its device. To be asked once a result of the step is on the
    host, however many steps have been fed since.
    """

    host_wait: float
    """Seconds that the host waited for the step."""
    begun: Any = None
    done: Any = None
    """Events of the copy stream, on a GPU: the copy began, and had been made."""
    before: Any = None
    asked: Any = None
    ready: Any = None
    """Of the compute stream: all work of the step before had been done, if there was
    one; the step was asked for; it was there."""

    def waited(self) -> float:
        """Seconds that the device waited for the step's data: while the host had none,
        as far as it had no work left of the step before, and for the copy.
        """
        if self.asked is None:
            return self.host_wait
        stall: float = self.asked.elapsed_time(self.ready) / 1e3
        if self.before is None:
            return self.host_wait + stall
        idle = max(self.before.elapsed_time(self.asked) / 1e3, 0.0)
        return min(idle, self.host_wait) + stall

    def copy_seconds(self) -> float:
        """Seconds that the step's copy took on its stream; 0 on a CPU."""
        if self.begun is None:
            return 0.0
        return float(self.begun.elapsed_time(self.done) / 1e3)


class Feed:
    """Steps on a device, one after another.

    A step's tensors are valid until the next one is asked for.

    Args:
        batches: steps on the host; in pinned memory the copy does not block.
        device: where they are wanted.
    """

    def __init__(self, batches: Iterator[StepBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        if device.type == "cuda" and device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._copier = _Copier(batches, self._device) if device.type == "cuda" else None
        self._last = Delivery(host_wait=0.0)
        self._ended: Any = None

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
        began = time.perf_counter()
        if self._copier is None:
            batch = next(self._batches)
            self._last = Delivery(host_wait=time.perf_counter() - began)
            return batch
        copied = self._copier.take()
        host_wait = time.perf_counter() - began
        compute = torch.cuda.current_stream(self._device)
        asked = compute.record_event(torch.cuda.Event(enable_timing=True))
        compute.wait_event(copied.done)
        self._last = Delivery(
            host_wait=host_wait,
            begun=copied.begun,
            done=copied.done,
            before=self._ended,
            asked=asked,
            ready=compute.record_event(torch.cuda.Event(enable_timing=True)),
        )
        assert copied.batch is not None
        for micro in copied.batch.micro_batches:
            # The allocator must not reuse them for the copy stream while they are read.
            for tensor in micro.tensors():
                tensor.record_stream(compute)
        return copied.batch

    def ended(self) -> Delivery:
        """All work of the step is queued on the device. How the step came there."""
        if self._copier is not None:
            compute = torch.cuda.current_stream(self._device)
            self._ended = compute.record_event(torch.cuda.Event(enable_timing=True))
        return self._last


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
