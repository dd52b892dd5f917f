"""A cloud without spot capacity, for Ray's autoscaler. Its machines never join.

Named by the configuration that test_fallback.py gives to a real head.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

HEAD = "head"


class RefusingProvider(NodeProvider):
    """Appends each request to the file `requests`, refuses those of type `refused`.

    Lists nothing before the file `joined` is there: a head whose raylet takes longer to
    join than a machine may is taken for one that never does, and given back.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.Lock()
        self._tags = {
            HEAD: {TAG_RAY_NODE_KIND: "head", TAG_RAY_USER_NODE_TYPE: HEAD},
        }

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        while not Path(self.provider_config["joined"]).exists():
            time.sleep(0.1)
        with self._lock:
            return [
                node
                for node, tags in self._tags.items()
                if all(tags.get(tag) == value for tag, value in tag_filters.items())
            ]

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        with self._lock:
            with Path(self.provider_config["requests"]).open("a") as log:
                log.write(f"{kind}\n")
            if kind == self.provider_config["refused"]:
                raise RuntimeError("InsufficientInstanceCapacity: no spot capacity")
            for _ in range(count):
                self._tags[f"{kind}-{len(self._tags)}"] = dict(tags)

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            self._tags.pop(node_id, None)

    def is_running(self, node_id: str) -> bool:
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._tags[node_id])

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags[node_id].update(tags)

    def internal_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    def external_ip(self, node_id: str) -> str:
        return "127.0.0.1"
