"""A head and three busy nodes. One is drained by `ray drain-node`, one by the watcher
that reads its cloud's notice, one is killed. Prints what a driver saw, as JSON.

Run by test_draining.py: a process of its own, because Ray reads its environment when it
is first imported and a second cluster in one process is asking for trouble.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.fake_metadata import metadata

NOTICE = "spot notice, told by the test"
SECONDS = 600
LIMIT_S = 240


def until(happened: Callable[[], Any]) -> Any:
    """What `happened` returns, once that is true."""
    deadline = time.monotonic() + LIMIT_S
    while not (value := happened()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{LIMIT_S} s passed")
        time.sleep(0.2)
    return value


def drain(address: str, node: str) -> None:
    words = {
        "address": address,
        "node-id": node,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": NOTICE,
        "deadline-remaining-seconds": SECONDS,
    }
    ray = Path(sys.executable).with_name("ray")
    flags = [f"--{name}={value}" for name, value in words.items()]
    subprocess.run([str(ray), "drain-node", *flags], check=True)


def watch(address: str, instance: str) -> int:
    """`cluster.notice` on a machine that is taken after its service failed a little."""
    with metadata(noticed=True, broken=2) as service:
        words = {
            "cloud": "aws",
            "address": address,
            "every_seconds": 0.2,
            "metadata": service.url,
        }
        flags = [f"--{name}={value}" for name, value in words.items()]
        return subprocess.run(
            [sys.executable, "-m", "cluster.notice", *flags],
            env={**os.environ, "RAY_CLOUD_INSTANCE_ID": instance},
            timeout=LIMIT_S,
            check=False,
        ).returncode


def pod(address: str) -> subprocess.Popen[bytes]:
    """A node started as KubeRay starts one, by a shell with two commands."""
    ray = Path(sys.executable).with_name("ray")
    flags = "--block --num-cpus=0 --resources='{\"pod\": 1}' --min-worker-port=0"
    flags += " --max-worker-port=0 --dashboard-agent-listen-port=0"
    command = f"ulimit -c 0; {ray} start --address={address} {flags}"
    return subprocess.Popen(
        ["bash", "-lc", "--", command],
        env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(SECONDS)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def observe_pod(address: str) -> dict[str, Any]:
    """SIGTERM to a node on which something runs, as when its pod is deleted."""
    import ray

    from cluster.draining import cause_of_death, draining

    shell = pod(address)
    try:

        @ray.remote(num_cpus=0, resources={"pod": 1}, max_restarts=0)
        class Busy:
            def where(self) -> str:
                return ray.get_runtime_context().get_node_id()

        busy = Busy.remote()
        node = ray.get(busy.where.remote(), timeout=LIMIT_S)
        earliest = time.time() * 1000 + SECONDS * 1000
        shell.terminate()
        told = until(lambda: draining().get(node))
        late = told.deadline_ms - earliest
        answers = ray.get(busy.where.remote(), timeout=LIMIT_S) == node
        ray.kill(busy)
        dead = until(
            lambda: next(
                (n for n in ray.nodes() if n["NodeID"] == node and not n["Alive"]), None
            )
        )
        shell.wait(timeout=LIMIT_S)
        return {
            "reason": told.reason,
            "late_seconds": late / 1000,
            "answers": answers,
            "end": cause_of_death(dead)[0],
        }
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if os.getsid(process.pid) == shell.pid:
                    process.kill()
        shell.wait()


def observe(folder: str) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    from cluster.draining import cause_of_death, draining

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "temp_dir": folder, "include_dashboard": False},
    )
    nodes = [
        cluster.add_node(num_cpus=1, env_vars={"RAY_CLOUD_INSTANCE_ID": f"i-{number}"})
        for number in range(3)
    ]
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        @ray.remote(num_cpus=1, max_restarts=0)
        class Busy:
            def where(self) -> str:
                return ray.get_runtime_context().get_node_id()

        def entry(node: str) -> dict[str, Any] | None:
            return next(
                (n for n in ray.nodes() if n["NodeID"] == node and not n["Alive"]), None
            )

        runners = [Busy.remote() for _ in nodes]
        noticed, other, third = ray.get([runner.where.remote() for runner in runners])
        names = {node.node_id: f"i-{number}" for number, node in enumerate(nodes)}
        seen: dict[str, Any] = {"noticed": noticed, "before": len(draining())}
        seen["earliest_ms"] = time.time() * 1000 + SECONDS * 1000 - 1000
        drain(cluster.address, noticed)
        told = until(draining)
        seen["latest_ms"] = time.time() * 1000 + SECONDS * 1000
        seen["told"] = {n: [t.reason, t.deadline_ms] for n, t in told.items()}
        seen["still_answers"] = ray.get(runners[0].where.remote()) == noticed
        seen["pod"] = observe_pod(cluster.address)
        seen["watcher"] = watch(cluster.address, names[third])
        until(lambda: third in draining())
        seen["spot"] = [draining()[third].reason, draining()[third].deadline_ms]
        ray.kill(runners[0])
        seen["noticed_end"] = cause_of_death(until(lambda: entry(noticed)))
        killed = next(node for node in nodes if node.node_id == other)
        killed.all_processes["raylet"][0].process.kill()
        seen["killed_end"] = cause_of_death(until(lambda: entry(other)))
        return seen
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as own:
        print(json.dumps(observe(own)))
