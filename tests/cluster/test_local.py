"""The local cluster grows, shrinks, replaces what dies, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import local, local_lifecycle, local_processes, local_status
from cluster.local_cluster import TOKEN, write_token
from cluster.local_options import LocalConfig
from cluster.namespaces import Network
from pipeline.config import ConfigError
from tests.cluster.clusters import NAME, LocalCluster, local_cluster
from tests.conftest import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
# Tasks that want more than the head: it has no CPU.
TYPES = """
import json, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
def cpu():
    import time
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=1, num_gpus=1, resources={"gpu_node": 1})
def gpu():
    return ray.get_runtime_context().get_node_id()

pending = [cpu.options(resources={"cpu_node": 1}).remote() for _ in range(4)]
used = ray.get(pending + [gpu.remote()])
labels = {n["NodeID"]: n["Labels"]["ray.io/node-group"] for n in ray.nodes()}
print("USED", json.dumps(sorted({(labels[node], node) for node in used})))
"""
# Demand for two nodes that lasts, and restarts what dies with one.
ACTORS = """
import ray, time
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"cpu_node": 1}, max_restarts=-1, max_task_retries=-1)
class Actor:
    def ready(self):
        return True

actors = [Actor.remote() for _ in range(2)]
ray.get([actor.ready.remote() for actor in actors])
print("READY", flush=True)
time.sleep(3600)
"""
# Three tasks for the one node that there can be.
WAITING = """
import ray, time
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"gpu_node": 1})
def wait():
    time.sleep(3600)

ray.get([wait.remote() for _ in range(3)])
"""
# A job that leaves a process of its own session, of a parent that has ended.
JOB = """
import os, ray, subprocess, sys, time
ray.init(log_to_driver=False)
subprocess.run(["setsid", "-f", "sleep", "3601"], check=True)
print("JOB RUNS", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(cpu_nodes=2, gpu_nodes=1, idle_seconds=2) as started:
        yield started


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder whose path is short."""
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as folder:
        yield Path(folder)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.local", *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


def where(cluster: LocalCluster) -> tuple[str, str]:
    return f"--state={cluster.folder.parent}", f"--name={NAME}"


def submit_job(cluster: LocalCluster) -> None:
    words = (RAY, "job", "submit", "--", sys.executable, "-c", JOB)
    job = cluster.start(*words, stdout=subprocess.PIPE)
    assert job.stdout
    assert "JOB RUNS\n" in job.stdout


def lives(process: psutil.Process) -> bool:
    """Whether it runs and is not on its way out, with its memory and files gone."""
    with suppress(psutil.Error):
        return local_processes.runs(process) and process.memory_info().vms > 0
    return False


def traces(folder: Path) -> dict[int, str]:
    """Processes with the folder in command, environment or open files, in any way."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            links = [os.readlink(link) for link in (path / "fd").iterdir()]
        except OSError:
            continue
        if f"{folder}/".encode() in text or any(str(folder) in link for link in links):
            found[int(path.name)] = text[:200].decode(errors="replace")
    return found


def test_it_grows_from_the_head_with_pending_tasks_and_shrinks_back(
    cluster: LocalCluster,
) -> None:
    assert [node.type for node in cluster.nodes()] == ["head"]
    done = cluster.python(TYPES)
    assert done.returncode == 0, done.stdout
    used = json.loads(done.stdout.rpartition("USED ")[2])
    kinds = [kind for kind, _ in used]
    assert kinds.count("gpu") == 1
    # At times the second node comes when the first has done the work.
    assert kinds.count("cpu") in (1, 2)
    cluster.wait_for({})
    cluster.wait_until(lambda: len(cluster.nodes()) == 1, "the head alone")


def test_killed_nodes_leave_nothing_and_others_come(cluster: LocalCluster) -> None:
    """One by its raylet, like a machine that crashes, and one by its keeper."""
    driver = cluster.start(sys.executable, "-c", ACTORS, stdout=subprocess.PIPE)
    assert driver.stdout
    assert any("READY" in line for line in driver.stdout)
    before = cluster.nodes("cpu")
    lost = [process for node in before for process in cluster.processes(node.id)]
    cluster.kill_node(before[0].id)
    assert before[1].keeper
    os.kill(before[1].keeper, signal.SIGKILL)
    cluster.wait_for_end(lost)
    cluster.wait_for({"cpu": 2})
    after = {node.id for node in cluster.nodes("cpu")}
    assert not after & {node.id for node in before}
    driver.kill()
    cluster.wait_for({})


def test_a_job_is_submitted_with_what_up_prints(cluster: LocalCluster) -> None:
    code = "import os; print('TYPE', os.environ['RAY_NODE_TYPE_NAME'])"
    done = cluster.run(RAY, "job", "submit", "--", "python", "-c", code)
    assert done.returncode == 0, done.stdout
    assert "TYPE head" in done.stdout


def test_without_the_token_nobody_gets_in(cluster: LocalCluster) -> None:
    mode = (cluster.folder / TOKEN).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert cluster.cluster.dashboard.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.cluster.dashboard}/api/jobs/", timeout=60)


