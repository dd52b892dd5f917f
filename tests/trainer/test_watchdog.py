from __future__ import annotations

import os
import time
from pathlib import Path

from tests.trainer.test_safety import with_faults
from tests.trainer.tiny import metrics
from trainer.watchdog import Heartbeat, waiting


def beat(rank: int, begun: int, stage: str = "data") -> Heartbeat:
    return Heartbeat(rank=rank, step=7, stage=stage, begun=begun, since=time.time())


def test_who_has_begun_the_fewest_stages_is_waited_for() -> None:
    others = [beat(0, 12), beat(1, 9), beat(3, 10)]
    assert waiting(beat(2, 12), others).startswith("it waits: rank 1 has been in data")
    assert "rank 3" not in waiting(beat(2, 12), others)
    said = waiting(beat(1, 9), [beat(0, 12, "all-reduce"), beat(2, 12)])
    assert said.startswith("the others wait for it: rank 0 has been in all-reduce")
    assert "no rank is behind" in waiting(beat(0, 12), [beat(1, 12)])


def test_a_hanging_rank_and_its_stage_are_named_and_the_run_can_go_on(
    shards: Path, tmp_path: Path
) -> None:
    run, fifo = tmp_path / "run", tmp_path / "fifo"
    os.mkfifo(fifo)
    words = (
        f"--data={shards}",
        f"--output={run}",
        "--max_steps=4",
        "--checkpoint.every_steps=1",
    )
    hang = {"hang": 3, "rank": 1, "fifo": str(fifo)}
    done = with_faults(2, hang, *words, "--safety.hang_minutes=0.05")
    assert done.returncode != 0
    assert "rank 1 has been in data of step 3 for 0.0" in done.stdout
    assert "read_bytes" in done.stdout, "the stack of its main thread"
    assert "it waits: rank 1 has been in data of step 3" in done.stdout
    assert "rank 0 has been in all-reduce after data of step 3" in done.stdout
    assert "resuming after step 2" in with_faults(2, {}, *words).stdout
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
