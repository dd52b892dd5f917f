"""`python -m cluster.guard --log FILE -- COMMAND ...`: a command that outlives nobody.

Owns the process tree of one command: its output, asking its ranks to stop, and ending
all of it when whoever started the guard goes away. Does not own what the command is
(`cluster.runner`) or when it should stop (`cluster.elastic`).

Standard input is the line to the starter: the word `stop` asks the ranks to stop, and
its end, which comes however the starter dies, ends the tree at once.

There are two guards, one the child of the other, each held by a pipe that the other's
death closes: Ray kills the children of a worker that ends, and whoever is left clears
up. Both adopt orphans (PR_SET_CHILD_SUBREAPER), so that a process which left its group,
session or parent is still found.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

STOP = b"stop\n"
"""What the starter writes to have the ranks stop at the end of their step."""
ORPHANED = 128 + signal.SIGKILL
"""Status where the command ended with 0 and left processes behind."""
_USAGE = "usage: python -m cluster.guard --log FILE -- COMMAND ..."
_RANK = "LOCAL_RANK"
_PR_SET_CHILD_SUBREAPER = 36
_POLL_MS = 100
_PAUSE_S = 0.02


def main(argv: Sequence[str]) -> int:
    """Run the command of `argv`; its exit status, or 128 and the signal that ended it.

    Raises:
        OSError: the command or its log cannot be started or opened.
    """
    if len(argv) < 4 or argv[0] != "--log" or argv[2] != "--":
        print(_USAGE, file=sys.stderr)
        return 2
    log = os.open(argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _adopt_orphans()
    held, holding = os.pipe()
    inner = os.fork()
    if not inner:
        os.close(holding)
        _adopt_orphans()
        os._exit(_guarded(argv[3:], held))
    os.close(held)
    _, status = os.waitpid(inner, 0)
    # What the inner one has left, if it did not end as it should.
    end_tree()
    return _exit_status(status)


def end_tree() -> int:
    """SIGKILL every descendant of this process until none is left; how many."""
    ended: set[int] = set()
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE:
                    child.kill()
                    ended.add(child.pid)
        _reap()
        time.sleep(_PAUSE_S)
    return len(ended)


def ranks(tree: psutil.Process) -> list[psutil.Process]:
    """Processes below `tree` that a launcher started as ranks, not their children."""
    found = []
    for process in tree.children(recursive=True):
        with suppress(psutil.Error):
            parent = process.parent()
            # A child of `tree` itself may be what a rank that ended has left.
            if parent in (None, tree) or _RANK in parent.environ():
                continue
            if _RANK in process.environ():
                found.append(process)
    return found


def _guarded(words: Sequence[str], held: int) -> int:
    try:
        environment = {k: v for k, v in os.environ.items() if k != _RANK}
        command = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environment)
    except OSError as error:
        _tell(f"cannot start {words[0]}: {error}")
        return 127
    status = _watch(command.pid, held)
    left = end_tree()
    if status is None:
        _tell(f"whoever started this is gone: ended {left} processes")
        return ORPHANED
    if left:
        _tell(f"the command left {left} processes behind: ended them")
    return ORPHANED if left and not status else status


def _watch(pid: int, held: int) -> int | None:
    """Status of the command at its end; None if the starter or the other guard left."""
    lines = select.poll()
    for line in (0, held):
        lines.register(line, select.POLLIN | select.POLLHUP)
    stopping, asked = False, set[int]()
    while True:
        ended = _reap()
        if pid in ended:
            return _exit_status(ended[pid])
        for line, _ in lines.poll(_POLL_MS):
            if not (word := os.read(line, 64)):
                return None
            stopping |= STOP in word
        if stopping:
            _ask(asked)


def _ask(asked: set[int]) -> None:
    """SIGTERM to each rank, once: a second one would end it at once."""
    for rank in ranks(psutil.Process()):
        if rank.pid not in asked:
            asked.add(rank.pid)
            with suppress(psutil.Error):
                rank.terminate()


def _reap() -> dict[int, int]:
    """Wait status of each child that has ended."""
    ended = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}; Linux 3.4 is needed")


def _tell(text: str) -> None:
    # A disk that is full must not end the guard.
    with suppress(OSError):
        os.write(2, f"guard: {text}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
