"""A runner's launcher: two of them train together, stop when asked, end when told."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.runner import Launch, Runner, State, environment, hostfile, interface
from tests.cluster.raylets import wait_until
from tests.cluster.runs import ranks
from tests.trainer.tiny import TINY, steps_taken
from trainer.contract import complete_checkpoints

ADDRESS = "127.0.0.1"


def launch(folder: Path, *words: str, node: int = 0, port: int = 0) -> Launch:
    return Launch(
        node=node,
        nodes=2,
        ranks=1,
        own=ADDRESS,
        first=ADDRESS,
        port=port,
        words=words,
        log=str(folder / "logs" / f"node-{node}.log"),
    )


@pytest.fixture
def runners() -> Iterator[list[Runner]]:
    found = [Runner(), Runner()]
    yield found
    for runner in found:
        assert runner.kill()


def until_ended(runner: Runner) -> tuple[State, str]:
    """The last state, and all that was said."""
    said = ""

    def ended() -> State | None:
        nonlocal said
        state = runner.state()
        said += state.said
        return state if state.status is not None else None

    return wait_until(ended, lambda: said), said


def below_this() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_two_runners_train_together_and_stop_after_a_step(
    shards: Path, tmp_path: Path, runners: list[Runner]
) -> None:
    run = tmp_path / "run"
    words = (*TINY, "--schedule.steps=100000", f"--data={shards}", f"--output={run}")
    words += ("--checkpoint.every_steps=100000", "--eval.every_steps=0")
    port = runners[0].free_port(ADDRESS)
    for node, runner in enumerate(runners):
        runner.start(launch(tmp_path, *words, node=node, port=port))
    said: list[str] = []

    def training() -> bool:
        states = [runner.state() for runner in runners]
        said.extend(state.said for state in states)
        assert all(state.status is None for state in states), "".join(said)
        return steps_taken(run) > 2

    wait_until(training, lambda: "".join(said))
    assert len(ranks(below_this())) == 2
    runners[1].stop()
    for runner in runners:
        state, more = until_ended(runner)
        assert state.status == 143, more
        assert state.ended
    ((step, _),) = complete_checkpoints(run)
    assert step == steps_taken(run)
    assert "2 ranks on cpu" in "".join(said)
    assert ranks(below_this()) == []
    assert list((tmp_path / "logs").glob("*.hosts")) == []


def test_what_the_trainer_refuses_is_in_the_last_answer(
    tmp_path: Path, runners: list[Runner]
) -> None:
    alone = dataclasses.replace(launch(tmp_path, "--config=emojy"), nodes=1)
    runners[0].start(alone)
    state, said = until_ended(runners[0])
    assert state.status == 2
    assert "trainer.pretrain: error: --config 'emojy' is not a file" in said
    assert runners[0].state().said == "", "nothing is said twice"


def test_a_node_that_does_not_see_the_run_refuses_to_start(
    tmp_path: Path, runners: list[Runner]
) -> None:
    elsewhere = launch(tmp_path / "not" / "mounted" / "here")
    with pytest.raises(ValueError, match=r"does not see .* a folder that all nodes"):
        runners[0].start(elsewhere)
    assert runners[0].state().status is None


def test_a_port_that_is_taken_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind((ADDRESS, 0))
        taken.listen()
        free.bind((ADDRESS, 0))
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        choose = iter(ports).__next__
        monkeypatch.setattr("cluster.runner.random.choice", lambda _: choose())
        assert Runner().free_port(ADDRESS) == ports[1]


def test_nodes_of_one_host_have_names_of_their_own(tmp_path: Path) -> None:
    assert hostfile(launch(tmp_path)) == "node-0 slots=1\nnode-1 slots=1\n"


def test_ranks_talk_over_the_interface_of_the_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found = environment(launch(tmp_path))
    assert found["GLOO_SOCKET_IFNAME"] == "lo" == interface(ADDRESS)
    assert found["OMP_NUM_THREADS"] == "1"
    assert "LOCAL_RANK" not in found
