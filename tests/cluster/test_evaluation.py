"""What is said where the last stage, or an attempt, fails for a reason of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import evaluation
from cluster.attempt import Attempt
from cluster.options import EvaluateStage, PretrainStage, RunConfig


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_an_error_on_a_sound_node_is_said_and_is_no_lost_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(evaluation, "_measure", fails)
    config = RunConfig(
        output=str(tmp_path),
        data=str(tmp_path),
        pretrain=PretrainStage(config="emoji"),
        evaluate=EvaluateStage(),
    )
    stop = threading.Event()
    with pytest.raises(OSError, match=r"^evaluate: the disk is full$"):
        evaluation.measure(config, [], tell=print, stop=stop)

    attempt = Attempt(None, started=print, tell=print, stop=stop)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="full") as caught:
        ray.get(ray.remote(fails).remote())
    ended = attempt._not_started(caught.value)
    assert (ended.cause, ended.detail) == ("failure", "no start: the disk is full")
