"""The full count of kills on an autoscaling cluster (`make soak`); `test_elastic.py`
holds a few.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.clusters import LocalCluster, local_cluster, no_namespaces
from tests.cluster.runs import (
    TOLERANCE,
    ends,
    events,
    ranks,
    tiny_arguments,
    training,
    world_sizes,
    write_config,
)
from tests.conftest import ROOT
from tests.trainer.tiny import column, half_written, launch, steps_taken
from trainer.contract import COMPLETE

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]
KILLS = 6
STEPS = 300
SLOW, FAST = "0.3", "0"
LIMIT_S = 300
SECONDS_TO_NOTICE = 60
GROUPS = """
import json, ray, ray.util
ray.init(log_to_driver=False, logging_level="ERROR")
table = ray.util.placement_group_table()
print(json.dumps([v["state"] for v in table.values() if v["state"] != "REMOVED"]))
"""


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Seconds that a step lasts at least, on every node."""
    path = tmp_path_factory.mktemp("pace") / "pace"
    path.write_text(SLOW)
    paced = Path(__file__).with_name("paced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACE", str(path))
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{paced}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield path


class Job:
    """The driver, which can be killed and started again."""

    def __init__(self, cluster: LocalCluster, config: Path, run: Path) -> None:
        self.cluster, self.config, self.run = cluster, config, run
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        with self.config.with_suffix(".log").open("a") as log:
            words = (sys.executable, "-m", "cluster.pretrain")
            self.process = self.cluster.start(
                *words, f"--config={self.config}", stdout=log, stderr=log
            )

    def said(self) -> str:
        return self.config.with_suffix(".log").read_text()

    def until(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            assert self.process
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def ends(self) -> int:
        assert self.process
        return self.process.wait(LIMIT_S)

    def has_ranks(self) -> bool:
        """Are there ranks, which may still be starting?"""
        return bool(ranks(training(self.run)))

    def has_begun(self) -> bool:
        """Has the newest attempt begun to take steps?"""
        newest = self.said().rpartition(", from step ")[2]
        return " parameters, " in newest and " ended after step " not in newest


def kill_node(job: Job, draw: random.Random) -> None:
    # An attempt may be between its end and the next one's start.
    while not (nodes := [node for node in job.cluster.nodes("gpu") if node.raylet]):
        time.sleep(0.05)
    job.cluster.kill_node(draw.choice(nodes).id)


def kill_node_in_checkpoint(job: Job, draw: random.Random) -> None:
    job.until(lambda: half_written(job.run))
    kill_node(job, draw)


def kill_rank(job: Job, draw: random.Random) -> None:
    while not (found := ranks(training(job.run))):
        time.sleep(0.05)
    with contextlib.suppress(psutil.NoSuchProcess):
        draw.choice(found).kill()


def kill_driver(job: Job, draw: random.Random) -> None:
    assert job.process
    job.process.kill()
    job.process.wait()
    job.start()


def stop_driver(job: Job, draw: random.Random) -> None:
    assert job.process
    job.process.send_signal(signal.SIGTERM)
    assert job.ends() == 143, job.said()
    assert training(job.run) == []
    job.start()


WAYS = (kill_node, kill_node_in_checkpoint, kill_rank, kill_driver, stop_driver)


def test_kills_at_random_moments_leave_the_steps_of_an_undisturbed_run(
    pace: Path, shards: Path, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    config, arguments = tmp_path / "run.yaml", tiny_arguments(schedule__steps=STEPS)
    run = write_config(config, shards, arguments, failures=KILLS)
    ways = [WAYS[number % len(WAYS)] for number in range(KILLS)]
    draw.shuffle(ways)
    with local_cluster(gpu_nodes=2, idle_seconds=10) as cluster:
        job = Job(cluster, config, run)
        for number, way in enumerate(ways):
            # At a start, in the first steps, later.
            job.until(job.has_begun if number % 3 else job.has_ranks)
            time.sleep(draw.uniform(0, 12))
            print(f"{number}: {way.__name__} after step {steps_taken(run)}")
            before = len(ends(run))
            way(job, draw)
            if way in (kill_node, kill_node_in_checkpoint, kill_rank):
                job.until(lambda before=before: len(ends(run)) > before)
        pace.write_text(FAST)
        assert job.ends() == 0, job.said()
        assert training(run) == []
        assert cluster.python(GROUPS).stdout.splitlines()[-1] == "[]"
        cluster.wait_for({})
    print(ends(run), world_sizes(run))
    assert (run / COMPLETE).is_file()
    words = [f"--{key}={value}" for key, value in arguments.items()]
    launch(2, *words, f"--data={shards}", f"--output={tmp_path / 'whole'}")
    for name in ("step", "sample_digest"):
        assert column(run, name) == column(tmp_path / "whole", name), seed
    for name in ("loss", "mlm_loss", "recon_loss"):
        expected = pytest.approx(column(tmp_path / "whole", name), rel=TOLERANCE)
        assert column(run, name) == expected, seed


@pytest.mark.skipif(no_namespaces() is not None, reason=f"{no_namespaces()}")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_cut_off_is_noticed_and_replaced(
    rank: int, pace: Path, shards: Path, tmp_path: Path
) -> None:
    pace.write_text(SLOW)
    config = tmp_path / "run.yaml"
    run = write_config(config, shards, tiny_arguments())
    flags = ("--namespaces=true",)
    with local_cluster(gpu_nodes=2, idle_seconds=10, flags=flags) as cluster:
        job = Job(cluster, config, run)
        job.until(lambda: steps_taken(run) >= 7)
        address = events(run, "attempt_started")[0].fields["nodes"][rank].split()[0]
        (cut,) = [one.id for one in cluster.nodes("gpu") if one.address == address]
        cluster.cut_off(cut)
        at = time.monotonic()
        job.until(lambda: ends(run))
        assert time.monotonic() - at < SECONDS_TO_NOTICE
        (ended,) = events(run, "attempt_ended")
        assert ended.fields["cause"] == "preemption"
        assert address in ended.fields["node"]
        pace.write_text(FAST)
        assert job.ends() == 0, job.said()
        cluster.wait_for({})
    assert training(run) == []
    assert column(run, "step") == list(range(1, 61))


def test_a_run_whose_head_is_killed_goes_on_on_another_cluster(
    pace: Path, shards: Path, tmp_path: Path
) -> None:
    """All that matters of it is on storage."""
    pace.write_text(SLOW)
    config, arguments = tmp_path / "run.yaml", tiny_arguments()
    run = write_config(config, shards, arguments)
    with local_cluster(gpu_nodes=2, idle_seconds=10) as cluster:
        job = Job(cluster, config, run)
        job.until(lambda: steps_taken(run) >= 7)
        cluster.kill_node("head")
        cluster.wait_until(lambda: not cluster.processes(), "all is gone")
        assert job.ends() != 0
        assert training(run) == []
    pace.write_text(FAST)
    with local_cluster(gpu_nodes=2, idle_seconds=10) as cluster:
        job = Job(cluster, config, run)
        assert job.ends() == 0, job.said()
        cluster.wait_for({})
    assert training(run) == []
    starts = [one.fields["step"] for one in events(run, "attempt_started")]
    assert starts[0] == 0 < starts[-1]
    words = [f"--{key}={value}" for key, value in arguments.items()]
    launch(2, *words, f"--data={shards}", f"--output={tmp_path / 'whole'}")
    for name in ("step", "sample_digest", "loss"):
        assert column(run, name) == column(tmp_path / "whole", name)


def test_a_trainer_that_still_holds_the_run_is_waited_for(
    pace: Path, shards: Path, tmp_path: Path
) -> None:
    """As one on a node that was cut off may, for a while. And a runner that answers
    nothing is taken for dead, whatever its node says.
    """
    pace.write_text(SLOW)
    config = tmp_path / "run.yaml"
    run = write_config(config, shards, tiny_arguments(), silent_seconds=8, failures=0)
    run.mkdir(parents=True)
    with local_cluster(gpu_nodes=2, idle_seconds=10) as cluster:
        with open(run / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            job = Job(cluster, config, run)
            job.until(lambda: ends(run))
        (ended,) = events(run, "attempt_ended")
        assert "another trainer is writing" in ended.fields["detail"]
        job.until(lambda: steps_taken(run) >= 3)
        runner = next(
            process
            for process in psutil.process_iter()
            if "ray::Runner" in "".join(_words(process))
            and any(process.pid in node.pids for node in cluster.nodes("gpu"))
        )
        runner.send_signal(signal.SIGSTOP)
        job.until(lambda: len(ends(run)) == 2)
        assert ends(run)[1] == "preemption"
        detail = events(run, "attempt_ended")[1].fields["detail"]
        assert "answered nothing for 8 s" in detail
        pace.write_text(FAST)
        assert job.ends() == 0, job.said()
    assert training(run) == []
    assert not runner.is_running()


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
