"""A corpus becomes a report on nodes that come when there is work, go when there is
none, and die in between; and so does the driver.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.journal import read_events
from cluster.store import Store
from cluster.trained import saved_step
from tests.cluster.clusters import LocalCluster, local_cluster
from tests.cluster.runs import (
    TOLERANCE,
    ends,
    events,
    tiny_arguments,
    world_sizes,
    write_config,
)
from tests.conftest import EMOJI, ROOT
from tests.pipeline.corpora import run_module
from tests.pipeline.s3 import S3Server
from tests.pipeline.test_preprocess import files
from tests.trainer.tiny import column, half_written, launch, steps_taken
from trainer.contract import COMPLETE, METRICS, complete_checkpoints

SLOWER, SLOW, FAST = "3", "0.4", "0"
RAY = str(Path(sys.executable).with_name("ray"))
# Ranges enough for several nodes.
CORPUS = {
    "input": str(EMOJI),
    "columns.image": "image",
    "columns.caption": "caption",
    "columns.id": "hexcode",
    "limit": 600,
    "image.size": 32,
    "tokenizer": "train:600",
    "shard.samples": 50,
    "split.val": 0.1,
    "filter.function": "tests.cluster.held:keep",
}


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds that a step lasts at least."""
    path = tmp_path_factory.mktemp("pace") / "pace"
    path.write_text(FAST)
    return path


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it is there, whoever preprocesses waits at its first input (held.py)."""
    return tmp_path_factory.mktemp("held") / "held"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(pace: Path, held: Path, server: S3Server) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        environment.setenv("PACE", str(pace))
        environment.setenv("HELD", str(held))
        environment.setenv("PYTHONPATH", str(Path(__file__).with_name("paced")))
        environment.setenv("OMP_NUM_THREADS", "1")
        with local_cluster(cpu_nodes=2, gpu_nodes=2, idle_seconds=3) as found:
            yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards and model, made by the commands alone on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = [f"--{key}={value}" for key, value in CORPUS.items()]
    made = run_module("pipeline.preprocess", *words, f"--output={folder / 'data'}")
    assert made.returncode == 0, made.stderr
    words = [f"--{key}={value}" for key, value in tiny_arguments().items()]
    launch(2, *words, f"--data={folder / 'data'}", f"--output={folder / 'pretrain'}")
    return folder


class Job:
    """`ray job submit -- python -m cluster.run`, with the repository as working dir."""

    def __init__(self, cluster: LocalCluster, config: Path, log: Path) -> None:
        self._cluster, self._log = cluster, log
        with log.open("w") as file:
            self.process = cluster.start(
                *(RAY, "job", "submit", "--working-dir", ROOT, "--"),
                *(sys.executable, "-m", "cluster.run", "--config", config),
                stdout=file,
                stderr=file,
            )

    def said(self) -> str:
        return self._log.read_text()

    def reaches(self, true: Any, what: str) -> None:
        """Wait for something that it does; fails if it ends before."""

        def looked() -> bool:
            found = bool(true())
            assert found or self.process.poll() is None, self.said()
            return found

        self._cluster.wait_until(looked, what, 300)

    def ends(self) -> int:
        return self.process.wait(400)


def configured(folder: Path, **more: Any) -> Path:
    """run.yaml beside a folder, in which its run is unless told otherwise."""
    config = {
        "output": str(folder),
        "preprocess": {"arguments": CORPUS},
        "pretrain": {
            "config": "emoji",
            "arguments": tiny_arguments(),
            "max_nodes": 2,
            "wait_seconds": 60,
            "settle_seconds": 3,
        },
        "evaluate": {"arguments": {"max_pairs": 32, "draws": 1, "examples": 2}},
        "prices": {"cpu": 1.0, "gpu": 10.0},
        "overlap_samples": 60,
        **more,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def driver_pid(run: Path) -> int:
    return int(events(run, "driver_started")[-1].fields["pid"])


def nodes_held(cluster: LocalCluster, held: Path) -> int:
    """Live nodes for preprocessing that each hold a range, as held.py says."""
    holding = {int(path.name) for path in held.parent.iterdir() if path != held}
    joined = [node for node in cluster.nodes("cpu") if node.ready and node.raylet]
    return sum(not holding.isdisjoint(node.pids) for node in joined)


def see_two_at_work(job: Job, cluster: LocalCluster, held: Path) -> None:
    """Neither node can be done, or idle, before the other is at work too."""
    job.reaches(lambda: nodes_held(cluster, held) == 2, "two nodes preprocess at once")
    held.unlink()


def lose_a_node(cluster: LocalCluster) -> None:
    """Kill a node for training; one may be starting."""
    joined = [node for node in cluster.nodes("gpu") if node.ready and node.raylet]
    cluster.kill_node(joined[-1].id)


def attempts(output: str) -> int:
    seen = read_events(Store(output))
    return sum(event.kind == "attempt_started" for event in seen)


def mentioning(output: Path) -> list[list[str]]:
    """Command lines of processes that work on the run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and any(str(output) in word for word in words):
            found.append(words)
    return found


