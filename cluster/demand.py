"""Nodes for training: asked for, taken, given back.

Owns the placement groups that are the cluster's demand for whole nodes. Does not own
which numbers of nodes are possible (`cluster.checks`) or what runs on them
(`cluster.elastic`).

A pending group is what an autoscaler acts on, and is taken all at once or not at all.
So most nodes are asked for by one group, and once fewer will do, what is missing to
each larger number by a group of its own: any of them that is given is a reason to grow,
and no node is taken that is not enough to go on with. All groups are the driver's and
end with it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.draining import draining
from cluster.options import PretrainStage

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_POLL_S = 0.5
# Nodes that are there are given within this time.
_THERE_S = 10.0
_TELL_EVERY_S = 60.0
_CREATED = "CREATED"
# Nodes that are too few to grow with are kept for `wait_seconds`, and at least so long.
_LEAST_KEPT_S = 60.0
Tell = Callable[[int, int], None]
"""Gets how many nodes are wanted, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes that are taken, and those that are still asked for."""

    group: PlacementGroup
    count: int
    growth: Growth

    def whole(self) -> bool:
        """Whether none of them was lost."""
        return _is_there(self.group)

    def could_be(self) -> int:
        """The largest valid number of nodes with those that have come since. To be
        asked every now and then: what is asked for depends on what has come.
        """
        self.growth.look()
        there = _nodes_of(self.group).union(*map(_nodes_of, self.growth.groups))
        # Less than was taken where one was lost.
        fit = [size for size in self.growth.sizes if size <= len(there)]
        return max(self.count, *fit)


class Growth:
    """The demand for more nodes than are taken.

    While it lasts, an autoscaler lets no node go that could serve it. So where some
    have come, but too few for the next number, it is withdrawn after a while, for as
    long: then they go when they are idle.

    Args:
        sizes: valid numbers of nodes, rising; the first one is taken.
        note: gets a line when nodes are let go.
    """

    def __init__(
        self, stage: PretrainStage, sizes: Sequence[int], note: Callable[[str], None]
    ) -> None:
        self._stage, self.sizes, self._note = stage, tuple(sizes), note
        self._kept_s = max(stage.wait_seconds, _LEAST_KEPT_S)
        self.groups: list[PlacementGroup] = []
        self._short_since: float | None = None
        self._again_at = 0.0
        self._ask()

    def look(self) -> None:
        """Withdraw the demand, or make it again, if it is time."""
        steps = [after - before for before, after in itertools.pairwise(self.sizes)]
        if max(steps, default=1) == 1:
            # Every node that comes is one to grow with.
            return
        now, free = time.monotonic(), nodes_there(self._stage).free
        if not self.groups:
            if now >= self._again_at or free >= steps[0]:
                self._ask()
        elif not free or any(map(_is_there, self.groups)):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since >= self._kept_s:
            self.close()
            self._again_at, self._short_since = now + self._kept_s, None
            self._note(
                f"{free} more nodes were there for {self._kept_s:.0f} s, and "
                f"{steps[0]} are needed to go on with {self.sizes[1]}: they are let "
                f"go, and asked for again in {self._kept_s:.0f} s"
            )

    def close(self) -> None:
        """Withdraw it."""
        while self.groups:
            _give_back(self.groups.pop())

    def _ask(self) -> None:
        for before, after in itertools.pairwise(self.sizes):
            self.groups.append(_asked(self._stage, after - before))


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
    note: Callable[[str], None],
    stop: threading.Event,
) -> Iterator[Nodes | None]:
    """Take the most of `sizes` nodes or, after `wait_seconds`, the most that there are.
    Waits for the fewest as long as it takes. None when `stop` is set before.

    Args:
        sizes: valid numbers of nodes, rising.
        tell: called while there are too few.
        note: gets what there is to say of nodes that are not taken.
    """
    groups: list[PlacementGroup] = []
    growth: Growth | None = None
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
        growth = Growth(stage, [size for size in sizes if size >= count], note)
        yield Nodes(group=groups[0], count=count, growth=growth)
    finally:
        if growth:
            growth.close()
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
    return bool(_nodes_of(group))


def _nodes_of(group: PlacementGroup) -> set[str]:
    """Ids of the nodes of a group, once all of them are given."""
    from ray.util import placement_group_table

    row = placement_group_table(group)
    return set(row["bundles_to_node_id"].values() if _given(row) else ())


def _given(row: Mapping[str, Any]) -> bool:
    return row.get("state") == _CREATED


def _give_back(group: PlacementGroup) -> None:
    from ray.util import remove_placement_group

    remove_placement_group(group)
