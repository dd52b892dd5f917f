"""Where a local cluster can be reached, written down in its folder.

Owns that record, the token's file, and asking the dashboard. Does not own how a cluster
gets there (`cluster.local_lifecycle`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import local_node
from cluster.local_node import HEAD
from cluster.namespaces import Network

TOKEN = "cluster-token"
"""Its file, whose name also says whose folder it lies in: such a folder is removed."""
_CLUSTER = "cluster.json"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a cluster can be reached."""

    folder: Path
    address: str
    """host:port of its GCS, for drivers on this machine."""
    dashboard: str
    """URL of dashboard and jobs."""
    config: Mapping[str, Any]
    """The keys it was started with."""

    @property
    def within(self) -> list[str]:
        """Words in front of a command, which run it with the head's network: a driver
        that is not a job has to."""
        if self.config["namespaces"]:
            return Network(folder=self.folder).within(HEAD)
        return []

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to reach it."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN),
        }


def write(cluster: Cluster) -> None:
    """Write down that the cluster is up, which `find` then finds."""
    values = dataclasses.asdict(cluster)
    del values["folder"]
    (cluster.folder / _CLUSTER).write_text(json.dumps(values))


def write_token(folder: Path, text: str) -> None:
    """Write the token, for its owner's eyes only."""
    path = folder / TOKEN
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)


def find(folder: Path) -> Cluster | None:
    """The cluster whose folder this is, if it is up."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / _CLUSTER).read_text())
        head = [node for node in local_node.nodes(folder) if node.type == HEAD]
        if head and local_node.keeper(head[0]):
            return Cluster(folder=folder, **values)
    return None


def get(cluster: Cluster, path: str) -> Any:
    """What the cluster's dashboard answers to GET `path`.

    Raises:
        OSError: no answer, or a refusal.
    """
    token = (cluster.folder / TOKEN).read_text()
    request = urllib.request.Request(
        cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"}
    )
    # The user's proxy has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)
