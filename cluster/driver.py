"""The process that a job is: on a cluster, and alone with its run.

Owns joining the cluster, the lock that keeps a second driver off the same run, and the
wish to stop that a signal brings. Does not own what a driver does (`cluster.stages`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster.store import run_id

if TYPE_CHECKING:
    import ray

NAMESPACE = "palimpsest"
# The cluster notices after a moment that the driver of a killed job is gone.
_TAKING_SECONDS = 30.0
_POLL_SECONDS = 1.0


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
    try:
        ray.init(
            address=os.environ["RAY_ADDRESS"],
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        # Ray raises plain Exceptions too.
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"cannot join the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: "
            f"{line}; is it up, and is its token in RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH?"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
