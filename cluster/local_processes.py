"""Which processes belong to a folder of the local cluster, and ending them.

Owns the mark in the environment by which they are known. Does not own when they end
(`cluster.local_node`, `cluster.local_lifecycle`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "PALIMPSEST_LOCAL_NODE"
"""Names the node's folder in the environment of everything that runs on the node."""
_TITLES = ("ray::", "ray-")
_PATIENCE_S = 30.0
_PAUSE_S = 0.05


def members(folder: Path) -> list[psutil.Process]:
    """Processes of the cluster or node whose folder this is, but this one and those
    that it descends from.

    A process is one of them if it was started with the mark, or, because processes of
    Ray write their titles over their environment, if it has such a title and writes to
    a file below the folder; so are those that descend from it, unless another node's
    mark is on them: the autoscaler, on the head, starts the other nodes.
    """
    running = {process.pid: process for process in psutil.process_iter()}
    marks = {pid: _mark(process) for pid, process in running.items()}
    found = {
        pid
        for pid, process in running.items()
        if _is_below(marks[pid], folder) or _writes_below(process, folder)
    }
    parents = {pid: _parent(process) for pid, process in running.items()}
    while more := {
        pid
        for pid, parent in parents.items()
        if parent in found and pid not in found and not marks[pid]
    }:
        found |= more
    own = psutil.Process()
    found -= {process.pid for process in (own, *own.parents())}
    return [running[pid] for pid in found if runs(running[pid])]


def end_members(folder: Path) -> int:
    """SIGKILL every process of `folder` until there is none; how many there were.

    Raises:
        OSError: some do not end (they wait for a device, or are another user's).
    """
    ended: set[psutil.Process] = set()
    deadline = time.monotonic() + _PATIENCE_S
    # One that is ending has no files and no environment any more to be known by.
    while left := {*members(folder), *filter(runs, ended)}:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                ended.add(process)
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise OSError(f"processes that do not end: {pids}; see them with ps")
        time.sleep(_PAUSE_S)
    return len(ended)


def began(process: psutil.Process) -> float:
    """Seconds from this machine's start to the process's: unlike a time of day they
    stay what they are when somebody sets the clock.
    """
    return round(process.create_time() - psutil.boot_time(), 2)


def same_process(pid: int, started: float) -> psutil.Process | None:
    """The process `pid` that `began` at `started`, if it still runs."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if began(process) == started and runs(process):
            return process
    return None


def runs(process: psutil.Process) -> bool:
    """Whether it has neither gone nor ended unreaped."""
    with suppress(psutil.Error):
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _mark(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.environ().get(MARK, ""))
    return ""


def _parent(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.ppid())
    return 0


def _writes_below(process: psutil.Process, folder: Path) -> bool:
    # A driver outside the cluster writes logs there too, and is nobody's to end.
    with suppress(psutil.Error):
        title = "".join(process.cmdline()[:1])
        return title.startswith(_TITLES) and any(
            _is_below(file.path, folder) and file.mode[0] in "wa"
            for file in process.open_files()
        )
    return False


def _is_below(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}/")
