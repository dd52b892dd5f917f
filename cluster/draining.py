"""Nodes that were given notice, and why a node is gone, as a driver sees it.

Owns Ray's drain state: setting and reading it. Does not own who gives the notice
(cluster.notice, the node itself on SIGTERM, the autoscaler on idle nodes) or what is
done about it (cluster.elastic).

What Ray 2.60 does with a draining node: it schedules nothing new there and lets what
runs go on, past the deadline too; the node leaves by itself as soon as nothing runs on
it. It tells the deadline while the node lives and the reason only when it is dead, but
the two can be told apart at once: Ray sets no deadline when it drains for idleness
(and refuses to drain a busy node for that), every notice has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREEMPTION = "preemption"
IDLE = "idle"
FAILURE = "failure"

# Values of NodeDeathInfo.Reason in Ray's common.proto.
_CAUSES = {1: IDLE, 3: PREEMPTION, 4: IDLE}


@dataclass(frozen=True)
class Notice:
    """Why a living node is about to leave, and by when.

    `deadline_ms` counts milliseconds since the epoch and may be in the past; it is
    None where nothing ends the node but its own idleness.
    """

    reason: str
    deadline_ms: int | None


def draining() -> dict[str, Notice]:
    """Notices by node id (hex); `ray.init` has been called.

    A node killed by the cloud stays in here until the cluster's health check gives it
    up (`ray.nodes()` then says it is not alive).
    """
    from ray._private.state import state

    return {
        node: Notice(PREEMPTION, deadline) if deadline else Notice(IDLE, None)
        for node, deadline in state.get_draining_nodes().items()
    }


def drain(address: str, *, instance: str, why: str, by_ms: int) -> bool:
    """Ask the head at `address` (host:port) to drain the living node whose
    RAY_CLOUD_INSTANCE_ID is `instance`; whether it agreed. Needs no `ray.init`.

    `ray drain-node` does the same, but without the node's id it would start a driver
    on the node to find it.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
        DRAIN_NODE_REASON_PREEMPTION,
    )
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    head = GcsClient(address=address)
    for node, info in head.get_all_node_info(timeout=5).items():
        if info.instance_id == instance and info.state == GcsNodeInfo.ALIVE:
            reason = DRAIN_NODE_REASON_PREEMPTION
            return bool(head.drain_node(node.hex(), reason, why, by_ms)[0])
    return False


def cause_of_death(node: Mapping[str, Any]) -> tuple[str, str]:
    """(PREEMPTION, IDLE or FAILURE; Ray's own words) of a dead entry of `ray.nodes()`.

    FAILURE is also what a spot node looks like that was taken without notice: Ray only
    knows that it stopped answering. IDLE is any orderly end, such as `ray stop`.
    """
    cause = _CAUSES.get(int(node.get("DeathReason", 0)), FAILURE)
    return cause, str(node.get("DeathReasonMessage") or "the node stopped answering")
