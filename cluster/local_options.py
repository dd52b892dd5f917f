"""Every key of `cluster.local`.

Owns names, defaults, help texts and the checks that need no machine. Does not own what
is done with them (`cluster.local_lifecycle`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.namespaces import Network

# A Unix socket's path has 107 characters, and Ray puts its sockets at
# NODE/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store.
_SOCKET_PATH = 107
_BELOW = len(
    "/cpu-9999/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
)
_LEAST_STORE_MB = 80
_DEFAULT_NAME = "local"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def default_state() -> str:
    """Folder below the temp dir, one for each user."""
    return str(Path(tempfile.gettempdir()) / f"palimpsest-{os.getuid()}")


def where(folder: Path) -> str:
    """Flags, after a blank, that name the cluster at `folder`; none if it is the one
    that is meant without flags."""
    words = ""
    if folder.parent != Path(default_state()):
        words += f" --state {folder.parent}"
    if folder.name != _DEFAULT_NAME:
        words += f" --name {folder.name}"
    return words


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """An autoscaling cluster on this machine."""

    action: Literal["up", "down", "status"]
    """up: start it; down: end it, with everything that runs on it; status: its nodes
    and what waits for nodes."""
    cpu_nodes: int = 2
    """Most nodes of type cpu, which start when work needs them and end when idle."""
    gpu_nodes: int = 0
    """Most nodes of type gpu, likewise."""
    cpus_per_node: int = 1
    """CPUs that a worker node offers. They are logical: more than the machine has
    is slow, not wrong."""
    gpus_per_node: int = 1
    """GPUs that a gpu node offers. They are logical: no GPU is needed."""
    idle_seconds: float = 60
    """A worker node that has been idle for so long ends."""
    object_store_mb: int = 100
    """Shared memory of each node for objects, in MB; more goes to disk."""
    namespaces: bool = False
    """Give every node a network namespace and an address of its own, so that one can
    be cut off from the others (Linux, root, iproute2)."""
    dead_after_seconds: float | None = None
    """A node that has not answered for about so long is dead: by default 12 with
    namespaces, else 60. One whose raylet was killed is found sooner."""
    name: str = _DEFAULT_NAME
    """Name of the cluster; several can run side by side."""
    state: str | None = None
    """Folder of the clusters' state, with a short path; by default
    palimpsest-UID below the temp dir."""
    start_seconds: float = 120
    """How long the head may take to start."""
    json: bool = False
    """status: print JSON."""

    def __post_init__(self) -> None:
        for name, low in (
            ("cpu_nodes", 0),
            ("gpu_nodes", 0),
            ("cpus_per_node", 1),
            ("gpus_per_node", 1),
            ("idle_seconds", 0),
            ("object_store_mb", _LEAST_STORE_MB),
            ("start_seconds", 1),
        ):
            if not getattr(self, name) >= low:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: it must be {low} or more"
                )
        if self.cpu_nodes + self.gpu_nodes == 0:
            raise ValueError(
                "a cluster without worker nodes does nothing: give --cpu-nodes or "
                "--gpu-nodes"
            )
        if self.namespaces and self.most_nodes - 1 > Network.PLACES:
            raise ValueError(
                f"with namespaces there are at most {Network.PLACES} worker nodes"
            )
        if self.dead_after_seconds is not None and not self.dead_after_seconds >= 8:
            raise ValueError(
                f"dead_after_seconds is {self.dead_after_seconds}: it must be 8 or "
                "more, or a busy node passes for a dead one"
            )
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r}: use lower-case letters, digits and dashes"
            )
        if len(os.fsencode(self.folder)) + _BELOW > _SOCKET_PATH:
            raise ValueError(
                f"{self.folder} is too long for Ray's sockets, whose paths have "
                f"{_SOCKET_PATH} characters: give a shorter --state, such as /tmp/p "
                f"(with the name at most {_SOCKET_PATH - _BELOW} characters)"
            )

    @property
    def folder(self) -> Path:
        """State folder of this cluster."""
        return Path(self.state or default_state()).absolute() / self.name

    @property
    def dead_after(self) -> float:
        """Seconds without an answer after which a node is dead."""
        return self.dead_after_seconds or (12.0 if self.namespaces else 60.0)

    @property
    def kept(self) -> dict[str, Any]:
        """The keys that a cluster that is up cannot change."""
        keys = dataclasses.asdict(self)
        for name in ("action", "json", "state", "start_seconds"):
            del keys[name]
        return keys

    @property
    def most_nodes(self) -> int:
        """Nodes at most, head included."""
        return 1 + self.cpu_nodes + self.gpu_nodes
