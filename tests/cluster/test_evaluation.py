"""What is said where the last stage fails for a reason of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray

from cluster.commands import evaluate_words
from cluster.driver import Stopped
from cluster.evaluation import measure
from cluster.options import EvaluateStage, PretrainStage, RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        output=str(tmp_path),
        data=str(tmp_path),
        pretrain=PretrainStage(config="emoji"),
        evaluate=EvaluateStage(),
    )


@pytest.mark.usefixtures("local_ray")
def test_what_the_command_refuses_is_said_in_its_words(config: RunConfig) -> None:
    assert config.evaluate
    words = evaluate_words(config.evaluate, run=config.trained, data=config.shards)
    with pytest.raises(ValueError, match=r"^evaluate: .*pretrain"):
        measure(config, words, tell=print, stop=threading.Event())
    # Nothing of it is left that would keep a node.
    while ray.available_resources().get("CPU") != 1:
        time.sleep(0.1)


@pytest.mark.usefixtures("local_ray")
def test_a_stop_ends_it_also_while_it_waits_for_a_node(config: RunConfig) -> None:
    stop = threading.Event()
    threading.Timer(3, stop.set).start()
    waiting = RunConfig(
        output=config.output,
        data=config.data,
        pretrain=config.pretrain,
        evaluate=EvaluateStage(cpus=64),
    )
    with pytest.raises(Stopped):
        measure(waiting, [], tell=print, stop=stop)
