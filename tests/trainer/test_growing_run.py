"""Training beside a preprocess job that is still committing shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.manifest import load_manifest
from tests.conftest import EMOJI, ROOT, deepspeed_command, launch_environment
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    launch,
    steps_taken,
    wait_until,
)
from trainer.data_state import DataState
from trainer.dataset import Dataset
from trainer.loader import Loader

STEPS = 400
# Enough to begin an epoch that all shards are in.
MORE = 130


def shards_of(dataset: Path) -> int:
    try:
        return len(load_manifest(dataset, allow_incomplete=True).shards)
    except ValueError:
        return 0


def suspend(job: subprocess.Popen[str], dataset: Path) -> int:
    """SIGSTOP, but not while the job replaces the manifest; how many shards it has."""
    while True:
        os.kill(job.pid, signal.SIGSTOP)
        while psutil.Process(job.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if found := shards_of(dataset):
            return found
        os.kill(job.pid, signal.SIGCONT)
        time.sleep(0.01)


@contextmanager
def standing_still(launcher: subprocess.Popen[str]) -> Iterator[None]:
    """Hold up the ranks, with what they have started, in the middle of their steps."""
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    for process in ranks:
        process.suspend()
    yield
    for process in ranks:
        process.resume()


def state_after(run: Path, step: int) -> DataState:
    (marker,) = sorted((run / "checkpoints").glob(f"*{step}/complete.json"))
    return DataState.from_plain(json.loads(marker.read_text()))


def test_training_follows_a_job_that_is_committing_shards(tmp_path: Path) -> None:
    """The job is held up while the first epochs run, and then goes on to its end."""
    dataset, run = tmp_path / "shards", tmp_path / "run"
    job_log, train_log = tmp_path / "job.txt", tmp_path / "train.txt"
    preprocess = [
        *(sys.executable, "-m", "pipeline.preprocess"),
        *("--input", str(EMOJI), "--output", str(dataset)),
        *("--columns.image=image", "--columns.caption=caption", "--limit=1500"),
        *("--image.size=32", "--tokenizer=train:600", "--shard.samples=50"),
        *("--split.val=0", "--workers=1"),
    ]
    train = [
        *(f"--data={dataset}", f"--output={run}", "--grow=true"),
        *(f"--schedule.steps={STEPS + MORE}", "--model.layers=1"),
    ]
    with (
        job_log.open("w") as job_file,
        train_log.open("w") as train_file,
        subprocess.Popen(
            preprocess, cwd=ROOT, text=True, stdout=job_file, stderr=job_file
        ) as job,
    ):
        wait_until(lambda: shards_of(dataset) > 0, job, job_log.read_text)
        try:
            first = suspend(job, dataset)
            with subprocess.Popen(
                deepspeed_command(2, *TINY, *train, f"--max_steps={STEPS}"),
                text=True,
                env=launch_environment(),
                stdout=train_file,
                stderr=train_file,
            ) as trainer:
                wait_until(lambda: steps_taken(run) > 9, trainer, train_log.read_text)
                # Steps are quick: all might be taken before there is one more shard.
                with standing_still(trainer):
                    os.kill(job.pid, signal.SIGCONT)
                    grown = lambda: shards_of(dataset) > first  # noqa: E731
                    wait_until(grown, job, job_log.read_text)
                assert job.wait(LAUNCH_LIMIT_S) == 0, job_log.read_text()
                assert trainer.wait(LAUNCH_LIMIT_S) == 0, train_log.read_text()
        finally:
            job.kill()
    covered = [entry.shards for entry in state_after(run, STEPS).frozen[0]]
    assert covered[0] == first < covered[-1] <= 30
    assert "will take in what has been committed by now" in train_log.read_text()
    # How far training followed is a matter of time; it has them all in the end.
    launch(2, *train)
    state = state_after(run, STEPS + MORE)
    assert state.frozen[0][-1].shards == 30
    # From the finished dataset and the state alone, the same steps.
    keys = config(dataset, run)
    loader = Loader(Dataset(dataset, "train"), keys, rank=0, world_size=1, state=state)
    steps = loader.steps(0, STEPS + MORE)
    assert [s.counts.digest_text for s in steps] == column(run, "sample_digest")
