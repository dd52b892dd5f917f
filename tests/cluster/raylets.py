"""A cluster of raylets on this machine whose nodes a test starts and kills itself.

Without an autoscaler: nodes come and go when a test says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT, free_port

RAY = Path(sys.executable).with_name("ray")
LIMIT_S = 240
_HEAD_STARTS = 3
_STARTED = "Ray runtime started."
_PACED = Path(__file__).with_name("paced")
_OBSERVER = """
import json, os, sys, ray, ray.util
answers = os.fdopen(os.dup(1), "w")
# Ray prints what becomes of nodes.
os.dup2(2, 1)
ray.init(log_to_driver=False, logging_level="ERROR")
for line in sys.stdin:
    print(json.dumps(eval(line)), file=answers, flush=True)
"""
# A raylet that is killed is given up after some seconds, not a minute. One that is slow
# to answer is alive all the same.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "4",
}


def wait_until(reached: Callable[[], Any], said: Callable[[], object] = str) -> Any:
    """Wait for something, and give what it returned; fails with what was `said`."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := reached()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)
    return found


def end_all(processes: list[psutil.Process]) -> None:
    """SIGKILL some processes and all that they have started."""
    tree = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += process.children(recursive=True)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=30)


class Node:
    """`ray start --block` and the processes of its node."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.id = ""

    @property
    def ended(self) -> bool:
        """Whether `ray start` has ended, and its node with it."""
        return self._process.poll() is not None

    @property
    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def raylet(self) -> psutil.Process:
        """The node's raylet itself."""
        (found,) = [
            process
            for process in self.processes
            if Path("".join(process.cmdline()[:1])).name == "raylet"
        ]
        return found

    def kill(self) -> None:
        """SIGKILL the raylet, as the loss of a node would; its workers see to
        themselves.
        """
        self.raylet().kill()

    def end(self) -> None:
        """End what is left of it."""
        end_all(self.processes)
        self._process.wait()


