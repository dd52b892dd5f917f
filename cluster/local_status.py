"""What the local cluster tells about itself.

Owns the text and JSON of `up` and `status`. Does not own the cluster
(`cluster.local_cluster`).
"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster import local_node, local_processes
from cluster.local_cluster import Cluster, find
from cluster.local_node import Node
from cluster.local_options import where

_SHOWN = ("CPU", "GPU", "cpu_node", "gpu_node")


def exports(cluster: Cluster) -> str:
    """Lines for a shell, after which commands find the cluster."""
    return "\n".join(f"export {k}={v}" for k, v in cluster.environment.items())


def next_steps(cluster: Cluster) -> str:
    """What to do with a cluster that is up."""
    flags = where(cluster.folder)
    lines = [
        "",
        "with the lines above in your shell:",
        "  ray job submit --working-dir . -- python -m cluster.run --config run.yaml",
        f"  python -m cluster.local status{flags}",
        f"  python -m cluster.local down{flags}",
    ]
    if cluster.within:
        lines += ["a driver that is no job has to run on the head:"]
        lines += [f"  {' '.join(cluster.within)} python ..."]
    return "\n".join(lines)


def status(folder: Path, *, json: bool) -> str:
    """Nodes by type, their processes and resources, and what waits for nodes.

    Raises:
        OSError: the cluster is not up, or its head does not answer.
    """
    cluster = find(folder)
    if cluster is None:
        raise OSError(
            f"no cluster is up at {folder}: start it with python -m cluster.local up"
            f"{where(folder)}"
        )
    found = describe(cluster)
    states, waiting = _seen_by_autoscaler(cluster)
    unknown = {"state": "starting", "resources": {}}
    found["nodes"] = [row | states.get(row["id"], unknown) for row in found["nodes"]]
    found["waiting"] = waiting
    return jsonlib.dumps(found, indent=1) if json else _text(found)


def describe(cluster: Cluster) -> dict[str, Any]:
    """Where the cluster is and its nodes, from what runs here; Ray is not asked."""
    return {
        "name": cluster.folder.name,
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "most": {kind: cluster.config[f"{kind}_nodes"] for kind in ("cpu", "gpu")},
        "nodes": [
            _describe_node(cluster.folder, node)
            for node in local_node.nodes(cluster.folder)
        ],
    }


def _describe_node(folder: Path, node: Node) -> dict[str, Any]:
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


def _seen_by_autoscaler(
    cluster: Cluster,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """State and resources (used and total) of each node, and what waits for nodes."""
    # Ray reads them when it is imported, and knows no other way.
    os.environ.update(cluster.environment)
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        seen = get_cluster_status(cluster.address)
    except Exception as error:
        # Ray raises plain Exceptions too.
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the head at {cluster.address} does not answer ({line}): wait a moment, "
            f"or end it with python -m cluster.local down{where(cluster.folder)}"
        ) from error
    states = {
        node.instance_id: {
            "state": (node.node_status or "unknown").lower(),
            "resources": _usage(node.resource_usage),
        }
        for node in (*seen.active_nodes, *seen.idle_nodes)
    }
    demands = seen.resource_demands
    waiting = [
        {"what": what, "count": bundle.count, "resources": dict(bundle.bundle)}
        for what, found in (
            ("tasks and actors", demands.ray_task_actor_demand),
            ("placement groups", demands.placement_group_demand),
            ("requested", demands.cluster_constraint_demand),
        )
        for demand in found
        for bundle in demand.bundles_by_count
    ]
    return states, waiting


def _usage(node: Any) -> dict[str, dict[str, float]]:
    return {
        usage.resource_name: {"used": usage.used, "total": usage.total}
        for usage in (node.usage if node else ())
        if usage.resource_name in _SHOWN
    }


def _text(found: Mapping[str, Any]) -> str:
    lines = [f"{found['name']} at {found['address']}, dashboard {found['dashboard']}"]
    for row in found["nodes"]:
        usage = ", ".join(
            f"{use['used']:g}/{use['total']:g} {name}"
            for name, use in sorted(row["resources"].items())
        )
        lines.append(
            f"  {row['id']:<9} {row['address']:<15} {row['state']:<9} "
            f"raylet {row['raylet'] or '-':<8} {len(row['pids']):>3} processes  {usage}"
        )
    for kind, most in found["most"].items():
        count = sum(row["type"] == kind for row in found["nodes"])
        lines.append(f"  {count} of at most {most} {kind} nodes")
    for demand in found["waiting"]:
        wanted = ", ".join(f"{k}: {v:g}" for k, v in demand["resources"].items())
        lines.append(f"  waiting: {demand['count']} x {{{wanted}}} ({demand['what']})")
    return "\n".join(lines if found["waiting"] else [*lines, "  nothing waits"])
