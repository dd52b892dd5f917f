"""Nothing of a command's tree is left, whoever of those around it is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.guard import ORPHANED, STOP
from tests.cluster import trees
from tests.conftest import ROOT

TREE = ("launcher", "rank", "reader", "session", "daemon")
LIMIT_S = 240


def wait_until(reached: Callable[[], bool], said: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def start(log: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster.guard", "--log", str(log), "--"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pids"
    yield path
    for process in trees.started(path).values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def grown(pids: Path) -> bool:
    return set(TREE) <= set(trees.started(pids))


def gone(pids: Path) -> bool:
    return not trees.started(pids)


def guarded_tree(tmp_path: Path, pids: Path) -> subprocess.Popen[bytes]:
    guard = start(tmp_path / "log", sys.executable, Path(trees.__file__), pids)
    wait_until(lambda: grown(pids), (tmp_path / "log").read_text)
    return guard


def test_the_status_and_the_output_are_those_of_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    say = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert start(log, sys.executable, "-c", say).wait(LIMIT_S) == 3
    assert set(log.read_text().split()) == {"out", "err"}
    die = "import os; os.kill(os.getpid(), 9)"
    assert start(log, sys.executable, "-c", die).wait(LIMIT_S) == 137
    assert start(log, tmp_path / "nothing").wait(LIMIT_S) == 127
    assert "cannot start" in log.read_text()


def test_the_end_of_the_line_ends_the_tree(tmp_path: Path, pids: Path) -> None:
    guard = guarded_tree(tmp_path, pids)
    assert guard.stdin
    guard.stdin.close()
    assert guard.wait(LIMIT_S) == ORPHANED
    assert gone(pids)


def test_a_starter_that_is_killed_takes_the_tree_along(
    tmp_path: Path, pids: Path
) -> None:
    log = str(tmp_path / "log")
    command = [sys.executable, "-m", "cluster.guard", "--log", log, "--"]
    command += [sys.executable, trees.__file__, str(pids)]
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\n"
            "guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)\n"
            "guard.wait()",
            *command,
        ],
        cwd=ROOT,
    )
    wait_until(lambda: grown(pids))
    (outer,) = psutil.Process(starter.pid).children()
    starter.kill()
    starter.wait()
    wait_until(lambda: gone(pids))
    wait_until(lambda: not outer.is_running())


@pytest.mark.parametrize("inner", [False, True])
def test_a_guard_that_is_killed_takes_the_tree_along(
    inner: bool, tmp_path: Path, pids: Path
) -> None:
    guard = guarded_tree(tmp_path, pids)
    outer = psutil.Process(guard.pid)
    (child,) = outer.children()
    (child if inner else outer).kill()
    assert guard.wait(LIMIT_S) == (137 if inner else -signal.SIGKILL)
    wait_until(lambda: gone(pids) and not child.is_running())


def test_stop_asks_the_ranks_alone(tmp_path: Path, pids: Path) -> None:
    guard = guarded_tree(tmp_path, pids)
    assert guard.stdin
    guard.stdin.write(STOP)
    guard.stdin.flush()
    assert guard.wait(LIMIT_S) == 143, "the status of the rank, through its launcher"
    assert "signalled" not in pids.read_text(), "a child of a rank got the signal"
    assert gone(pids)


def test_a_command_that_leaves_processes_behind_has_not_succeeded(
    tmp_path: Path, pids: Path
) -> None:
    """As the launcher does whose launch.py is killed: it exits with 0."""
    leave = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, *sys.argv[1:], 'rank'])\n"
        # Until it has said so: it is ended right after this.
        "while not os.path.exists(sys.argv[2]) or not os.path.getsize(sys.argv[2]):\n"
        "    time.sleep(0.02)"
    )
    guard = start(
        tmp_path / "log", sys.executable, "-c", leave, trees.__file__, str(pids)
    )
    assert guard.wait(LIMIT_S) == ORPHANED
    assert "processes behind: ended them" in (tmp_path / "log").read_text()
    assert pids.read_text().startswith("rank ")
    assert gone(pids)
