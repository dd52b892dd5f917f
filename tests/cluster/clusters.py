"""What tests of `cluster` share: a local autoscaling cluster, and ways to hurt it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster import local_processes, local_status
from cluster.local_cluster import Cluster, find
from cluster.namespaces import Network
from tests.conftest import ROOT

NAME = "t"
_POLL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class SeenNode:
    """A node of the cluster. Ray's name of it (`NodeName`) is its id."""

    id: str
    type: str
    address: str
    ready: bool
    """It has joined the cluster."""
    keeper: int | None
    raylet: int | None
    """None while it starts and once it has ended."""
    pids: list[int]


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """A cluster that `local_cluster()` has started."""

    cluster: Cluster
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.cluster.folder

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver: this process's, and where the cluster is."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        found = {**kept, "OMP_NUM_THREADS": "1", **self.cluster.environment}
        # Tests read lines while a command goes on.
        found["PYTHONUNBUFFERED"] = "1"
        found["PYTHONPATH"] = str(ROOT)
        return found

    def nodes(self, kind: str | None = None) -> list[SeenNode]:
        """Nodes that are listed, the head first; of type `kind`, if it is given."""
        rows = local_status.describe(self.cluster)["nodes"]
        return [SeenNode(**row) for row in rows if kind in (None, row["type"])]

    def processes(self, node_id: str | None = None) -> list[psutil.Process]:
        """Everything that runs on a node, or on the whole cluster."""
        return local_processes.members(
            self.folder / node_id if node_id else self.folder
        )

    def wait_for_end(self, processes: Iterable[psutil.Process]) -> None:
        """Wait until none of them runs."""
        self.wait_until(
            lambda: not any(map(local_processes.runs, processes)), f"ended {processes}"
        )

    def run(self, *words: str | Path, **options: Any) -> Any:
        """Run a command with the head's network; stdout and stderr as one text."""
        return subprocess.run(
            self.words(*words),
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            **options,
        )

    def python(self, code: str, **options: Any) -> Any:
        """Run `code` as a driver on the head; see `run`."""
        return self.run(sys.executable, "-c", code, **options)

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command with the head's network; it ends with the cluster."""
        process = subprocess.Popen(
            self.words(*words),
            cwd=ROOT,
            env=self.environment,
            text=True,
            start_new_session=True,
            **options,
        )
        self.started.append(process)
        return process

    def words(self, *words: str | Path) -> list[str]:
        """A command, with what runs it with the head's network."""
        return [*self.cluster.within, *map(str, words)]

    def wait_for(self, counts: Mapping[str, int], seconds: float = 300) -> None:
        """Wait until just so many worker nodes of each type have joined."""
        self.wait_until(lambda: self.counts() == dict(counts), str(counts), seconds)

    def counts(self) -> dict[str, int]:
        """Worker nodes that have joined, by type; none of a type is left out."""
        found: dict[str, int] = {}
        for node in self.nodes():
            if node.type != "head" and node.ready and node.raylet:
                found[node.type] = found.get(node.type, 0) + 1
        return found

    def wait_until(self, true: Any, what: str, seconds: float = 300) -> None:
        """Wait until `true()`; fail with `what` after a generous time."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not so: {what}; {self.nodes()}"
            time.sleep(_POLL_S)

    def kill_node(self, node_id: str) -> SeenNode:
        """SIGKILL the raylet of a node."""
        (node,) = (node for node in self.nodes() if node.id == node_id)
        assert node.raylet, f"{node_id} has no raylet"
        os.kill(node.raylet, signal.SIGKILL)
        return node

    def cut_off(self, node_id: str) -> None:
        """Let nothing through between a node and the others (with `--namespaces`)."""
        Network(folder=self.folder).cut_off(node_id)

    def reconnect(self, node_id: str) -> None:
        """Take back `cut_off`; the node may be gone by then, which is an OSError."""
        Network(folder=self.folder).reconnect(node_id)


def no_namespaces() -> str | None:
    """Why this environment has no network namespaces; None if it has."""
    network = Network(folder=Path(tempfile.gettempdir()) / f"pc-try-{os.getpid()}")
    try:
        network.create()
        network.remove()
    except OSError as error:
        return str(error)
    return None


@contextlib.contextmanager
def local_cluster(
    *,
    cpu_nodes: int = 0,
    gpu_nodes: int = 0,
    idle_seconds: float = 5,
    flags: tuple[str, ...] = (),
) -> Iterator[LocalCluster]:
    """A cluster of its own, started by the real command; ends whatever happens."""
    state = tempfile.mkdtemp(prefix="pc-", dir="/tmp")
    command = [sys.executable, "-m", "cluster.local"]
    where = [f"--state={state}", f"--name={NAME}"]
    up = [
        f"--cpu-nodes={cpu_nodes}",
        f"--gpu-nodes={gpu_nodes}",
        f"--idle-seconds={idle_seconds}",
        "--start-seconds=300",
    ]
    started: list[subprocess.Popen[str]] = []
    try:
        subprocess.run([*command, "up", *where, *up, *flags], cwd=ROOT, check=True)
        cluster = find(Path(state) / NAME)
        assert cluster
        yield LocalCluster(cluster=cluster, started=started)
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([*command, "down", *where], cwd=ROOT, check=True)
        shutil.rmtree(state)