def test_a_corpus_becomes_a_report_whatever_dies_on_the_way(
    cluster: LocalCluster,
    pace: Path,
    held: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    run = output / "pretrain"
    config = configured(output)
    assert cluster.counts() == {}
    pace.write_text(SLOW)
    held.touch()
    job = Job(cluster, config, tmp_path / "first.log")
    see_two_at_work(job, cluster, held)
    job.reaches(lambda: steps_taken(run) >= 7, "some steps")
    assert files(output / "data") == files(undisturbed / "data")
    progress = json.loads((output / "data.progress.json").read_text())
    assert progress["config"]["task_resources"] == {"cpu_node": 0.001}

    os.kill(driver_pid(run), signal.SIGKILL)
    assert job.ends() != 0
    job = Job(cluster, config, tmp_path / "second.log")
    job.reaches(lambda: len(world_sizes(run)) >= 2, "another attempt")
    job.reaches(lambda: "cpu" not in cluster.counts(), "idle nodes go while it trains")
    before = steps_taken(run)
    job.reaches(lambda: steps_taken(run) > before + 3, "more steps")
    # In a checkpoint, if that can be hit.
    while not half_written(run) and steps_taken(run) < before + 10:
        time.sleep(0.01)
        assert job.process.poll() is None, job.said()
    lose_a_node(cluster)
    # It would be at its end before a busy machine has started another node.
    pace.write_text(SLOWER)
    job.reaches(lambda: len(world_sizes(run)) >= 3, "an attempt without the node")
    job.reaches(lambda: world_sizes(run)[-1] == 2, "it grows again")
    pace.write_text(FAST)
    assert job.ends() == 0, job.said()

    assert (run / COMPLETE).is_file()
    assert (output / "report.html").is_file()
    assert "preemption" in ends(run)
    numbers = [event.fields["attempt"] for event in events(run, "attempt_started")]
    assert numbers == list(range(1, len(numbers) + 1))
    whole = undisturbed / "pretrain"
    assert column(run, "step") == column(whole, "step")
    assert column(run, "sample_digest") == column(whole, "sample_digest")
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=TOLERANCE)

    cluster.wait_for({})
    assert mentioning(output) == []
    groups = cluster.python(
        "import ray, ray.util, json\n"
        "ray.init(logging_level='ERROR')\n"
        "table = ray.util.placement_group_table().values()\n"
        "print(sorted({row['state'] for row in table}))"
    )
    assert groups.stdout.splitlines()[-1] == "['REMOVED']"

    done = cluster.run(sys.executable, "-m", "cluster.status", output, "--json")
    found = json.loads(done.stdout)
    assert found["state"] == "finished"
    assert [stage["state"] for stage in found["stages"]] == ["done"] * 3
    assert [one["cause"] for one in found["restarts"]] == ends(run)[:-1]
    assert found["costs"]["gpu"] > 0
    # Submitted again, it does nothing again.
    again = Job(cluster, config, tmp_path / "third.log")
    assert again.ends() == 0, again.said()
    assert len(ends(run)) == len(found["restarts"]) + 1


