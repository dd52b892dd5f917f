"""A node of the local cluster: a folder with its record, and a keeper process.

Owns the record, the command line and environment of the node's raylet, and the keeper,
which starts the raylet and ends everything on the node when the raylet ends in whatever
way. Does not own which nodes there are (`cluster.local_provider`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cluster.local_processes import MARK, began, end_members, runs, same_process

ROOT = Path(__file__).parents[1]
HEAD = "head"
READY = "ready"
"""A file in the folder of a node that has joined the cluster."""
_RECORD = "node.json"
_LOG = "keeper.log"
_PR_SET_CHILD_SUBREAPER = 36
_END_S = 5.0
_POLL_S = 0.2
_PAUSE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Node:
    """What is written down of a node."""

    id: str
    type: str
    """head, cpu or gpu."""
    address: str
    """Its IP address."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of Ray's node provider."""
    pid: int | None = None
    """Of its keeper; None until that is started."""
    started: float | None = None
    """When the keeper `began`, which tells it from a later process of its pid."""


def write(folder: Path, node: Node) -> None:
    """Write a node of the cluster at `folder` down."""
    (folder / node.id).mkdir(mode=0o700, exist_ok=True)
    path = folder / node.id / _RECORD
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(node)))
    part.replace(path)


def nodes(folder: Path) -> list[Node]:
    """Nodes of the cluster at `folder`, whether they live or not, the head first."""
    found = []
    for path in folder.glob(f"*/{_RECORD}"):
        with suppress(OSError, ValueError):
            found.append(Node(**json.loads(path.read_text())))
    return sorted(found, key=lambda node: (node.type != HEAD, node.type, node.id))


def keeper(node: Node) -> psutil.Process | None:
    """The node's keeper, None if it is not started or has ended."""
    if node.pid is None or node.started is None:
        return None
    return same_process(node.pid, node.started)


def start(
    folder: Path,
    node: Node,
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    within: Sequence[str] = (),
) -> tuple[Node, subprocess.Popen[bytes]]:
    """Start the keeper of a node that is written down, and write down its pid.

    Args:
        folder: of the cluster.
        node: the node.
        words: arguments of `ray start`.
        environment: variables beside those of every process of a node.
        within: words in front of the command, which run it in a network namespace.
    """
    ray = Path(sys.executable).with_name("ray")
    home = folder / node.id
    with (home / _LOG).open("ab") as log:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "cluster.local_node", str(ray), *words],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**_inherited(), **environment, MARK: str(home)}
            | {"RAY_CLOUD_INSTANCE_ID": node.id, "RAY_NODE_TYPE_NAME": node.type},
            start_new_session=True,
        )
    started = began(psutil.Process(process.pid))
    node = dataclasses.replace(node, pid=process.pid, started=started)
    write(folder, node)
    return node, process


def ray_start_words(
    folder: Path, node: Node, resources: Mapping[str, Any]
) -> list[str]:
    """Arguments of `ray start` that every node has; ports are whatever is free."""
    custom = {
        name: amount
        for name, amount in resources.items()
        if name not in ("CPU", "GPU", "memory", "object_store_memory")
    }
    return [
        "start",
        f"--node-ip-address={node.address}",
        f"--node-name={node.id}",
        # Of its own: raylets that start at the same time race for names of sockets.
        f"--temp-dir={folder / node.id}",
        f"--num-cpus={int(resources.get('CPU', 0))}",
        f"--num-gpus={int(resources.get('GPU', 0))}",
        f"--object-store-memory={int(resources['object_store_memory'])}",
        f"--resources={json.dumps(custom)}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    ]


def end(folder: Path, node: Node) -> None:
    """End everything on a node, and forget it but for its logs, in FOLDER/logs.

    Raises:
        OSError: some processes do not end.
    """
    if process := keeper(node):
        with suppress(psutil.Error):
            process.terminate()
            process.wait(_END_S)
    home = folder / node.id
    end_members(home)
    for logs in home.glob("session_2*/logs"):
        with suppress(OSError):
            kept = folder / "logs"
            kept.mkdir(exist_ok=True)
            (home / _LOG).replace(logs / _LOG)
            logs.rename(kept / node.id)
    shutil.rmtree(home, ignore_errors=True)


def last_words(home: Path, lines: int = 5) -> str:
    """The end of what the keeper of a node and `ray start` have said."""
    with suppress(OSError):
        return "\n".join((home / _LOG).read_text().strip().splitlines()[-lines:])
    return ""


def keep(command: Sequence[str]) -> int:
    """Start a node by `command`, wait until its raylet ends, end what it leaves."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl: Linux 3.4 or later is needed")
    signal.signal(signal.SIGTERM, _stop)
    try:
        _follow(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    except _Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_descendants()
    return 0


def _follow(starting: subprocess.Popen[bytes]) -> None:
    """Return when the raylet, or what was to start it, has ended."""
    raylet: psutil.Process | None = None
    while (status := starting.poll()) is None:
        # It may be killed while its starter still waits for it, and waits on.
        raylet = raylet or _raylet()
        if raylet and not runs(raylet):
            print("the raylet has ended while it started", flush=True)
            return
        time.sleep(_POLL_S)
    raylet = raylet or _raylet()
    if status or not raylet:
        print(f"no raylet: ray start has ended with {status}", flush=True)
        return
    # Its starter has ended, so that it is this process's child now.
    Path(READY).touch()
    with suppress(ChildProcessError):
        while os.wait()[0] != raylet.pid:
            pass
    print("the raylet has ended", flush=True)


def _raylet() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name() == "raylet":
                return process
    return None


class _Stopped(Exception):
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _end_descendants() -> None:
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(_PAUSE_S)


def _inherited() -> dict[str, str]:
    """This process's environment without what would lead Ray elsewhere, and with the
    commands of this Python and this source first."""
    kept = {
        name: value
        for name, value in os.environ.items()
        # The GPUs of a node are logical: those that are visible here say nothing.
        if not name.startswith("RAY_") and name not in ("CUDA_VISIBLE_DEVICES", MARK)
    }
    bin_folder = str(Path(sys.executable).parent)
    kept["PATH"] = f"{bin_folder}:{kept.get('PATH', os.defpath)}"
    kept["PYTHONPATH"] = ":".join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
