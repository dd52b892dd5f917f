"""Tasks in processes on this machine that end with whoever started them.

Owns starting and stopping the processes of commands that need no cluster. Does not own
what a task does. Tasks on Ray are `pipeline.ray_session`'s.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

WorkT = TypeVar("WorkT")
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

# A process keeps what its tasks share; set once, when it starts.
_run: Callable[[Any], Any] | None = None


def map_processes(
    make: Callable[[WorkT], Callable[[TaskT], ResultT]],
    work: WorkT,
    tasks: Iterable[TaskT],
    *,
    workers: int | None,
) -> Iterator[ResultT]:
    """Results of `make(work)(task)`, as they come. `make` runs once in each process.

    Raises:
        OSError: a process died.
        Exception: whatever a task raises; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    # Only this process has the writing end: when it closes, or this process dies in
    # whatever way, all others read the end.
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers or cpus(),
        mp_context=context,
        initializer=_start,
        initargs=(reader, make, work),
    )
    finished = False
    try:
        for future in as_completed([pool.submit(_call, task) for task in tasks]):
            yield future.result()
        finished = True
    except BrokenProcessPool as error:
        raise OSError(
            "a process died (out of memory?): run the same command again to continue, "
            "with fewer --workers where memory is short"
        ) from error
    finally:
        if not finished:
            writer.close()
        pool.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _start(reader: Connection, make: Callable[[Any], Any], work: Any) -> None:
    global _run  # noqa: PLW0603
    # The terminal interrupts all processes at once; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(reader,), daemon=True).start()
    _run = make(work)


def _leave_with(reader: Connection) -> None:
    reader.poll(None)
    os._exit(1)


def _call(task: Any) -> Any:
    assert _run is not None
    return _run(task)