def test_up_again_says_that_it_is_up(cluster: LocalCluster) -> None:
    keys = ("--cpu-nodes=2", "--gpu-nodes=1", "--idle-seconds=2")
    again = command("up", *where(cluster), *keys)
    assert again.returncode == 0
    assert "is up already" in again.stderr
    assert f"export RAY_ADDRESS={cluster.cluster.address}" in again.stdout
    other = command("up", *where(cluster), "--cpu-nodes=1")
    assert other.returncode == 1
    assert "up already with --cpu_nodes=2" in other.stderr
    assert f"down --state {cluster.folder.parent}" in other.stderr


def test_status_shows_nodes_and_what_waits(cluster: LocalCluster) -> None:
    driver = cluster.start(sys.executable, "-c", WAITING)
    cluster.wait_for({"gpu": 1})
    deadline = time.monotonic() + 240
    while True:
        done = command("status", *where(cluster), "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        rows = {row["id"]: row for row in found["nodes"]}
        # One that was idle for too long before it was used is replaced.
        (gpu,) = [row for row in rows.values() if row["type"] == "gpu"] or [{}]
        wanted = {"count": 2, "resources": {"CPU": 1.0, "gpu_node": 1.0}}
        waits = [{k: row[k] for k in wanted} for row in found["waiting"]]
        busy = gpu.get("resources", {}).get("gpu_node") == {"used": 1.0, "total": 1.0}
        if busy and wanted in waits:
            break
        assert time.monotonic() < deadline, found
    assert gpu["raylet"] in gpu["pids"]
    assert rows["head"]["raylet"] not in gpu["pids"]
    text = command("status", *where(cluster)).stdout
    assert "1 of at most 1 gpu nodes" in text
    assert "waiting: 2 x {" in text
    driver.kill()


def test_down_leaves_nothing_even_after_kills() -> None:
    with local_cluster(cpu_nodes=2, idle_seconds=600) as cluster:
        cluster.start(sys.executable, "-c", ACTORS)
        submit_job(cluster)
        cluster.wait_for({"cpu": 2})
        processes = cluster.processes()
        for started in cluster.started:
            started.kill()
        # The head with all that could clear up after it, and one node's keeper.
        head, node, _ = cluster.nodes()
        words = {}
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                words[process.pid] = " ".join(process.cmdline())
        assert "sleep 3601" in words.values()
        monitor = [pid for pid in words if "v2/monitor.py" in words[pid]]
        assert len(monitor) == 1
        for pid in (head.keeper, *monitor, node.keeper, head.raylet):
            assert pid
            os.kill(pid, signal.SIGKILL)
        done = command("down", *where(cluster))
        assert done.returncode == 0, done.stderr
        assert not [process for process in processes if lives(process)]
        assert not traces(cluster.folder)
        assert not cluster.folder.exists()
        assert "no cluster at" in command("down", *where(cluster)).stderr


def test_down_ends_the_head_of_an_up_that_was_killed(state: Path) -> None:
    """In the middle of its start, and by a signal that leaves it no time."""
    given = (f"--state={state}", f"--name={NAME}")
    starting = subprocess.Popen(
        [sys.executable, "-m", "cluster.local", "up", *given],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while len(local_processes.members(state / NAME)) < 3:
        assert starting.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starting.kill()
    starting.wait()
    left = local_processes.members(state / NAME)
    assert left
    done = command("down", *given)
    assert done.returncode == 0, done.stderr
    assert not [process for process in left if local_processes.runs(process)]
    assert not traces(state / NAME)
    assert not (state / NAME).exists()


def test_what_a_dead_cluster_has_left_is_cleared_away() -> None:
    """A head that ends by itself ends its cluster; `up` starts another in its place."""
    with local_cluster(cpu_nodes=1, idle_seconds=2) as cluster:
        submit_job(cluster)
        head = cluster.kill_node("head")
        cluster.wait_until(lambda: not cluster.processes(), "all is gone")
        assert "no cluster is up" in command("status", *where(cluster)).stderr
        keys = ("--cpu-nodes=1", "--idle-seconds=2", "--start-seconds=300")
        again = command("up", *where(cluster), *keys)
        assert again.returncode == 0, again.stderr
        assert "clearing away" in again.stderr
        assert cluster.nodes("head")[0].raylet != head.raylet


def test_a_head_that_does_not_start_leaves_nothing(state: Path) -> None:
    done = command("up", f"--state={state}", f"--name={NAME}", "--start-seconds=1")
    assert done.returncode == 1
    assert "give it longer (--start-seconds)" in done.stderr
    assert not traces(state / NAME)
    assert not (state / NAME).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cpu-nodes=0", "give --cpu-nodes or --gpu-nodes"),
        ("--cpu-nodes=-1", "cpu_nodes is -1: it must be 0 or more"),
        ("--gpu-node=2", "Did you mean 'gpu_nodes'?"),
        ("--name=../x", "use lower-case letters"),
        ("--state=/tmp/" + "x" * 60, "give a shorter --state"),
        ("--dead-after-seconds=1", "must be 8 or more"),
        ("--namespaces --cpu-nodes=300", "at most 250"),
        ("--object-store-mb=10", "object_store_mb is 10: it must be 80 or more"),
    ],
)
def test_wrong_keys_name_their_cure(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        local.main(["up", *words.split()])


def test_a_cluster_too_large_for_the_machine_is_not_started(state: Path) -> None:
    done = command("up", f"--state={state}", f"--name={NAME}", "--cpu-nodes=100000")
    assert done.returncode == 1
    assert "MB of memory are free" in done.stderr
    assert not (state / NAME).exists()


@pytest.mark.parametrize("action", ["up", "down"])
def test_a_folder_of_something_else_is_left_alone(action: str, state: Path) -> None:
    precious = state / NAME / "precious"
    precious.parent.mkdir()
    precious.touch()
    # Many things have a file of this name.
    precious.with_name("token").touch()
    done = command(action, f"--state={state}", f"--name={NAME}")
    assert done.returncode == 1
    assert "is no cluster's: give another" in done.stderr
    assert precious.exists()


def test_who_is_killed_while_clearing_leaves_what_can_be_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NAME
    (folder / "head").mkdir(parents=True)
    (folder / "autoscaler.json").touch()
    write_token(folder, "secret")

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            local_lifecycle.down(folder, tell=print)
    local_lifecycle.down(folder, tell=print)
    assert not folder.exists()


def test_a_keeper_is_known_after_the_clock_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = psutil.Process()
    began = local_processes.began(process)
    assert local_processes.same_process(process.pid, began)
    # What Linux derives the time of day of a process's birth from moves with the clock.
    set_back = psutil.boot_time() - 5
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: set_back)
    assert local_processes.same_process(process.pid, began)
    assert not local_processes.same_process(process.pid, began + 5)


def test_status_of_no_cluster_names_the_flags_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"local up --state {tmp_path} --name {NAME}"):
        local_status.status(tmp_path / NAME, json=False)


def test_without_root_namespaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OSError, match="--namespaces needs"):
        Network(folder=LocalConfig(action="up").folder).create()
