"""Starting and ending a local cluster.

Owns that one process at a time does it, what this machine must have, and that nothing
is left. Does not own the head's start (`cluster.local_head`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from cluster import local_processes
from cluster.local_cluster import TOKEN, Cluster, find
from cluster.local_head import Tell, start_head
from cluster.local_options import LocalConfig, where
from cluster.namespaces import Network

_MB = 1_000_000
# Measured: a head 650 MB, a worker node with one worker that does nothing 280.
_HEAD_MB, _NODE_MB = 800, 350


def up(config: LocalConfig, *, tell: Tell) -> Cluster:
    """Start a cluster, unless it is up; returns when its head takes jobs.

    Raises:
        ValueError: it is up with other keys.
        OSError: this machine has not what it takes, or the head does not start.
    """
    folder = config.folder
    with _alone(folder):
        if there := find(folder):
            _same(there, config)
            tell(f"{config.name} is up already")
            return there
        if folder.exists() and _is_cluster(folder):
            tell(f"clearing away what a dead cluster has left in {folder}")
        # Processes and networks may be left where somebody has removed the folder.
        _clear(folder)
        _check_machine(config)
        try:
            with _signals_raised():
                return start_head(config, tell)
        except BaseException:
            _clear(folder)
            raise


def down(folder: Path, *, tell: Tell) -> None:
    """End a cluster, dead or alive, with everything that runs on it.

    Raises:
        OSError: some processes do not end.
    """
    with _alone(folder):
        there = folder.exists()
        # Processes may be left of a cluster whose folder somebody has removed.
        ended = _clear(folder)
        if there or ended:
            tell(f"{folder.name} is down: ended {ended} processes")
        else:
            tell(f"no cluster at {folder}")


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is begun here as Ctrl-C does: by an exception."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else starts or ends this cluster meanwhile."""
    state = folder.parent
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Below a temp dir anybody can make a folder of this name before its owner does.
    if {state.lstat().st_uid, state.stat().st_uid} != {os.getuid()}:
        raise OSError(f"{state} belongs to another user: give your own --state")
    with (state / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _same(there: Cluster, config: LocalConfig) -> None:
    wanted = config.kept
    other = [key for key in wanted if there.config.get(key) != wanted[key]]
    if other:
        had = ", ".join(f"--{key}={there.config.get(key)}" for key in other)
        raise ValueError(
            f"{config.name} is up already with {had}: end it first (python -m "
            f"cluster.local down{where(config.folder)}), or start another with --name"
        )


def _check_machine(config: LocalConfig) -> None:
    if not Path("/proc/self/environ").exists():
        raise OSError("the local cluster needs Linux (in WSL 2 or a container, say)")
    free = psutil.virtual_memory().available / _MB
    needed = _HEAD_MB + (config.most_nodes - 1) * (_NODE_MB + config.object_store_mb)
    if free < needed:
        raise OSError(
            f"{free:.0f} MB of memory are free and {config.most_nodes - 1} worker "
            f"nodes can take {needed}: ask for fewer (--cpu-nodes, --gpu-nodes) or "
            "end something else"
        )


def _clear(folder: Path) -> int:
    """End everything of a cluster and remove its folder; how many processes ended.

    Raises:
        OSError: some do not end, or the folder is something else.
    """
    if folder.exists() and not _is_cluster(folder):
        raise OSError(
            f"{folder} is there and is no cluster's: give another --state or --name"
        )
    ended = local_processes.end_members(folder)
    Network(folder=folder).remove()
    # The mark goes last: who is killed meanwhile leaves a folder that can be cleared.
    for path in folder.glob("*"):
        if path.name != TOKEN and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != TOKEN:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def _is_cluster(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / TOKEN).exists() or not any(folder.iterdir())
