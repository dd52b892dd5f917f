"""Why attempts end, and what comes after."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.attempt import Ended
from cluster.commands import Lanes
from cluster.elastic import _Elastic, pretrain
from cluster.journal import Journal
from cluster.options import PretrainStage, RunConfig
from cluster.store import Store
from tests.cluster.raylets import Driver, Raylets, raylets
from tests.cluster.runs import (
    ends,
    events,
    ranks,
    tiny_arguments,
    training,
    wait_for_the_last,
    world_sizes,
    write_config,
)
from tests.trainer.tiny import steps_taken
from trainer.contract import (
    CHECKPOINTS,
    COMPLETE,
    METRICS,
    checkpoint_name,
    complete_checkpoints,
)


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pace") / "pace"
    path.write_text("0.4")
    return path


@pytest.fixture(scope="module")
def cluster(pace: Path) -> Iterator[Raylets]:
    with raylets(pace, nodes=2) as found:
        yield found


def test_what_the_trainer_refuses_ends_the_run_with_its_words(
    cluster: Raylets, shards: Path, tmp_path: Path
) -> None:
    """What only a rank finds out: the weights to start from are none."""
    path = tmp_path / "run.yaml"
    run = write_config(path, shards, tiny_arguments(init=str(tmp_path)))
    driver = Driver(cluster, path)
    assert driver.ends() == 1, driver.said()
    last = driver.said().splitlines()[-1]
    assert last.startswith("cluster.pretrain: error: pretrain: "), driver.said()
    assert str(tmp_path) in last
    assert ends(run) == ["failure"]
    assert cluster.groups() == {}
    wait_for_the_last(cluster, run)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with too little room for a checkpoint."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["-t", "tmpfs", "-o", "size=256k", "palimpsest-test", str(path)]
    done = subprocess.run(
        ["mount", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.soak
def test_a_full_disk_is_said(cluster: Raylets, shards: Path, full_disk: Path) -> None:
    path = full_disk / "run.yaml"
    run = write_config(path, shards, tiny_arguments(), max_nodes=1, failures=0)
    driver = Driver(cluster, path)
    try:
        assert driver.ends() == 1, driver.said()
    finally:
        driver.kill()
    last = driver.said().splitlines()[-1]
    assert "cannot write the checkpoint of step 5 below" in last
    assert "No space left on device" in last
    assert last.endswith("give the same command, which continues")
    assert cluster.groups() == {}
    wait_for_the_last(cluster, run)


def test_hangs_are_ended_notice_saves_and_failures_are_counted(
    cluster: Raylets, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    run = write_config(
        path,
        shards,
        tiny_arguments(safety__hang_minutes=0.2, checkpoint__every_steps=1000),
        failures=1,
        checkpoint_seconds=30,
    )
    driver = Driver(cluster, path)
    try:
        driver.reaches(lambda: steps_taken(run) >= 1)
        ranks(training(run))[-1].send_signal(signal.SIGSTOP)
        driver.reaches(lambda: ends(run) == ["failure"])
        assert (
            "ended with status 75" in events(run, "attempt_ended")[0].fields["detail"]
        )

        driver.reaches(lambda: len(world_sizes(run)) == 2)
        # The first attempt's steps were not saved, so they are taken again.
        driver.reaches(lambda: driver.said().count("starting: ") == 2)
        driver.reaches(lambda: steps_taken(run) >= 1)
        cluster.drain(cluster.nodes[-1], seconds=600)
        driver.reaches(lambda: len(world_sizes(run)) == 3)
        assert (world_sizes(run), ends(run)) == ([2, 2, 1], ["failure", "notice"])
        ((saved, _),) = complete_checkpoints(run)
        assert saved == events(run, "attempt_ended")[-1].fields["step"]

        (rank,) = driver.reaches(lambda: ranks(training(run)))
        rank.kill()
        assert driver.ends() == 1, driver.said()
    finally:
        driver.kill()
    last = driver.said().splitlines()[-1]
    assert "failed 2 times" in last
    assert "status 247" in last
    log = events(run, "attempt_ended")[-1].fields["log"]
    assert log in last
    assert Path(log.partition(":")[2]).is_file()
    assert cluster.groups() == {}
    wait_for_the_last(cluster, run)


def between_attempts(folder: Path, **stage: Any) -> _Elastic:
    """A run that has saved 10 of its 60 steps, and taken 13."""
    keys = PretrainStage(config="emoji", **stage)
    config = RunConfig(output=str(folder), data=str(folder), pretrain=keys)
    run = folder / "pretrain"
    saved = run / CHECKPOINTS / checkpoint_name(10)
    saved.mkdir(parents=True)
    (saved / COMPLETE).write_text("{}")
    (run / METRICS).write_text('{"step": 13}\n')
    lanes = Lanes(lanes=12, global_batch=24, group=1, steps=60, stops_early=False)
    journal = Journal(Store(str(folder)), print)
    return _Elastic(config, keys, journal, (), lanes, threading.Event())


@pytest.mark.parametrize(
    ("cause", "budget", "words"),
    [
        ("notice", "preemptions", "lost or gave notice 2 times, more than .* 1;"),
        ("preemption", "preemptions", "lost or gave notice 2 times, more than .* 1;"),
        ("growth", "failures", "failed 2 times.* after step 13.*: to 2 nodes"),
    ],
)
def test_no_way_to_end_is_taken_for_ever_without_getting_further(
    cause: str,
    budget: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.elastic._FIRST_WAIT_S", 0)
    elastic = between_attempts(tmp_path, **{budget: 1})
    ended = Ended(cause=cause, detail="to 2 nodes")
    before = elastic._stand()
    elastic._account(ended, before)
    with pytest.raises(OSError, match=words):
        elastic._account(ended, before)


def test_growing_and_getting_further_is_no_failure(tmp_path: Path) -> None:
    elastic = between_attempts(tmp_path, failures=0)
    before = dataclasses.replace(elastic._stand(), saved=9)
    elastic._account(Ended(cause="growth"), before)


def test_steps_of_an_attempt_before_prove_nothing_of_what_the_trainer_refuses(
    tmp_path: Path,
) -> None:
    """A killed run has taken steps after its checkpoint; then its keys are changed."""
    elastic = between_attempts(tmp_path)
    ended = Ended(cause="failure", refusal="it was started with another configuration")
    with pytest.raises(ValueError, match=r"^pretrain: it was started with another"):
        elastic._account(ended, elastic._stand())


def test_an_impossible_number_of_ranks_asks_for_no_node(
    shards: Path, tmp_path: Path
) -> None:
    """There is no cluster here to ask."""
    stage = PretrainStage(
        config="emoji", arguments=tiny_arguments(), ranks_per_node=5, max_nodes=3
    )
    config = RunConfig(output=str(tmp_path), data=str(shards), pretrain=stage)
    journal = Journal(Store(str(tmp_path)), print)
    with pytest.raises(ValueError, match=r"with 5 ranks each divides the 12 lanes"):
        pretrain(config, journal, stop=threading.Event())
