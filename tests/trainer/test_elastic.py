"""A run whose number of ranks changes, twice by SIGKILL, takes the same steps."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

from tests.conftest import deepspeed_command
from tests.trainer.tiny import (
    TINY,
    column,
    config,
    kill_group,
    launch,
    metrics,
    paced,
    steps_taken,
    wait_until,
)
from trainer.contract import complete_checkpoints
from trainer.dataset import Dataset
from trainer.loader import Loader

STEPS = 60


def words(data: str, run: Path) -> list[str]:
    return [
        f"--data={data}",
        f"--output={run}",
        f"--schedule.steps={STEPS}",
        "--image.flip=true",
        "--deepspeed.zero_stage=0",
        "--checkpoint.every_steps=3",
        "--checkpoint.keep=1",
        "--model.layers=1",
    ]


def launch_and_kill(
    ranks: int, at_step: int, run: Path, *more: str, saved: int | None = None
) -> None:
    """Start `ranks` ranks, and kill all of them once `at_step` steps are written down
    and the checkpoint of step `saved` is complete. However late the kill comes, they
    have taken one step more at most.
    """
    begin = max((step for step, _ in complete_checkpoints(run)), default=0)

    def reached() -> bool:
        steps = [step for step, _ in complete_checkpoints(run)]
        return steps_taken(run) >= at_step and (saved is None or saved in steps)

    with subprocess.Popen(
        deepspeed_command(ranks, *TINY, *more),
        # A step's row is written once the next one's batch is there.
        env=paced(run.parent, 0.1, batches=at_step + 1 - begin),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as launcher:
        try:
            wait_until(reached, launcher)
        finally:
            kill_group(launcher)
        assert launcher.returncode == -signal.SIGKILL


def test_ranks_4_2_1_4_with_two_kills_take_the_steps_of_an_uninterrupted_run(
    mixed: Path, extra: Path, tmp_path: Path
) -> None:
    """Over two epochs of every source, with a mixture of two datasets, random crops and
    flips, and masks in the digest.
    """
    run, data = tmp_path / "run", f"[{mixed}, {extra}]"
    more = words(data, run)
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    first = draw.randrange(4, 12)
    second = draw.randrange(14, 20)
    third = draw.randrange(22, 30)
    launch_and_kill(4, first, run, *more)
    launch(2, *more, f"--max_steps={second}")
    launch_and_kill(1, third, run, *more)
    launch(4, *more)
    keys = config(mixed, run, *more)
    loader = Loader(Dataset(keys.data, "train"), keys, rank=0, world_size=1)
    pure = list(loader.steps(0, STEPS))
    assert column(run, "step") == list(range(1, STEPS + 1)), seed
    recorded = column(run, "sample_digest")
    assert recorded == [batch.counts.digest_text for batch in pure], seed
    counted = [tuple(row["sources"].values()) for row in metrics(run)]
    assert counted == [batch.counts.sources for batch in pure], seed
    last = loader.order.samples_of(STEPS - 1, loader.lanes)
    assert min(last.epochs.tolist()) >= 2
