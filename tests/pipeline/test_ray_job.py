"""The same command as a job on a cluster that others started."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.pipeline.corpora import FLAGS, REPOSITORY, run_module
from tests.pipeline.test_preprocess import files

RAY = Path(sys.executable).with_name("ray")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node of our own, on ports of its own, and the environment to reach it."""
    gcs, dashboard, client, agent, metrics = free_ports(5)
    env = {
        **os.environ,
        # As in an activated environment: jobs run the head's `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Not below pytest's folder: a Unix socket's path has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    settings = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
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
    deadline = time.monotonic() + 90
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
    started = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    _, alive = psutil.wait_procs([*started, psutil.Process(head.pid)], timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_writes_the_same_bytes(
    cluster: dict[str, str], corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "birds"
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "pipeline", source / "pipeline")
    entry = ["python", "-m", "pipeline.preprocess", f"--input={corpus}"]
    entry += [f"--output={output}", *FLAGS, "--columns.keep=mood"]
    env = {name: value for name, value in cluster.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", *entry],
        cwd=source,
        env={
            **os.environ,
            **env,
            "RAY_ADDRESS": cluster["RAY_API_SERVER_ADDRESS"],
        },
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "34 inputs" in result.stdout
    assert files(output) == files(dataset)


def test_a_driver_joins_the_cluster_of_its_environment(
    cluster: dict[str, str], corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "birds"
    flags = [*FLAGS, "--columns.keep=mood", "--workers=1"]
    result = run_module(
        "pipeline.preprocess",
        f"--input={corpus}",
        f"--output={output}",
        *flags,
        env=cluster,
    )
    assert result.returncode == 0, result.stderr
    assert files(output) == files(dataset)


def test_a_cluster_that_is_not_there_is_one_line(corpus: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    env = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    flags = [f"--input={corpus}", f"--output={tmp_path / 'out'}", *FLAGS]
    result = run_module("pipeline.preprocess", *flags, env=env)
    assert result.returncode == 1
    assert "cannot use the cluster at RAY_ADDRESS" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
