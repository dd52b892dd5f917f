"""Nodes for training: asked for, taken, given back.

Owns the placement groups that are the cluster's demand for whole nodes. Does not own
which numbers of nodes are possible (`cluster.checks`) or what runs on them
(`cluster.elastic`).

A pending group is what an autoscaler acts on, and is taken all at once or not at all.
So most nodes are asked for by one group, and once fewer will do, each missing one by a
group of its own: any of them that comes is a reason to grow. All groups are the
driver's and end with it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.draining import draining
from cluster.options import PretrainStage

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_POLL_S = 0.5
# Nodes that are there are given within this time.
_THERE_S = 10.0
_TELL_EVERY_S = 60.0
_CREATED = "CREATED"
Tell = Callable[[int, int], None]
"""Gets how many nodes are wanted, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes that are taken, and those that are still asked for."""

    group: PlacementGroup
    count: int
    sizes: tuple[int, ...]
    more: tuple[PlacementGroup, ...]

    def whole(self) -> bool:
        """Whether none of them was lost."""
        return _is_there(self.group)

    def could_be(self) -> int:
        """The largest valid number of nodes with those that have come since."""
        there = self.count + sum(map(_is_there, self.more))
        return max(size for size in self.sizes if size <= there)


def bundle(stage: PretrainStage) -> dict[str, float]:
    """What of a node makes it wholly ours."""
    found = {stage.node_resource: 1.0, "CPU": float(stage.cpus_per_node)}
    found["GPU"] = float(stage.gpus_per_node)
    return {name: amount for name, amount in found.items() if amount}


@contextlib.contextmanager
def taken(
    stage: PretrainStage,
    sizes: Sequence[int],
    *,
    wait_seconds: float,
    tell: Tell,
    stop: threading.Event,
) -> Iterator[Nodes | None]:
    """Take the most of `sizes` nodes or, after `wait_seconds`, the most that there are.
    Waits for the fewest as long as it takes. None when `stop` is set before.

    Args:
        sizes: valid numbers of nodes, rising.
    """
    groups: list[PlacementGroup] = []
    try:
        count = _take(
            stage,
            sizes,
            groups,
            wait_seconds=wait_seconds,
            tell=tell,
            stop=stop,
        )
        if not count:
            yield None
            return
        for _ in range(sizes[-1] - count):
            groups.append(_asked(stage, 1))
        yield Nodes(
            group=groups[0], count=count, sizes=tuple(sizes), more=tuple(groups[1:])
        )
    finally:
        for group in groups:
            _give_back(group)


@dataclass(frozen=True, kw_only=True)
class There:
    """Nodes for training that could be taken now."""

    fit: int
    """That are alive and have had no notice."""
    free: int
    """Of these, as far as is known, that nobody uses."""


def nodes_there(stage: PretrainStage) -> There:
    """What there is now. Nodes that were just given back may not be free yet."""
    import ray

    leaving = draining()
    fit = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in leaving
        and all(node["Resources"].get(k, 0) >= v for k, v in bundle(stage).items())
    ]
    free = int(ray.available_resources().get(stage.node_resource, 0))
    return There(fit=len(fit), free=min(len(fit), free))


def _take(
    stage: PretrainStage,
    sizes: Sequence[int],
    groups: list[PlacementGroup],
    *,
    wait_seconds: float,
    tell: Tell,
    stop: threading.Event,
) -> int:
    """Put the group that was taken into `groups`; of how many nodes, 0 for none."""
    started, told = time.monotonic(), _THERE_S
    groups.append(_asked(stage, sizes[-1]))
    while not stop.is_set():
        if _is_there(groups[0]):
            return sizes[-1]
        waited, there = time.monotonic() - started, nodes_there(stage)
        known = there.free == there.fit or waited >= _THERE_S
        if known and waited >= wait_seconds and there.free >= sizes[0]:
            for size in reversed([size for size in sizes if size <= there.free]):
                _give_back(groups.pop())
                groups.append(_asked(stage, size))
                if _comes(groups[0], stop):
                    return size
            _give_back(groups.pop())
            groups.append(_asked(stage, sizes[-1]))
        if waited >= told:
            tell(sizes[-1], there.free)
            told = waited + _TELL_EVERY_S
        stop.wait(_POLL_S)
    return 0


def _comes(group: PlacementGroup, stop: threading.Event) -> bool:
    deadline = time.monotonic() + _THERE_S
    while time.monotonic() < deadline and not stop.is_set():
        if _is_there(group):
            return True
        stop.wait(_POLL_S / 5)
    return False


def _asked(stage: PretrainStage, count: int) -> PlacementGroup:
    from ray.util import placement_group

    return placement_group([bundle(stage)] * count, strategy="STRICT_SPREAD")


def _is_there(group: PlacementGroup) -> bool:
    from ray.util import placement_group_table

    return bool(placement_group_table(group).get("state") == _CREATED)


def _give_back(group: PlacementGroup) -> None:
    from ray.util import remove_placement_group

    remove_placement_group(group)
