"""Nodes of the cluster by type, and for how long they were there.

Owns what a node's type is at run time, and the clock that counts node-seconds. Does not
own prices (`cluster.options`) or where the seconds are written (`cluster.journal`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

# Set by the autoscaler on the nodes that it starts.
_TYPE_LABEL = "ray.io/node-group"
_CONFIG_FLAG = "--autoscaling-config="
_TYPES = "available_node_types"
_HEAD_RESOURCE = "node:__internal_head__"
HEAD = "head"
UNKNOWN = "unknown"
_SAMPLE_SECONDS = 5.0
_WRITE_EVERY = 3


def node_type(node: Mapping[str, Any]) -> str:
    """Type of a row of `ray.nodes()`: its name in the cluster's YAML."""
    name = node.get("Labels", {}).get(_TYPE_LABEL)
    if name:
        return str(name)
    return HEAD if _HEAD_RESOURCE in node["Resources"] else UNKNOWN


def alive_by_type() -> dict[str, int]:
    """How many nodes of each type are alive."""
    import ray

    return dict(Counter(node_type(node) for node in ray.nodes() if node["Alive"]))


def offered(needed: Mapping[str, float]) -> dict[str, int] | None:
    """Node types that have so much of each resource, with the most nodes that the
    autoscaler may start of each; None where nobody says.
    """
    types = _configured()
    if types is None:
        return None
    return {
        name: int(row.get("max_workers", 0))
        for name, row in types.items()
        if all((row.get("resources") or {}).get(k, 0) >= v for k, v in needed.items())
    }


def exists(resource: str) -> bool:
    """Whether a node type has a resource; where nobody says what types there are,
    whether a node that is alive has it.
    """
    import ray

    if (found := offered({resource: 1})) is not None:
        return bool(found)
    return any(node["Alive"] and resource in node["Resources"] for node in ray.nodes())


def with_several(resource: str) -> list[str]:
    """Node types that have more than one of a resource; where nobody says what types
    there are, those of nodes that are alive.
    """
    import ray

    if (types := _configured()) is not None:
        rows = {name: row.get("resources") or {} for name, row in types.items()}
    else:
        alive = [node for node in ray.nodes() if node["Alive"]]
        rows = {node_type(node): node["Resources"] for node in alive}
    return sorted(name for name, found in rows.items() if found.get(resource, 0) > 1)


def known_types() -> list[str] | None:
    """Every node type of the cluster's configuration; None where nobody says."""
    types = _configured()
    return None if types is None else sorted(types)


def _configured() -> Mapping[str, Any] | None:
    """`available_node_types` of the cluster's YAML, as the autoscaler was given it.

    Autoscaler v2 tells nobody what it may start, but its process beside the head, where
    drivers run, has the file's name among its words. Under KubeRay it is in a container
    of its own.
    """
    import psutil
    import ray

    here = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        given = [word for word in words if word.startswith(_CONFIG_FLAG)]
        if given and here in words:
            path = Path(given[0].removeprefix(_CONFIG_FLAG)).expanduser()
            with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
                found: Mapping[str, Any] = yaml.safe_load(path.read_text())[_TYPES]
                return found
    return None


class NodeClock:
    """Counts node-seconds by type in a thread while it is entered.

    Args:
        write: gets the seconds so far and how many nodes are alive, every now and then
            and at the end.
    """

    def __init__(
        self, write: Callable[[Mapping[str, float], Mapping[str, int]], None]
    ) -> None:
        self._write = write
        self._seconds: dict[str, float] = {}
        self._alive: dict[str, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._count, name="nodes", daemon=True)

    def __enter__(self) -> NodeClock:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _count(self) -> None:
        from ray.exceptions import RayError

        last, number = time.monotonic(), 0
        while not self._closed.wait(_SAMPLE_SECONDS if number else 0.1):
            now = time.monotonic()
            try:
                self._alive = alive_by_type()
                for name, count in self._alive.items():
                    before = self._seconds.get(name, 0.0)
                    self._seconds[name] = before + count * (now - last)
            except (RayError, OSError, RuntimeError):
                # The head does not answer: whether nodes are there is not known.
                continue
            finally:
                last, number = now, number + 1
            if number % _WRITE_EVERY == 1:
                self._write(self._seconds, self._alive)
        self._write(self._seconds, self._alive)
