"""Training beside a preprocess job that is still committing shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.manifest import load_manifest
from tests.conftest import EMOJI, ROOT, deepspeed_command
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    kill_group,
    launch,
    paced,
    steps_taken,
    wait_until,
)
from trainer.data_state import DataState
from trainer.dataset import Dataset
from trainer.loader import Loader

STEPS = 400
# Enough to begin an epoch that all shards are in.
MORE = 130
SHARDS, SAMPLES = 30, 50
# Of the shards, those that are committed before the gate opens; as far as the manifest,
# which is not rewritten for each, says so.
FIRST = 4
_FILTER = """
import pathlib, time

FIRST, GATE = {first}, pathlib.Path({gate})

def keep(candidate):
    while candidate.columns["hexcode"] not in FIRST and not GATE.exists():
        time.sleep(0.01)
"""


def shards_of(dataset: Path) -> int:
    try:
        return len(load_manifest(dataset, allow_incomplete=True).shards)
    except ValueError:
        return 0


def gated_filter(folder: Path, gate: Path) -> str:
    """A filter that keeps everything, later shards' samples once `gate` exists."""
    codes = pq.read_table(EMOJI, columns=["hexcode"])["hexcode"].to_pylist()
    first = set(codes[: FIRST * SAMPLES])
    assert not first & set(codes[FIRST * SAMPLES :])
    text = _FILTER.format(first=first, gate=repr(str(gate)))
    (folder / "gated_filter.py").write_text(text)
    return "gated_filter:keep"


def state_after(run: Path, step: int) -> DataState:
    (marker,) = sorted((run / "checkpoints").glob(f"*{step}/complete.json"))
    return DataState.from_plain(json.loads(marker.read_text()))


def test_training_follows_a_job_that_is_committing_shards(tmp_path: Path) -> None:
    """The job is held up while the first epochs run, and then goes on to its end."""
    dataset, run, gate = tmp_path / "shards", tmp_path / "run", tmp_path / "gate"
    job_log, train_log = tmp_path / "job.txt", tmp_path / "train.txt"
    preprocess = [
        *(sys.executable, "-m", "pipeline.preprocess"),
        *("--input", str(EMOJI), "--output", str(dataset)),
        *("--columns.image=image", "--columns.caption=caption"),
        *("--columns.keep=hexcode", f"--limit={SHARDS * SAMPLES}"),
        f"--filter.function={gated_filter(tmp_path, gate)}",
        f"--image.time_limit_s={LAUNCH_LIMIT_S}",
        *("--image.size=32", "--tokenizer=train:600", f"--shard.samples={SAMPLES}"),
        *("--split.val=0", "--workers=1"),
    ]
    train = [
        *(f"--data={dataset}", f"--output={run}", "--grow=true"),
        *(f"--schedule.steps={STEPS + MORE}", "--model.layers=1"),
    ]
    # Steps are quick: all might be taken before there is one more shard.
    environment = paced(tmp_path, 0, batches=20)
    with (
        job_log.open("w") as job_file,
        train_log.open("w") as train_file,
        subprocess.Popen(
            preprocess,
            cwd=ROOT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=job_file,
            stderr=job_file,
        ) as job,
    ):
        try:
            wait_until(lambda: shards_of(dataset) > 0, job, job_log.read_text)
            with subprocess.Popen(
                deepspeed_command(2, *TINY, *train, f"--max_steps={STEPS}"),
                text=True,
                env=environment,
                stdout=train_file,
                stderr=train_file,
                start_new_session=True,
            ) as trainer:
                try:
                    wait_until(
                        lambda: steps_taken(run) > 9, trainer, train_log.read_text
                    )
                    gate.touch()
                    grown = lambda: shards_of(dataset) > FIRST  # noqa: E731
                    wait_until(grown, job, job_log.read_text)
                    Path(environment["PACE"]).write_text("0")
                    assert job.wait(LAUNCH_LIMIT_S) == 0, job_log.read_text()
                    assert trainer.wait(LAUNCH_LIMIT_S) == 0, train_log.read_text()
                finally:
                    kill_group(trainer)
        finally:
            # Whoever waits for it goes on, or would outlive the job.
            gate.touch()
            job.kill()
    covered = [entry.shards for entry in state_after(run, STEPS).frozen[0]]
    assert 0 < covered[0] <= FIRST < covered[-1] <= SHARDS
    assert "will take in what has been committed by now" in train_log.read_text()
    # How far training followed is a matter of time; it has them all in the end.
    launch(2, *train)
    state = state_after(run, STEPS + MORE)
    assert state.frozen[0][-1].shards == SHARDS
    # From the finished dataset and the state alone, the same steps.
    keys = config(dataset, run)
    loader = Loader(Dataset(dataset, "train"), keys, rank=0, world_size=1, state=state)
    steps = loader.steps(0, STEPS + MORE)
    assert [s.counts.digest_text for s in steps] == column(run, "sample_digest")
