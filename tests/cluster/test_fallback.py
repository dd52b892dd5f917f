"""No spot capacity: a real autoscaler takes on-demand nodes, and spot again later."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.fallback import priorities, rewrite
from tests.conftest import ROOT, free_port

RAY = Path(sys.executable).with_name("ray")
HEAD_STARTS = 3
# A head that is healthy may not have a raylet to speak to yet.
DEMAND = """
import pathlib, ray, sys, time
for left in range(120, -1, -1):
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
        break
    except Exception:
        if not left:
            raise
        time.sleep(1)
pathlib.Path(sys.argv[1]).touch()
ray.util.placement_group([{"gpu_node": 1}])
time.sleep(600)
"""


def configuration(folder: Path, refused: str = "gpu") -> dict[str, Any]:
    """What `ray up` leaves on the head, with a cloud that refuses a node type."""
    resources = {"CPU": 1, "gpu_node": 1}
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {"resources": resources, "max_workers": 1, "priority": 10},
        "gpu-ondemand": {"resources": resources, "max_workers": 1},
    }
    lists = ("initialization_commands", "setup_commands", "cluster_synced_files")
    commands = ("setup_commands", "start_ray_commands")
    return {
        "cluster_name": "refused",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1,
        "provider": {
            "type": "external",
            "module": "tests.cluster.refusing_provider.RefusingProvider",
            "disable_node_updaters": True,
            "requests": str(folder / "requests"),
            "joined": str(folder / "joined"),
            "refused": refused,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "available_node_types": {
            name: {"node_config": {}, "min_workers": 0, **given}
            for name, given in types.items()
        },
        "head_node_type": "head",
        **{name: [] for name in lists},
        **{f"{who}_{name}": [] for who in ("head", "worker") for name in commands},
    }


@contextlib.contextmanager
def process(
    words: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, and end it with everything that it started."""
    with log.open("w") as out:
        child = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
    tree = []
    try:
        yield child
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(child.pid)]
            tree += tree[0].children(recursive=True)
        child.terminate()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for each in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        child.wait()


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def healthy(address: str, env: dict[str, str]) -> bool:
    words = [str(RAY), "health-check", "--address", address]
    done = subprocess.run(words, env=env, capture_output=True, check=False)
    return done.returncode == 0


def came_up(child: subprocess.Popen[bytes], address: str, env: dict[str, str]) -> bool:
    """Wait until a head is healthy or has ended."""
    until(lambda: child.poll() is not None or healthy(address, env))
    return child.poll() is None


@contextlib.contextmanager
def started(folder: Path, config: Path, env: dict[str, str]) -> Iterator[str]:
    """Address of a head that is healthy. One that ends instead, because somebody took
    its port first or the machine was too busy, is started again with other ports.
    """
    for _ in range(HEAD_STARTS):
        port = free_port()
        flags = {
            "port": port,
            "num-cpus": 0,
            "include-dashboard": "false",
            "temp-dir": folder / "ray",
            "autoscaling-config": config,
            "dashboard-agent-listen-port": 0,
            "ray-client-server-port": free_port(),
        }
        words = [str(RAY), "start", "--head", "--block"]
        words += [f"--{name}={value}" for name, value in flags.items()]
        address = f"127.0.0.1:{port}"
        with process(words, folder / "head.log", env) as child:
            if came_up(child, address, env):
                yield address
                return
    raise AssertionError((folder / "head.log").read_text())


@contextlib.contextmanager
def head(refused: str, **more: str) -> Iterator[tuple[Path, dict[str, str], str]]:
    """Folder, environment and address of a head with a demand for one GPU node."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": "head",
        "RAY_NODE_TYPE_NAME": "head",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        **more,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(configuration(folder, refused)))
    demand = [sys.executable, "-c", DEMAND, str(folder / "joined")]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        address = stack.enter_context(started(folder, path, env))
        given = {**env, "RAY_ADDRESS": address}
        stack.enter_context(process(demand, folder / "demand.log", given))
        try:
            yield folder, env, address
        except AssertionError as error:
            for log in sorted(folder.glob("*.log")):
                error.add_note(f"{log.name}: {log.read_text()[-4000:]}")
            raise


def asked(folder: Path) -> list[str]:
    """Node types that the autoscaler has asked the cloud for, in order."""
    requests = folder / "requests"
    return requests.read_text().split() if requests.exists() else []


def test_on_demand_comes_when_spot_is_refused_and_spot_is_tried_again() -> None:
    with head(refused="gpu") as (folder, env, address):
        path = folder / "config.json"
        # Without the fallback spot is asked for over and over.
        until(lambda: len(asked(folder)) >= 3)
        assert set(asked(folder)) == {"gpu"}
        words = [sys.executable, "-m", "cluster.fallback", f"--config_file={path}"]
        words += [f"--address={address}", "--seconds=8", "--every_seconds=0.2"]
        with process(words, folder / "fallback.log", env):
            until(lambda: priorities(json.loads(path.read_text()))["gpu"] < 0)
            until(lambda: "gpu-ondemand" in asked(folder))
            until(lambda: priorities(json.loads(path.read_text()))["gpu"] == 10)


def test_on_demand_comes_when_a_spot_machine_never_joins() -> None:
    """What cluster/kuberay relies on, with its two variables: a pod that stays Pending
    is a machine that was given and never joined."""
    timeouts = {
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": "10",
        "RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S": "600",
    }
    with head(refused="", **timeouts) as (folder, _, _):
        until(lambda: "gpu-ondemand" in asked(folder))
        assert asked(folder)[0] == "gpu"


def test_priorities_go_down_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(configuration(tmp_path)))
    assert rewrite(path, {"gpu"}) == "gpu comes last: refused"
    assert rewrite(path, {"gpu"}) == ""
    assert priorities(json.loads(path.read_text()))["gpu"] == 10 - 1_000_000
    # Where both are refused, their order is as before.
    assert rewrite(path, {"gpu", "gpu-ondemand"})
    both = priorities(json.loads(path.read_text()))
    assert both["gpu"] > both["gpu-ondemand"]
    assert both["gpu"] < both["head"]
    assert rewrite(path, set())
    assert json.loads(path.read_text())["available_node_types"]["gpu"]["priority"] == 10
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
