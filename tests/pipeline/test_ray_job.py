"""The same command as a job on a cluster that others started."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port
from tests.pipeline.corpora import FLAGS, REPOSITORY, run_module
from tests.pipeline.test_preprocess import files

RAY = Path(sys.executable).with_name("ray")


LIMIT_S = 480


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """Where the node of the cluster tells its metrics."""
    return free_port()


@pytest.fixture(scope="module")
def cluster(metrics_port: int) -> Iterator[dict[str, str]]:
    """A head node of our own, on ports of its own, and the environment to reach it."""
    gcs, dashboard, client, agent = (free_port() for _ in range(4))
    env = {
        **os.environ,
        # As in an activated environment: jobs run the head's `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
    }
    # Not below pytest's folder: a Unix socket's path has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    settings = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics_port,
        "num-cpus": 2,
        "temp-dir": folder,
        "include-dashboard": "true",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with Path(folder, "start.log").open("w") as log:
        head = subprocess.Popen(
            [str(RAY), "start", "--head", "--block", *flags],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + LIMIT_S
    listed = [str(RAY), "job", "list", "--address", address]
    while subprocess.run(listed, env=env, capture_output=True, check=False).returncode:
        assert head.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield {
        "RAY_AUTH_MODE": env["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN": env["RAY_AUTH_TOKEN"],
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": address,
    }
    end(head)
    shutil.rmtree(folder, ignore_errors=True)


def end(node: subprocess.Popen[bytes]) -> None:
    """Stop `ray start --block` and whatever it started."""
    started: list[psutil.Process] = []
    # It may have ended by itself.
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(node.pid)
        started = [*head.children(recursive=True), head]
    node.terminate()
    _, alive = psutil.wait_procs(started, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def await_nodes(cluster: dict[str, str], count: int) -> None:
    """Return once so many nodes are alive."""
    script = (
        "import ray, time; ray.init(log_to_driver=False, logging_level='ERROR')\n"
        f"while sum(node['Alive'] for node in ray.nodes()) != {count}: time.sleep(0.2)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **cluster},
        timeout=LIMIT_S,
        check=True,
    )


def submit(
    cluster: dict[str, str], folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of the command, from a working directory in `folder`."""
    source = folder / "source"
    shutil.copytree(REPOSITORY / "pipeline", source / "pipeline")
    entry = ["python", "-m", "pipeline.preprocess", *arguments]
    env = {name: value for name, value in cluster.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", *entry],
        cwd=source,
        env={
            **os.environ,
            **env,
            "RAY_ADDRESS": cluster["RAY_API_SERVER_ADDRESS"],
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_a_submitted_job_writes_the_same_bytes(
    cluster: dict[str, str], corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "birds"
    flags = (f"--output={output}", *FLAGS, "--columns.keep=mood")
    result = submit(cluster, tmp_path, f"--input={corpus}", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "34 inputs" in result.stdout
    assert files(output) == files(dataset)


def test_a_job_refuses_an_output_that_would_be_lost_with_it(
    cluster: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    result = submit(cluster, tmp_path, f"--input={corpus}", "--output=birds", *FLAGS)
    assert result.returncode == 1
    assert "--output birds is relative" in result.stdout
    assert "Traceback" not in result.stdout


def test_an_output_that_another_node_does_not_see_is_refused(
    cluster: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    # A node for which another disk lies there.
    hidden = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs none '{shared}'"
    if (
        not shutil.which("unshare")
        or subprocess.run([*hidden, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no mounts of its own here (unshare --mount)")
    join = [str(RAY), "start", f"--address={cluster['RAY_ADDRESS']}", "--block"]
    join += ["--num-cpus=1"]
    with (tmp_path / "node.log").open("w") as log:
        node = subprocess.Popen(
            [*hidden, f'{mount} && exec "$0" "$@"', *join],
            env={**os.environ, **cluster},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        await_nodes(cluster, 2)
        output = shared / "birds"
        result = run_module(
            "pipeline.preprocess",
            *(f"--input={corpus}", f"--output={output}", *FLAGS),
            env=cluster,
        )
    finally:
        end(node)
        await_nodes(cluster, 1)
    assert result.returncode == 1
    assert f"--output {output} is not the same folder on node" in result.stderr
    assert result.stderr.rstrip().endswith("a URL such as s3://bucket/folder")
    assert "Traceback" not in result.stderr
    assert list(shared.iterdir()) == []


def metrics(port: int) -> str:
    """What the node tells a Prometheus that asks; nothing while it does not answer."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as found,
    ):
        return str(found.read().decode())
    return ""


def test_a_driver_joins_the_cluster_and_tells_it_its_figures(
    cluster: dict[str, str],
    metrics_port: int,
    corpus: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "birds"
    flags = [*FLAGS, "--columns.keep=mood", "--workers=1"]
    command = [f"--input={corpus}", f"--output={output}", *flags]
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipeline.preprocess", *command],
        cwd=REPOSITORY,
        env={**os.environ, **cluster, "RAY_metrics_report_interval_ms": "500"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # What the driver was at, as Prometheus finds it.
    wanted = (
        r'ray_palimpsest_preprocess_done\{.*phase="preprocess".*\} \d',
        r'ray_palimpsest_preprocess_failed\{.*reason="missing_file".*\} 3',
    )
    told, deadline = "", time.monotonic() + LIMIT_S
    # The node takes in what drivers tell it after a while, and keeps it for a while.
    while driver.poll() is None or not (
        driver.returncode or all(re.search(one, told) for one in wanted)
    ):
        assert time.monotonic() < deadline, told[-4000:]
        told += metrics(metrics_port)
        time.sleep(0.2)
    stdout, stderr = driver.communicate()
    assert driver.returncode == 0, stderr
    assert "34 inputs" in stdout
    assert files(output) == files(dataset)


def test_a_cluster_that_is_not_there_is_one_line(corpus: Path, tmp_path: Path) -> None:
    env = {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    flags = [f"--input={corpus}", f"--output={tmp_path / 'out'}", *FLAGS]
    result = run_module("pipeline.preprocess", *flags, env=env)
    assert result.returncode == 1
    assert "cannot use the cluster at RAY_ADDRESS" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
