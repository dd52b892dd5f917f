"""The process that a job is: on a cluster, and alone with its run.

Owns joining the cluster, the lock that keeps a second driver off the same run, and the
wish to stop that a signal brings. Does not own what a driver does (`cluster.stages`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster.journal import read_events, shows_life
from cluster.store import Store, first_line, run_id

if TYPE_CHECKING:
    import ray

NAMESPACE = "palimpsest"
# The cluster notices after a moment that the driver of a killed job is gone.
_TAKING_SECONDS = 30.0
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


class Stopped(Exception):
    """Somebody asked the driver to stop; the same command continues."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Join the cluster that this process is a job of.

    Raises:
        OSError: there is none, or it does not answer.
    """
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        raise OSError(
            "no cluster: submit this as a job (`ray job submit --working-dir . -- "
            "python -m cluster.run ...`), or export RAY_ADDRESS; `python -m "
            "cluster.local up` starts a cluster on this machine to try it on"
        )
    _refuse_dead_end(os.environ["RAY_ADDRESS"])
    try:
        ray.init(
            address=os.environ["RAY_ADDRESS"],
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        # Ray raises plain Exceptions too.
        raise OSError(
            f"cannot join the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: "
            f"{first_line(error)}; is it up, and is its token in RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH?"
        ) from error
    try:
        yield
    except ray.exceptions.RayError as error:
        raise OSError(
            f"the cluster failed ({first_line(error)}); the same command continues"
        ) from error
    finally:
        ray.shutdown()


def _refuse_dead_end(address: str) -> None:
    """Ray would try for a quarter of an hour to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise OSError(
            f"no cluster answers at RAY_ADDRESS={address} ({error}): start it, or "
            "correct the address"
        ) from error


@contextlib.contextmanager
def only_driver(output: str) -> Iterator[None]:
    """Be the only driver of the run at `output` on this cluster: by a named actor,
    which ends with the driver, however that ends.

    Raises:
        ValueError: another driver works on the run.
    """
    lock = _take(output)
    try:
        yield
    finally:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(lock)


def refuse_driver_elsewhere(run: Store, tell: Callable[[str], None]) -> None:
    """Raise ValueError where a driver on another cluster works on the run: one that has
    not said that it ended, and goes on giving signs of life. On this cluster there is
    none (`only_driver`).
    """
    events = read_events(run)
    started = [event for event in events if event.kind == "driver_started"]
    if not started:
        return
    last = started[-1]
    ended = any(e.kind == "driver_ended" and e.driver == last.driver for e in events)
    if ended or last.fields.get("cluster") == gcs_address():
        return
    host = last.fields.get("host")
    tell(f"the last driver, on {host}, has not said that it ended: is it alive?")
    if shows_life(run):
        raise ValueError(
            f"a driver on another cluster ({host}, process {last.fields.get('pid')}) "
            f"works on {run.url}: wait for it or stop it, or take another output"
        )


@contextlib.contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. A second signal ends the process."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {
        number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gcs_address() -> str:
    """Address of the cluster, for processes that this one starts."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


class _Lock:
    """Held while it is alive."""

    def ready(self) -> bool:
        return True


def _take(output: str) -> ray.actor.ActorHandle:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"run-{run_id(output)}"
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    lock: Any = ray.remote(_Lock).options(
        name=name, num_cpus=0, scheduling_strategy=here, max_restarts=-1
    )
    deadline = time.monotonic() + _TAKING_SECONDS
    while True:
        try:
            taken = lock.remote()
            ray.get(taken.ready.remote(), timeout=_TAKING_SECONDS)
            return taken
        except ValueError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another driver works on {output}: wait for its job or stop it "
                    "(`ray job list`, `ray job stop ID`), or take another output"
                ) from None
        time.sleep(_POLL_SECONDS)
