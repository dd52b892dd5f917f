"""Where tasks run: a Ray of our own on this machine, or the cluster we are part of.

Owns starting, joining and leaving Ray, and running tasks within a bound.
Does not own what a task does (`pipeline.ranges`) or what its result is for
(`pipeline.run`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.retries import retried
from pipeline.storage import STAGING, Storage
from pipeline.work import Report, Work

if TYPE_CHECKING:
    import ray

ResultT = TypeVar("ResultT")
# Gets the last report of every task under way, by number.
Poll = Callable[[Mapping[int, Mapping[str, Any]]], None]
# Set by `ray job submit` for the driver, whose working directory is a temporary copy.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# A cluster that scales looks at waiting tasks, so some must wait even on no CPUs.
_WAITING_TASKS = 16
_ATTEMPTS = 4
_REPORT_SECONDS = 1.0
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 60.0
# More tasks than this are never under way on a cluster.
_BOARD_SIZE = 4096


def refuse_relative_in_job(output: str) -> None:
    """Raise ValueError where a relative output would lie in a job's temporary copy of
    the working directory, and be lost with it.
    """
    local = "://" not in output
    if _JOB_VARIABLE in os.environ and local and not Path(output).is_absolute():
        raise ValueError(
            f"--output {output} is relative, and inside a Ray job that means a "
            "temporary copy of the working directory; give an absolute path that every "
            "node sees, or a URL such as s3://bucket/folder"
        )


def refuse_unshared(storage: Storage) -> None:
    """Raise ValueError where a node of the cluster does not see the output: every node
    must read back what this process wrote, and the other way round.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 and not os.environ.get("RAY_ADDRESS"):
        return
    token = secrets.token_hex(8)
    name = f"{STAGING}/probe-{token}"
    storage.write(name, token.encode())
    try:
        probe: Any = ray.remote(_probe)
        answers = [
            probe.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    node["NodeID"], soft=False
                ),
            ).remote(storage, name, token)
            for node in nodes
        ]
        # Hosts may have several nodes, and containers one name.
        for node, answer in zip(nodes, answers, strict=True):
            if not _answer(answer):
                raise ValueError(
                    f"--output {storage.url} is not the same folder on node "
                    f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): "
                    "what one node writes the others must read; give a folder that all "
                    "nodes share, or a URL such as s3://bucket/folder"
                )
    finally:
        storage.remove(name)


def _probe(storage: Storage, name: str, token: str) -> bool:
    try:
        return storage.read(name) == token.encode()
    except (OSError, ValueError):
        return False


def _answer(reference: ray.ObjectRef) -> bool:
    import ray

    try:
        return bool(ray.get(reference, timeout=_PROBE_SECONDS))
    except (ray.exceptions.RayError, TimeoutError):
        # A node that is gone or busy has not said that it sees anything else.
        return True


@contextlib.contextmanager
def session(workers: int | None) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start Ray here with `workers` CPUs."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_dead_end(address)
    _set_environment(local=not address)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        options["address"] = address
    else:
        options |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:
        # Ray raises plain Exceptions too: where its own processes die at their start.
        where = f"the cluster at RAY_ADDRESS={address}" if address else "Ray here"
        raise OSError(f"cannot use {where}: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def map_tasks(
    function: Callable[[Work, Any, Report], ResultT],
    work: Work,
    items: Iterable[tuple[int, Any] | None],
    *,
    workers: int | None,
    poll: Poll | None,
    ordered: bool = False,
    resources: Mapping[str, float] = MappingProxyType({}),
) -> Iterator[Finished[ResultT]]:
    """Run `function(work, item, report)` on every `(number, item)` as a Ray task,
    yielding what comes of it as tasks end or, `ordered`, in the order of the items.
    Items may depend on results: they are asked for as late as can be, and where they
    give None, again once another result was yielded, until none is under way.

    At most a bounded number is under way; in order, those that wait for an earlier one
    to be yielded are included, so that one slow task holds up the others. Tasks whose
    worker dies are run again. `poll`, where there is one, gets the last report of every
    task under way, by number, a few times a second. On a cluster that was joined, a
    task asks for `resources` besides its CPU.
    """
    import ray

    board: Any = None
    if poll is not None:
        board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    shared = ray.put(work)
    remote: Any = ray.remote(_run_task).options(
        num_cpus=1,
        max_retries=_ATTEMPTS - 1,
        resources=dict(resources) if os.environ.get("RAY_ADDRESS") else None,
    )
    pending: dict[ray.ObjectRef, int] = {}
    finished: dict[int, Finished[ResultT]] = {}
    queue = iter(items)
    turns: deque[int] = deque()
    while True:
        while len(pending) + len(finished) < _window(workers):
            if (upcoming := next(queue, None)) is None:
                break
            number, item = upcoming
            pending[remote.remote(function, shared, item, number, board)] = number
            turns.append(number)
        if not pending and not finished:
            return
        ready, _ = (
            ray.wait(list(pending), timeout=_POLL_SECONDS) if pending else ([], [])
        )
        for reference in ready:
            finished[pending.pop(reference)] = _result(reference)
        if poll is not None:
            waiting, tallies = set(turns), dict(_tallies(board))
            tallies |= {number: one.tally for number, one in finished.items()}
            poll({number: tallies[number] for number in tallies if number in waiting})
        if not ordered:
            turns = deque(pending.values())
            while finished:
                yield finished.popitem()[1]
        while turns and turns[0] in finished:
            yield finished.pop(turns.popleft())


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[ResultT]):
    """What came of a task."""

    number: int
    result: ResultT
    tally: Mapping[str, Any]
    """Its last report, with the storage calls that it tried again."""


