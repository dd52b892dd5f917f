"""Nodes with addresses of their own work together, and can be cut off."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import local_lifecycle
from cluster.local_options import LocalConfig
from cluster.namespaces import Network
from tests.cluster.clusters import LocalCluster, local_cluster, no_namespaces

_REASON = no_namespaces()
pytestmark = pytest.mark.skipif(bool(_REASON), reason=str(_REASON))
# Two nodes that sum over gloo, then stay.
REDUCE = """
import os, ray, time
ray.init(log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=1, resources={"gpu_node": 1})
class Rank:
    def address(self):
        return ray.util.get_node_ip_address()

    def reduce(self, rank, master):
        import torch
        import torch.distributed as dist
        os.environ.update(MASTER_ADDR=master, MASTER_PORT="29500")
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        return total.item()

ranks = [Rank.remote() for _ in range(2)]
addresses = ray.get([rank.address.remote() for rank in ranks])
totals = [rank.reduce.remote(i, addresses[0]) for i, rank in enumerate(ranks)]
print("SUMS", len(set(addresses)), ray.get(totals), flush=True)
while all(node["Alive"] for node in ray.nodes()):
    time.sleep(1)
print("DEAD", [n["NodeName"] for n in ray.nodes() if not n["Alive"]], flush=True)
"""


ALIVE = """
import ray
ray.init(log_to_driver=False)
print("ALIVE", *(node["NodeName"] for node in ray.nodes() if node["Alive"]))
"""


def _namespaces() -> list[str]:
    return subprocess.check_output(["ip", "netns"], text=True).split()


def _unused(folder: Path) -> Path:
    """A folder below, the subnet of which nobody has: there are 512 of them, and the
    cluster of these tests has one.
    """
    for number in itertools.count():
        found = folder / str(number)
        subnet = str(Network(folder=found).subnet)
        if not subprocess.check_output(["ip", "route", "show", "root", subnet]):
            return found
    raise AssertionError


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    flags = ("--namespaces",)
    with local_cluster(gpu_nodes=2, idle_seconds=600, flags=flags) as started:
        yield started
    network = Network(folder=started.folder)
    assert not [name for name in _namespaces() if network.namespace("") in name]
    assert not subprocess.check_output(["ip", "route", "show", str(network.subnet)])


def test_ranks_in_two_namespaces_reduce_until_one_is_cut_off(
    cluster: LocalCluster,
) -> None:
    driver = cluster.start(sys.executable, "-c", REDUCE, stdout=subprocess.PIPE)
    assert driver.stdout
    sums = next(line for line in driver.stdout if line.startswith("SUMS"))
    assert sums == "SUMS 2 [3, 3]\n"
    before = cluster.nodes("gpu")
    assert len({node.address for node in cluster.nodes()}) == 3
    lost = cluster.processes(before[0].id)
    cluster.cut_off(before[0].id)
    dead = next(line for line in driver.stdout if line.startswith("DEAD"))
    assert dead == f"DEAD ['{before[0].id}']\n"
    # What is dead to the others is ended, like a machine that is given back.
    cluster.wait_for_end(lost)
    # Its network goes a moment after its processes.
    namespace = Network(folder=cluster.folder).namespace(before[0].id)
    cluster.wait_until(
        lambda: namespace not in _namespaces(), f"taken {namespace} away"
    )
    with pytest.raises(OSError, match="Cannot find device"):
        cluster.reconnect(before[0].id)


def test_a_node_that_is_reconnected_in_time_lives_on(cluster: LocalCluster) -> None:
    (head,) = cluster.nodes("head")
    reach = (
        "import socket, sys; connection = socket.socket(); connection.settimeout(3)\n"
        "try: connection.connect((sys.argv[1], 1))\n"
        "except OSError as error: print(type(error).__name__)"
    )
    answers = []
    for change in (cluster.reconnect, cluster.cut_off, cluster.reconnect):
        change(head.id)
        words = [sys.executable, "-c", reach, head.address]
        answers.append(subprocess.check_output(words, text=True).strip())
    refused = "ConnectionRefusedError"
    assert answers == [refused, "TimeoutError", refused]
    joined = {node.id for node in cluster.nodes() if node.ready}
    done = cluster.python(ALIVE)
    assert joined <= set(done.stdout.rpartition("ALIVE ")[2].split()), done.stdout


def test_a_subnet_that_is_in_use_is_refused(tmp_path: Path) -> None:
    network = Network(folder=_unused(tmp_path))
    network.create()
    try:
        with pytest.raises(OSError, match="is in use here already"):
            Network(folder=network.folder).create()
    finally:
        network.remove()


def test_up_clears_a_network_whose_folder_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_lifecycle, "_check_machine", lambda _: None)
    monkeypatch.setattr(local_lifecycle, "start_head", lambda *_: None)
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as state:
        name = _unused(Path(state)).name
        config = LocalConfig(action="up", state=state, name=name, namespaces=True)
        network = Network(folder=config.folder)
        network.create()
        try:
            local_lifecycle.up(config, tell=print)
            # It could not be made where one is left.
            network.create()
        finally:
            network.remove()
