"""A tree of processes that is hard to end: `trees.py PIDS`.

A launcher with a rank that has a child, a child in a session of its own, and a daemon
whose parent is gone. Each appends `name pid` to PIDS.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def started(pids: Path) -> dict[str, psutil.Process]:
    """Processes of a tree by name, as far as they have said so and run."""
    found = {}
    for line in pids.read_text().splitlines() if pids.exists() else []:
        name, pid = line.split()
        # It may end while we look.
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE:
                found[name] = process
    return found


def _say(name: str, pids: str) -> None:
    with open(pids, "a") as file:
        file.write(f"{name} {os.getpid()}\n")


def _spawn(name: str, pids: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, pids, name]
    return subprocess.Popen(command, **options)  # type: ignore[call-overload]


def _run(name: str, pids: str) -> int:
    if name == "rank":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if name == "reader":
        signal.signal(signal.SIGTERM, lambda *_: _say("signalled", pids))
    _say(name, pids)
    if name == "launcher":
        environment = {**os.environ, "LOCAL_RANK": "0"}
        rank = _spawn("rank", pids, env=environment)
        _spawn("session", pids, start_new_session=True)
        _spawn("middle", pids, start_new_session=True)
        return rank.wait()
    if name == "rank":
        _spawn("reader", pids, env=os.environ)
    if name == "middle":
        _spawn("daemon", pids, start_new_session=True)
        return 0
    while True:
        time.sleep(60)


if __name__ == "__main__":
    sys.exit(_run(*[*sys.argv[2:], "launcher"][:1], sys.argv[1]))
