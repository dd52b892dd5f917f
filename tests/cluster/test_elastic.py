"""Nodes and drivers are killed, and the run takes the steps of an undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.raylets import Driver, Raylets, raylets, wait_until
from tests.cluster.runs import (
    TOLERANCE,
    ends,
    events,
    tiny_arguments,
    training,
    wait_for_the_last,
    world_sizes,
    write_config,
)
from tests.trainer.tiny import column, half_written, launch, steps_taken
from trainer.contract import COMPLETE, complete_checkpoints

SLOW, FAST = "0.3", "0"


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds that a step lasts at least."""
    path = tmp_path_factory.mktemp("pace") / "pace"
    path.write_text(FAST)
    return path


@pytest.fixture(scope="module")
def cluster(pace: Path) -> Iterator[Raylets]:
    with raylets(pace, nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def whole(cluster: Raylets, shards: Path, tmp_path_factory: pytest.TempPathFactory):
    """An undisturbed run on two nodes."""
    path = tmp_path_factory.mktemp("whole") / "run.yaml"
    run = write_config(path, shards, tiny_arguments())
    driver = Driver(cluster, path)
    assert driver.ends() == 0, driver.said()
    return run


def test_two_nodes_take_the_steps_of_one_launcher(
    whole: Path, cluster: Raylets, shards: Path, tmp_path: Path
) -> None:
    assert (world_sizes(whole), ends(whole)) == ([2], ["finished"])
    words = [f"--{key}={value}" for key, value in tiny_arguments().items()]
    launch(2, *words, f"--data={shards}", f"--output={tmp_path / 'run'}")
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(whole, name) == column(tmp_path / "run", name)
    assert cluster.groups() == {}
    wait_for_the_last(cluster, whole)


# Beside an autoscaler `test_run.py` keeps the same promise, in every `make test`.
@pytest.mark.soak
def test_a_run_whose_nodes_and_driver_are_killed_takes_the_steps_of_an_undisturbed_one(
    whole: Path, cluster: Raylets, pace: Path, shards: Path, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    path = tmp_path / "run.yaml"
    run = write_config(path, shards, tiny_arguments())
    pace.write_text(SLOW)
    driver = Driver(cluster, path)
    try:
        # A node, in a checkpoint if that can be hit.
        step = draw.randrange(5, 12)
        driver.reaches(lambda: steps_taken(run) >= step)
        driver.reaches(lambda: half_written(run) or steps_taken(run) > step + 5)
        draw.choice(cluster.nodes[-2:]).kill()
        driver.reaches(lambda: len(world_sizes(run)) == 2)
        cluster.add()
        driver.reaches(lambda: len(world_sizes(run)) == 3)
        assert world_sizes(run) == [2, 1, 2], seed
        assert ends(run) == ["preemption", "growth"], seed
        step = steps_taken(run) + draw.randrange(1, 12)
        driver.reaches(lambda: steps_taken(run) >= step)
        driver.kill()
        wait_until(lambda: not training(run), lambda: training(run))
        wait_until(lambda: not cluster.runners(), cluster.runners)
        wait_until(lambda: not cluster.groups(), cluster.groups)
        pace.write_text(FAST)
        driver = Driver(cluster, path)
        assert driver.ends() == 0, driver.said()
    finally:
        pace.write_text(FAST)
        driver.kill()
    assert (run / COMPLETE).is_file()
    assert column(run, "step") == column(whole, "step"), seed
    assert column(run, "sample_digest") == column(whole, "sample_digest"), seed
    for name in ("loss", "mlm_loss", "recon_loss"):
        expected = pytest.approx(column(whole, name), rel=TOLERANCE)
        assert column(run, name) == expected, seed
    steps = [one.fields["step"] for one in events(run, "attempt_started")]
    assert steps[0] == 0 < steps[1], seed
    assert steps == sorted(steps), seed
    assert cluster.groups() == {}
    wait_for_the_last(cluster, run)
    assert complete_checkpoints(run)[-1][0] == len(column(run, "step"))
