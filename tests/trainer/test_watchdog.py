from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.trainer.test_safety import with_faults
from tests.trainer.tiny import config
from trainer.contract import complete_checkpoints
from trainer.watchdog import Heartbeat, Watchdog, waiting


def beat(rank: int, begun: int, stage: str = "data") -> Heartbeat:
    return Heartbeat(rank=rank, step=7, stage=stage, begun=begun, since=time.time())


def test_who_has_begun_the_fewest_stages_is_waited_for() -> None:
    others = [beat(0, 12), beat(1, 9), beat(3, 10)]
    assert waiting(beat(2, 12), others).startswith("it waits: rank 1 has been in data")
    assert "rank 3" not in waiting(beat(2, 12), others)
    said = waiting(beat(1, 9), [beat(0, 12, "all-reduce"), beat(2, 12)])
    assert said.startswith("the others wait for it: rank 0 has been in all-reduce")
    assert "no rank is behind" in waiting(beat(0, 12), [beat(1, 12)])


def test_a_hanging_rank_and_its_stage_are_named_and_the_run_ends(
    shards: Path, tmp_path: Path
) -> None:
    run, fifo = tmp_path / "run", tmp_path / "fifo"
    os.mkfifo(fifo)
    done = with_faults(
        2,
        {"hang": 3, "rank": 1, "fifo": str(fifo)},
        f"--data={shards}",
        f"--output={run}",
        "--checkpoint.every_steps=1",
        "--safety.hang_minutes=0.2",
    )
    assert done.returncode != 0
    assert "rank 1 has been in data of step 3 for " in done.stdout
    assert "read_bytes" in done.stdout, "the stack of its main thread"
    assert "it waits: rank 1 has been in data of step 3" in done.stdout
    assert "rank 0 has been in all-reduce after data of step 3" in done.stdout
    assert [step for step, _ in complete_checkpoints(run)] == [1, 2]


def test_a_slow_rank_is_left_alone_and_a_warning_does_not_end_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--safety.hang_minutes=0.07", "--safety.hang_action=warn")
    watched = config(tmp_path, tmp_path / "run", *words)
    with Watchdog(watched, rank=0, world_size=1) as watch:
        # In all for longer than any one stage may take.
        for step in range(50):
            watch.at("data", step)
            time.sleep(0.1)
        assert "has been in" not in capfd.readouterr().err
        watch.at("checkpoint", 7)
        said, deadline = "", time.monotonic() + 240
        while "has been in" not in said:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            said += capfd.readouterr().err
    assert said.count("rank 0 has been in checkpoint of step 7") == 1
    assert "test_watchdog.py" in said
    beat = json.loads((tmp_path / "run" / "watchdog" / "rank-00000.json").read_text())
    assert (beat["stage"], beat["step"]) == ("checkpoint", 7)
