"""Nodes that are asked for are those that training can go on with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.raylets import LIMIT_S, Raylets, raylets, wait_until

TAKEN = """
import threading, time, ray
from cluster import demand, nodes
from cluster.options import PretrainStage

ray.init(log_to_driver=False, logging_level="ERROR")
demand._LEAST_KEPT_S = 2.0
stage = PretrainStage(config="emoji", max_nodes={sizes}[-1], wait_seconds=0)
with demand.taken(
    stage, {sizes}, wait_seconds=0, tell=print, note=print, stop=threading.Event()
) as found:
    print("TAKEN", found.count, "SEVERAL", nodes.with_several("gpu_node"))
    while True:
        free = ray.available_resources().get("gpu_node", 0)
        print("COULD BE", found.could_be(), "FREE", free)
        time.sleep(0.5)
"""
TASKS = """
import json, time, ray
from cluster import nodes
from pipeline.ray_session import map_tasks

def where(work, item, report):
    time.sleep(0.1)
    return ray.get_runtime_context().get_node_id()

ray.init(log_to_driver=False, logging_level="ERROR")
kinds = {{row["NodeID"]: row["Resources"] for row in ray.nodes()}}
used = set()

def items():
    # One node may have done many before another has a process for them.
    number = 0
    while number < 40 or {training} and not any("gpu_node" in kinds[n] for n in used):
        yield number, number
        number += 1

for done in map_tasks(
    where, None, items(), workers=None, poll=None, resources={asked}
):
    used.add(done.result)
print("CPU NODES", nodes.exists("cpu_node"), "OTHERS", nodes.exists("other"))
print("USED", sorted({{"gpu_node" in kinds[one] for one in used}}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    with raylets(tmp_path_factory.mktemp("pace") / "pace", nodes=0) as found:
        yield found


def test_a_node_with_room_for_two_is_one_node(cluster: Raylets) -> None:
    """Otherwise a run would stop to grow onto it, again and again."""
    node = cluster.add(size=2)
    driver = cluster.drive(TAKEN.format(sizes=[1, 2]))
    try:
        lines = iter(driver.stdout or ())
        assert any("TAKEN 1 SEVERAL ['unknown']" in line for line in lines)
        # Its second half is given to who asks for one node more.
        assert any("FREE 0" in line for line in lines)
        assert "COULD BE 1 " in next(lines)
    finally:
        driver.kill()
        driver.communicate()
        node.end()
    wait_until(lambda: len(cluster.alive()) == 1)


def test_a_node_too_few_to_grow_with_is_let_go_until_another_comes(
    cluster: Raylets,
) -> None:
    for _ in range(3):
        cluster.add()
    driver = cluster.drive(TAKEN.format(sizes=[2, 4]))
    try:
        lines = iter(driver.stdout or ())
        assert any("TAKEN 2 SEVERAL []" in line for line in lines)
        assert any("COULD BE 2 FREE 1" in line for line in lines)
        assert any("2 are needed to go on with 4: they are let go" in x for x in lines)
        assert any("COULD BE 2 FREE 1" in line for line in lines)
        # Nothing keeps an autoscaler from taking it away, and it is asked for again.
        wait_until(lambda: list(cluster.groups().values()) == ["CREATED"])
        wait_until(lambda: "PENDING" in cluster.groups().values(), cluster.groups)
        cluster.add()
        assert any("COULD BE 4 FREE 0" in line for line in lines)
    finally:
        driver.kill()
        driver.communicate()


def test_tasks_that_ask_for_a_share_of_a_cpu_node_stay_off_the_others(
    cluster: Raylets,
) -> None:
    """As those of preprocessing do beside training (`overlap`)."""
    cluster.add(kind="cpu")
    if len(cluster.alive()) == 2:
        cluster.add()
    for asked, used in (({}, "True]"), ({"cpu_node": 0.001}, "USED [False]")):
        driver = cluster.drive(TASKS.format(asked=asked, training=not asked))
        try:
            said, _ = driver.communicate(timeout=LIMIT_S)
        finally:
            driver.kill()
        assert "CPU NODES True OTHERS False" in said, said
        assert used in said, said
