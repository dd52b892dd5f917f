"""What the local cluster tells about itself.

Owns the text and JSON of `up` and `status`. Does not own the cluster
(`cluster.local_cluster`).
"""

from __future__ import annotations

import json as jsonlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster import local_node, local_processes
from cluster.local_cluster import Cluster, find


def next_steps(cluster: Cluster) -> str:
    """What to do with a cluster that is up."""
    lines = [f"export {name}={value}" for name, value in cluster.environment.items()]
    return "\n".join(
        [
            *lines,
            "",
            "ray job submit --working-dir . -- python -m cluster.run --config run.yaml",
            "",
            "python -m cluster.local status    # nodes come when work waits for them",
            "python -m cluster.local down",
        ]
    )


def status(folder: Path, *, json: bool) -> str:
    """Nodes by type, their processes and resources, and what waits for nodes.

    Raises:
        OSError: the cluster is not up.
    """
    cluster = find(folder)
    if cluster is None:
        raise OSError(
            f"no cluster is up at {folder}: start it with python -m cluster.local up"
        )
    found = describe(cluster)
    return jsonlib.dumps(found, indent=1) if json else _text(found)


def describe(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain values: what `status --json` prints."""
    return {
        "name": cluster.folder.name,
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "nodes": [
            _describe_node(cluster.folder, node)
            for node in local_node.nodes(cluster.folder)
        ],
    }


def _describe_node(folder: Path, node: local_node.Node) -> dict[str, Any]:
    names = {}
    for process in local_processes.members(folder / node.id):
        with suppress(psutil.Error):
            names[process.pid] = process.name()
    raylets = [pid for pid, name in names.items() if name == "raylet"]
    return {
        "id": node.id,
        "type": node.type,
        "address": node.address,
        "ready": (folder / node.id / local_node.READY).exists(),
        "keeper": node.pid,
        "raylet": raylets[0] if raylets else None,
        "pids": sorted(names),
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['name']} at {found['address']}, dashboard {found['dashboard']}"]
    for row in found["nodes"]:
        lines.append(
            f"  {row['id']:<10} {row['address']:<15} {len(row['pids'])} processes"
        )
    return "\n".join(lines)