class Raylets:
    """A head without CPUs or GPUs, and nodes for training."""

    def __init__(self, folder: Path, pace: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            **_HEALTH,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "PACE": str(pace),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{_PACED}",
        }
        self._log = open(folder / "start.log", "w")  # noqa: SIM115
        self.nodes: list[Node] = []
        self._observer: subprocess.Popen[str] | None = None
        self._start_head()

    def add(self, size: int = 1, *, kind: str = "gpu") -> Node:
        """Start a node, for training by default, and wait until the cluster knows it.
        One of a larger `size` looks like several to who does not ask for their names.
        """
        # The head is among them.
        before = wait_until(self.alive, self._said)
        resources = json.dumps({f"{kind}_node": size})
        gpus = size if kind == "gpu" else 0
        amounts = (f"--num-cpus={size}", f"--num-gpus={gpus}")
        words = (*amounts, f"--resources={resources}")
        node = self._start(f"--address={self.address}", *words)
        new = wait_until(lambda: self.alive() - before, self._said)
        (node.id,) = new
        return node

    def alive(self) -> set[str]:
        """Ids of all nodes that are alive, the head among them."""
        return set(self.ask("[n['NodeID'] for n in ray.nodes() if n['Alive']]") or ())

    def groups(self) -> dict[str, str]:
        """State of each placement group that is not removed."""
        table = "ray.util.placement_group_table()"
        found = self.ask(f"{{k: v['state'] for k, v in {table}.items()}}") or {}
        return {key: state for key, state in found.items() if state != "REMOVED"}

    def drive(self, code: str) -> subprocess.Popen[str]:
        """Start a driver that runs `code`; its output is one text."""
        return subprocess.Popen(
            [sys.executable, "-uc", code],
            env={**self.environment, "RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, expression: str) -> Any:
        """Value of an expression of `ray` in a driver that is there for that."""
        if self._observer is None or self._observer.poll() is not None:
            self._observer = subprocess.Popen(
                [sys.executable, "-c", _OBSERVER],
                env={**self.environment, "RAY_ADDRESS": self.address},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        assert self._observer.stdin
        assert self._observer.stdout
        with contextlib.suppress(BrokenPipeError):
            self._observer.stdin.write(expression + "\n")
            self._observer.stdin.flush()
        line = self._observer.stdout.readline()
        return json.loads(line) if line else None

    def runners(self) -> list[psutil.Process]:
        """Runners, on whatever node."""
        found = []
        for process in (one for node in self.nodes for one in node.processes):
            with contextlib.suppress(psutil.Error):
                if "ray::Runner" in "".join(process.cmdline()):
                    found.append(process)
        return found

    def drain(self, node: Node, *, seconds: int) -> None:
        """Give a node notice."""
        words = {
            "address": self.address,
            "node-id": node.id,
            "reason": "DRAIN_NODE_REASON_PREEMPTION",
            "reason-message": "the test takes it away",
            "deadline-remaining-seconds": seconds,
        }
        flags = [f"--{name}={value}" for name, value in words.items()]
        subprocess.run(
            [str(RAY), "drain-node", *flags],
            env=self.environment,
            capture_output=True,
            check=True,
        )

    def close(self) -> None:
        """End every process of the cluster."""
        if self._observer:
            self._observer.kill()
            self._observer.communicate()
        for node in reversed(self.nodes):
            node.end()
        self._log.close()

    def _start_head(self) -> None:
        """Start the head. What makes it end instead is not what is tested: somebody
        took its port first, or the machine was too busy for it to be in time.
        """
        # Left alone, it listens at fixed ports, which another head may hold.
        others = ("ray-client-server-port", "dashboard-port", "metrics-export-port")
        for _ in range(_HEAD_STARTS):
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            ports = (f"--port={port}", *(f"--{name}={free_port()}" for name in others))
            head = self._start("--head", "--num-cpus=0", "--num-gpus=0", *ports)
            # Before, a driver would wait for minutes, and in vain for one that ends.
            wait_until(lambda head=head: head.ended or _STARTED in self._said())
            if not head.ended:
                wait_until(self.alive, self._said)
                return
            head.end()
        raise AssertionError(self._said())

    def _start(self, *words: str) -> Node:
        ports = ("--min-worker-port=0", "--max-worker-port=0")
        agent = "--dashboard-agent-listen-port=0"
        address = "--node-ip-address=127.0.0.1"
        quiet = ("--include-dashboard=false",) if "--head" in words else ()
        process = subprocess.Popen(
            [str(RAY), "start", "--block", *words, *ports, agent, address, *quiet],
            env=self.environment,
            stdout=self._log,
            stderr=self._log,
            cwd=ROOT,
            start_new_session=True,
        )
        node = Node(process)
        self.nodes.append(node)
        return node

    def _said(self) -> str:
        return (self.folder / "start.log").read_text()


@contextlib.contextmanager
def raylets(pace: Path, nodes: int) -> Iterator[Raylets]:
    """A cluster with so many nodes for training; nothing of it is left afterwards."""
    # Not below pytest's folder: a Unix socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    cluster = Raylets(folder, pace)
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`python -m cluster.pretrain` on a cluster, in a session of its own."""

    def __init__(self, cluster: Raylets, config: Path) -> None:
        self._log = config.with_name(f"driver-{secrets.token_hex(4)}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.pretrain", f"--config={config}"],
                env={**cluster.environment, "RAY_ADDRESS": cluster.address},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        """Everything that it has printed."""
        return self._log.read_text()

    def reaches(self, reached: Callable[[], Any]) -> Any:
        """Wait for something that it does; fails if it ends before."""

        def looked() -> Any:
            found = reached()
            assert found or self.process.poll() is None, self.said()
            return found

        return wait_until(looked, self.said)

    def ends(self) -> int:
        """Wait for its end; its exit status."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