def test_a_job_that_is_stopped_saves_and_another_is_refused_beside_it(
    cluster: LocalCluster, pace: Path, shards: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    run = write_config(
        config, shards, tiny_arguments(checkpoint__every_steps=1000), max_nodes=1
    )
    # The second job takes its time to find out, and so does `ray job stop`.
    pace.write_text("2")
    job = Job(cluster, config, tmp_path / "first.log")
    job.reaches(lambda: events(run, "driver_started"), "its driver works")
    second = Job(cluster, config, tmp_path / "second.log")
    assert second.ends() != 0
    assert "another driver works on" in second.said()
    job.reaches(lambda: steps_taken(run) >= 1, "a step")

    (number,) = set(re.findall(r"raysubmit_\w+", job.said()))
    stopped = cluster.run(RAY, "job", "stop", number)
    assert stopped.returncode == 0, stopped.stdout
    job.ends()
    ((saved, _),) = complete_checkpoints(run)
    assert saved == steps_taken(run)
    assert ends(run) == ["stopped"]

    pace.write_text(FAST)
    again = Job(cluster, config, tmp_path / "again.log")
    assert again.ends() == 0, again.said()
    assert [one.fields["step"] for one in events(run, "attempt_started")] == [0, saved]
    assert column(run, "step") == list(range(1, 61))


def test_on_object_storage_training_follows_shards_and_outlives_a_node(
    cluster: LocalCluster,
    server: S3Server,
    pace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes share nothing but a bucket, and training begins before the shards are all
    made.
    """
    output = f"{server.bucket(monkeypatch)}/run"
    run = f"{output}/pretrain"
    # Shards are committed as they come where nothing is compared across the corpus.
    corpus = {k: v for k, v in CORPUS.items() if k != "columns.id"} | {"split.val": 0}
    config = configured(
        tmp_path / "run",
        output=output,
        preprocess={"arguments": corpus},
        overlap=True,
        evaluate={"arguments": {"split": "train", "max_pairs": 32, "draws": 1}},
    )
    pace.write_text(SLOW)
    job = Job(cluster, config, tmp_path / "job.log")
    job.reaches(lambda: saved_step(run) >= 10, "a checkpoint")
    lose_a_node(cluster)
    job.reaches(lambda: attempts(output) > 1, "an attempt without the node")
    pace.write_text(FAST)
    assert job.ends() == 0, job.said()

    seen = read_events(Store(output))
    stages = Counter(
        (event.fields["stage"], event.kind)
        for event in seen
        if event.kind.startswith("stage_")
    )
    done = ("stage_started", "stage_finished")
    names = ("preprocess", "pretrain", "evaluate")
    assert stages == {(name, kind): 1 for name in names for kind in done}
    first = [event for event in seen if event.kind == "stage_started"]
    assert [event.fields["stage"] for event in first[:2]] == list(names[:2])
    made = next(event for event in seen if event.kind == "stage_finished")
    assert made.fields["stage"] == "preprocess"
    assert made.time > first[1].time, "training waited for the last shard"
    rows = (Store(run).read(METRICS) or b"").splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == list(range(1, tiny_arguments()["schedule.steps"] + 1))
    assert Store(run).read(COMPLETE)
    assert b"<html" in (Store(output).read("report.html") or b"")
    # Nothing of the run is left on the driver's disk.
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_before_any_node_starts(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    cluster.wait_for({})
    output = tmp_path / "run"
    config = configured(output, prices={"gpo": 1})
    done = cluster.run(sys.executable, "-m", "cluster.run", "--config", config)
    assert done.returncode == 1
    assert "Did you mean 'gpu'?" in done.stdout
    assert not output.exists() or not list(output.iterdir())
    assert cluster.counts() == {}
