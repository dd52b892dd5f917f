"""Ray's autoscaler starts and ends nodes of the local cluster through this.

Owns which nodes there are: they are written down in the cluster's folder before they
start, because the autoscaler never lets go of a node that registers before it is
listed. Does not own a node's processes (`cluster.local_node`) or the head
(`cluster.local_head`). Runs in the autoscaler's process on the head, and nobody else
imports it: it is the one module here that brings Ray along.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster import local_node
from cluster.local_node import HEAD, Node
from cluster.namespaces import Network


class LocalNodeProvider(NodeProvider):
    """Nodes that are processes of this machine.

    Args:
        provider_config: `provider` of the cluster's YAML, with the keys `folder` (the
            cluster's), `gcs_address`, `address` (the head's, and the nodes' without
            namespaces), `namespaces` and `environment` (variables of every node).
        cluster_name: name of the cluster.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._network = None
        if provider_config["namespaces"]:
            self._network = Network(folder=self._folder)
        # The autoscaler calls from several threads.
        self._lock = threading.RLock()
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers: dict[str, int] = {}
        self._place = 0

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of nodes; one whose raylet has ended is cleared away, not listed."""
        with self._lock:
            listed = []
            for node in local_node.nodes(self._folder):
                if node.type != HEAD and not self._lives(node):
                    self._end(node)
                elif tag_filters.items() <= _tags(node).items():
                    listed.append(node.id)
            return listed

    def is_running(self, node_id: str) -> bool:
        """Whether there is such a node."""
        with self._lock:
            return self._find(node_id) is not None

    def is_terminated(self, node_id: str) -> bool:
        """Whether there is no such node."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The tags of a node."""
        with self._lock:
            node = self._find(node_id)
            return _tags(node) if node else {}

    def internal_ip(self, node_id: str) -> str:
        """Its IP address."""
        with self._lock:
            node = self._find(node_id)
            return node.address if node else ""

    def external_ip(self, node_id: str) -> str:
        """Its IP address: there is only one."""
        return self.internal_ip(node_id)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Nobody asks for it: nodes are not updated."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> dict[str, Any] | None:
        """Start `count` nodes of one type."""
        with self._lock:
            for _ in range(count):
                self._create(tags, resources)
        return None

    def terminate_node(self, node_id: str) -> dict[str, Any] | None:
        """End a node and everything on it."""
        with self._lock:
            if node := self._find(node_id):
                self._end(node)
        return None

    def _create(self, tags: Mapping[str, str], resources: Mapping[str, float]) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        node = Node(
            id=f"{kind}-{number}",
            type=kind,
            address=self._address(),
            tags={**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE},
        )
        local_node.write(self._folder, node)
        within: Sequence[str] = ()
        if self._network:
            self._network.add(node.id, node.address)
            within = self._network.within(node.id)
        words = local_node.ray_start_words(self._folder, node, resources)
        _, self._keepers[node.id] = local_node.start(
            self._folder,
            node,
            [*words, f"--address={self.provider_config['gcs_address']}"],
            environment=self.provider_config["environment"],
            within=within,
        )

    def _address(self) -> str:
        """Of a new node: with namespaces, one that has not been used for long."""
        if not self._network:
            return str(self.provider_config["address"])
        taken = {node.address for node in local_node.nodes(self._folder)}
        while True:
            place = self._place = self._place % Network.PLACES + 1
            address = self._network.address(place)
            if address not in taken:
                return address

    def _lives(self, node: Node) -> bool:
        if process := self._keepers.get(node.id):
            process.poll()  # Reaps it.
        return local_node.keeper(node) is not None

    def _end(self, node: Node) -> None:
        local_node.end(self._folder, node)
        if self._network:
            self._network.take_away(node.id)
        if process := self._keepers.pop(node.id, None):
            process.wait()

    def _find(self, node_id: str) -> Node | None:
        found = [n for n in local_node.nodes(self._folder) if n.id == node_id]
        return found[0] if found else None


def _tags(node: Node) -> dict[str, str]:
    if node.type == HEAD:
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: HEAD,
            TAG_RAY_NODE_NAME: node.id,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
    return {**node.tags, TAG_RAY_NODE_NAME: node.id}
