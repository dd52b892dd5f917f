"""One node's part of an attempt to train: the `deepspeed` launcher, watched.

Owns the actor that starts the launcher on its node under a guard, and answers what has
become of it. Does not own ending its tree (`cluster.guard`), where actors run
(`cluster.demand`) or what they are told (`cluster.elastic`).

What of the launcher decides the words here (DeepSpeed 0.19): without a hostfile it
runs one node in silence; without --master_addr it calls ssh; with --no_ssh each node
starts its own ranks; and it sets CUDA_VISIBLE_DEVICES to the node's slots itself.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.guard import STOP

ROOT = Path(__file__).resolve().parents[1]
# Below the ports that Linux hands out, above those of Ray's workers.
_PORTS = range(20_000, 32_000)
_LONGEST_LOG = 1 << 16
_END_S = 30.0
# Of the driver's job or of Ray, and wrong for a rank.
_NOT_FOR_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port(address: str) -> int:
    """A port that nobody listens on at an address of this machine; "": at any."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return port


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a runner starts."""

    node: int
    """Rank of this node."""
    nodes: int
    ranks: int
    """On each node."""
    own: str
    """Address of this node."""
    first: str
    """Address of node 0."""
    port: int
    """Free on node 0."""
    words: tuple[str, ...]
    """Arguments of trainer.pretrain."""
    log: str
    """File for the output of launcher and ranks, made if need be."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class State:
    """What has become of a launch."""

    status: int | None
    """Exit status of the launcher, or 128 and a signal; None while it runs."""
    ended: float | None
    """When that was seen, in seconds since 1970 by the node's clock."""
    said: str
    """What was said since the last answer, the oldest left out where it is much."""


class Runner:
    """Ray actor. Its methods do not wait, but for `kill`."""

    def __init__(self) -> None:
        self._guard: subprocess.Popen[bytes] | None = None
        self._log = self._hosts = Path()
        self._offset = 0
        self._ended: float | None = None

    def node(self) -> str:
        """Id of the node that this runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def free_port(self, address: str) -> int:
        """As `free_port`, on this node."""
        return free_port(address)

    def start(self, launch: Launch) -> str:
        """Start the launcher; the log file as this node knows it.

        Raises:
            ValueError: this node does not see the run's directory.
            OSError: there is no place for the log.
        """
        self._log = Path(launch.log)
        # The driver has made it: below the run's directory, unless that is a URL.
        if not self._log.parent.parent.is_dir():
            raise ValueError(
                f"node {launch.own} does not see {self._log.parent.parent}, so its "
                "checkpoints would be lost to the others: give as `output` a folder "
                "that all nodes share, or a URL such as s3://bucket/run"
            )
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._hosts = self._log.with_suffix(".hosts")
        self._hosts.write_text(hostfile(launch))
        self._guard = subprocess.Popen(
            command(launch, hosts=self._hosts),
            env=environment(launch),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return f"{socket.gethostname()}:{self._log}"

    def state(self) -> State:
        """What has become of it, and what it has said since the last call."""
        # Before the log is read: its last words are to be in this answer.
        status = self._guard.poll() if self._guard else None
        if status is not None and self._ended is None:
            self._ended = time.time()
            self._hosts.unlink(missing_ok=True)
        if status is not None and status < 0:
            status = 128 - status
        return State(status=status, ended=self._ended, said=self._said())

    def stop(self) -> None:
        """Ask the ranks to stop after their step and save."""
        if self._guard and self._guard.stdin:
            with suppress(OSError):
                self._guard.stdin.write(STOP)
                self._guard.stdin.flush()

    def kill(self) -> bool:
        """End the process tree; whether it has ended."""
        if not self._guard or not self._guard.stdin:
            return True
        with suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            return False
        self._hosts.unlink(missing_ok=True)
        return True

    def _said(self) -> str:
        try:
            with open(self._log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._offset, size - _LONGEST_LOG))
                found = file.read(_LONGEST_LOG)
                self._offset = file.tell()
        except OSError:
            return ""
        return found.decode(errors="replace")


def command(launch: Launch, *, hosts: Path) -> list[str]:
    """The guarded launcher of one node."""
    guard = [sys.executable, "-m", "cluster.guard", "--log", launch.log, "--"]
    deepspeed = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_ssh",
        "--quiet",
        f"--hostfile={hosts}",
        f"--node_rank={launch.node}",
        f"--master_addr={launch.first}",
        f"--master_port={launch.port}",
        "--module",
        "trainer.pretrain",
    ]
    return [*guard, *deepspeed, *launch.words]


def hostfile(launch: Launch) -> str:
    """Names are only told apart, never looked up; nodes of one host share theirs."""
    lines = [f"node-{number} slots={launch.ranks}" for number in range(launch.nodes)]
    return "\n".join(lines) + "\n"


def environment(launch: Launch) -> dict[str, str]:
    """Of the launcher and its ranks."""
    found = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_RANKS}
    # Ray gives an actor its CPUs as threads; ranks share them.
    found["OMP_NUM_THREADS"] = "1"
    path = [str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    found["PYTHONPATH"] = os.pathsep.join(path)
    if name := interface(launch.own):
        # Gloo would look up the host's name, which nodes may not know or share.
        found.setdefault("GLOO_SOCKET_IFNAME", name)
    return found | dict(launch.environment)


def interface(address: str) -> str | None:
    """Network interface of this node that has an address."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            return name
    return None
