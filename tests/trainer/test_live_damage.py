"""Shards that are damaged while a run reads them: found, replaced, or the run stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import deepspeed_command, launch_environment
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    steps_taken,
    wait_until,
)
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.quarantine import from_plain

STEPS = 400
# Lanes of 80 samples: none lies in damaged shards alone.
LONG_LANES = "--lanes=2"


def tar(shards: Path, number: int) -> Path:
    return shards / f"train/shard-{number:06d}.tar"


def records(shards: Path, number: int) -> np.ndarray:
    return np.load(tar(shards, number).with_suffix(".index.npy"))


def uids(shards: Path, number: int) -> set[str]:
    return {f"{uid:016x}" for uid in records(shards, number)["uid"].tolist()}


def flip_bits(shards: Path, number: int) -> set[str]:
    """Flip a bit in every fourth sample of a shard, of its image or of its ids."""
    found = set()
    with tar(shards, number).open("r+b") as file:
        for row, record in enumerate(records(shards, number)[::4]):
            kind = "jpg" if row % 2 else "ids"
            offset = int(record[f"{kind}_offset"] + record[f"{kind}_size"]) - 3
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << row % 8]))
            found.add(f"{int(record['uid']):016x}")
    return found


def truncate(shards: Path, number: int) -> set[str]:
    """Cut a shard off in the middle of its eleventh sample."""
    rows = records(shards, number)
    os.truncate(tar(shards, number), int(rows[10]["jpg_offset"]) + 7)
    return {f"{uid:016x}" for uid in rows["uid"][10:].tolist()}


def delete(shards: Path, number: int) -> set[str]:
    tar(shards, number).unlink()
    return uids(shards, number)


def swap(shards: Path, number: int) -> set[str]:
    """Exchange two shards of as many samples."""
    one, other = tar(shards, number), tar(shards, number + 1)
    one.rename(one.with_suffix(".x"))
    other.rename(one)
    one.with_suffix(".x").rename(other)
    return uids(shards, number) | uids(shards, number + 1)


def run_and_damage(
    run: Path, shards: Path, *more: str, damage: dict[int, Callable[[], set[str]]]
) -> tuple[int, str, set[str]]:
    """Train with two ranks; once so many steps are taken, do the damage. Exit status,
    output and the uids that are damaged.
    """
    words = [
        f"--data={shards}",
        f"--output={run}",
        f"--schedule.steps={STEPS}",
        "--mixture=none",
        LONG_LANES,
        "--model.layers=1",
        "--checkpoint.every_steps=100",
        *more,
    ]
    damaged: set[str] = set()
    output = run.with_suffix(".txt")
    with (
        output.open("w") as file,
        subprocess.Popen(
            deepspeed_command(2, *TINY, *words),
            env=launch_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as launcher,
    ):
        for step, act in sorted(damage.items()):
            wait_until(
                lambda step=step: steps_taken(run) >= step, launcher, output.read_text
            )
            damaged |= act()
        status = launcher.wait(LAUNCH_LIMIT_S)
    return status, output.read_text(), damaged


def test_damage_done_while_training_is_found_and_the_run_a_function_of_the_list(
    mixed: Path, tmp_path: Path
) -> None:
    copy, run = Path(shutil.copytree(mixed, tmp_path / "copy")), tmp_path / "run"
    status, output, damaged = run_and_damage(
        run,
        copy,
        "--damage.max_share=0.9",
        damage={
            10: lambda: flip_bits(copy, 0),
            40: lambda: truncate(copy, 1),
            70: lambda: delete(copy, 2),
            100: lambda: swap(copy, 3),
        },
    )
    assert status == 0, output
    (marker,) = sorted((run / "checkpoints").glob(f"*{STEPS}/complete.json"))
    state = json.loads(marker.read_text())
    listed = from_plain(state["quarantine"])
    assert {one.uid for one in listed} == damaged
    reasons = {
        number: {one.reason for one in listed if one.uid in uids(mixed, number)}
        for number in range(5)
    }
    assert reasons[0] == {"crc"}
    assert reasons[1] == {"truncated"}
    assert reasons[2] == {"missing"}
    assert reasons[3] | reasons[4] <= {"crc", "truncated"}
    for number in range(5):
        assert tar(mixed, number).name in output
    # On sound shards, the list alone gives the same steps.
    keys = config(mixed, run, "--mixture=none", LONG_LANES, "--damage.max_share=0.9")
    loader = Loader(
        Dataset(mixed, "train"), keys, rank=0, world_size=1, quarantined=listed
    )
    steps = list(loader.steps(0, STEPS))
    recorded = column(run, "sample_digest")
    assert recorded == [batch.counts.digest_text for batch in steps]
    replaced = [batch.counts.replaced for batch in steps]
    assert column(run, "replaced") == replaced
    assert sum(replaced) > len(damaged)


def test_more_damage_than_the_run_bears_stops_it_and_names_the_shards(
    mixed: Path, tmp_path: Path
) -> None:
    copy, run = Path(shutil.copytree(mixed, tmp_path / "copy")), tmp_path / "run"
    status, output, _ = run_and_damage(
        run, copy, "--damage.max_share=0.02", damage={10: lambda: swap(copy, 3)}
    )
    assert status != 0
    (line,) = {line for line in output.splitlines() if "samples are damaged" in line}
    assert "of 160 samples are damaged, more than the 3 that damage.max_share" in line
    assert "shard-000003.tar" in line or "shard-000004.tar" in line
    assert f"`python -m pipeline.validate {copy}` names every damage" in line