class _Board:
    """Progress of tasks under way; losing it loses only the look of the bar."""

    def __init__(self) -> None:
        self._tallies: dict[int, Mapping[str, Any]] = {}

    def report(self, number: int, tally: Mapping[str, Any]) -> None:
        self._tallies[number] = tally
        if len(self._tallies) > _BOARD_SIZE:
            del self._tallies[min(self._tallies)]

    def tallies(self) -> dict[int, Mapping[str, Any]]:
        return self._tallies


def _refuse_dead_end(address: str) -> None:
    """Ray would try for minutes to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise OSError(
            f"cannot use the cluster at RAY_ADDRESS={address} ({error}); unset "
            "RAY_ADDRESS to start Ray here"
        ) from error


def _set_environment(*, local: bool) -> None:
    """Settings that Ray reads from the environment alone, once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would try for ever, without a word, what does not fit into memory.
    os.environ.setdefault("RAY_task_oom_retries", str(_ATTEMPTS - 1))
    # Otherwise Ray starts workers before it answers, and never does if one is killed.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if local:
        # Seconds between looks at log files that nobody is shown, and milliseconds
        # between figures of a dashboard that is not there: by default 3 % of a core.
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "10")
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "30000")
    imported = "ray" in sys.modules
    if local and not imported and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface, so it needs a token. Given none, it would
        # leave one in the home directory that later clusters pick up unasked.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _run_task(
    function: Callable[[Work, Any, Report], ResultT],
    work: Work,
    item: Any,
    number: int,
    board: Any,
) -> Finished[ResultT]:
    last, told = 0.0, {}
    before = Counter(retried())

    def report(tally: Mapping[str, Any]) -> None:
        nonlocal last, told
        told = dict(tally)
        if board is not None and time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            board.report.remote(number, with_storage(told))

    def with_storage(tally: Mapping[str, Any]) -> dict[str, Any]:
        # A process runs one task at a time.
        storage = Counter(retried()) - before
        return {**tally, "retried": dict(Counter(tally.get("retried", {})) + storage)}

    result = function(work, item, report)
    return Finished(number=number, result=result, tally=with_storage(told))


def _window(workers: int | None) -> int:
    """Ranges under way at most."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    if os.environ.get("RAY_ADDRESS"):
        return workers or 2 * cpus + _WAITING_TASKS
    return 2 * (workers or cpus)


def _tallies(board: Any) -> Mapping[int, Mapping[str, Any]]:
    import ray

    try:
        return ray.get(board.tallies.remote(), timeout=_POLL_SECONDS)
    except (ray.exceptions.RayError, TimeoutError):
        return {}


def _result(reference: ray.ObjectRef) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # What the task raised says more than the trace of how it got here.
        cause = error.cause
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from error
        told = isinstance(cause, (OSError, ValueError, RuntimeError))
        line = " ".join(str(cause).split()) if told else f"a task raised {cause!r}"
        raise OSError(line) from error
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray lost a task for good ({_first_line(error)}); run the same command "
            "again to continue"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
