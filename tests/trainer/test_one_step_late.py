"""Where the device decides about a step, the next one's passes begin before the host
knows what it came to, and nothing that a run promises depends on that. The same runs,
on a CPU with the optimizer of a GPU, against those that learn it at once.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.trainer.tiny import damaged_copy, metrics, with_faults
from trainer.contract import complete_checkpoints, read_validation

LATE: Mapping[str, Any] = {"fused": True}
AT_ONCE: Mapping[str, Any] = {"fused": True, "at_once": True}
STEPS = 12
# What a clock says, and how much memory this process took.
OF_THE_MOMENT = {
    "pairs_per_s",
    "tokens_per_s",
    "data_wait_frac",
    "read_s",
    "decode_s",
    "step_s",
    "mfu",
    "model_tflops",
    "peak_memory_gib",
}
SIGTERMED = 128 + signal.SIGTERM


def rows(run: Path) -> list[str]:
    """Every line of metrics.jsonl without what only a clock decides; not a number
    equals itself.
    """
    return [
        json.dumps({k: v for k, v in row.items() if k not in OF_THE_MOMENT})
        for row in metrics(run)
    ]


def checkpoints(run: Path) -> dict[int, Any]:
    """Every tensor, bit for bit, and the marker of each checkpoint, by step."""
    found = {}
    for step, path in complete_checkpoints(run):
        marker = json.loads((path / "complete.json").read_text())
        tensors = {}
        for part in sorted(path.glob("*.safetensors")):
            with safe_open(part, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensors[part.name, key] = file.get_tensor(key).numpy().tobytes()
        assert tensors
        found[step] = marker, tensors
    return found


def notes(output: str, run: Path) -> list[str]:
    """What was told of steps and checkpoints, in order; of a verdict on speed, which is
    a clock's, that there was one.
    """
    found = []
    for line in output.splitlines():
        if " limits the run" in line:
            found.append("limits the run")
        elif "damaged samples replaced" in line or "(samples " in line:
            found.append(line.replace(str(run), "RUN"))
    return found


def order(path: Path) -> list[tuple[str, int]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(what, int(step)) for what, step in lines]


@pytest.mark.parametrize("stage", [1, 2])
def test_rows_weights_moments_and_checkpoints_are_those_of_a_run_that_waits(
    stage: int, shards: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "shards"
    damaged_copy(shards, damaged, "train")
    words = (
        f"--data={damaged}",
        f"--deepspeed.zero_stage={stage}",
        "--damage.max_share=0.2",
        "--checkpoint.every_steps=5",
        "--checkpoint.keep=9",
        "--log.norms_every=7",
        "--eval.every_steps=9",
        "--profile.first_step=1",
        "--profile.steps=1",
    )
    faults = {"nan_gradient": [3], "nan_loss": [11]}
    found, orders = {}, {}
    for name, how in (("late", LATE), ("at_once", AT_ONCE)):
        run, held = tmp_path / name, tmp_path / f"{name}.jsonl"
        told = tmp_path / f"{name}.order"
        spec = {**how, **faults, "fingerprints": str(held), "order": str(told)}
        done = with_faults(2, spec, *words, f"--output={run}")
        assert done.returncode == 0, done.stdout
        updates = sorted(held.read_text().splitlines())
        found[name] = [
            *(rows(run), updates, checkpoints(run), notes(done.stdout, run)),
            [row["val_loss"] for row in read_validation(run)],
        ]
        orders[name] = order(told)
        assert len(rows(run)) == STEPS
        assert all(row["step_s"] > 0 for row in metrics(run))
    for late, at_once in zip(found["late"], found["at_once"], strict=True):
        assert late == at_once
    assert [*found["late"][2]] == [5, 9, 10, 12]
    alone = [(what, n) for n in range(1, STEPS + 1) for what in ("passes", "row")]
    assert orders["at_once"] == alone
    late = {
        step
        for step in range(1, STEPS)
        if orders["late"].index(("row", step))
        > orders["late"].index(("passes", step + 1))
    }
    # After these there is something to do that the next step has to wait for.
    assert not late & {1, 2, 5, 7, 9, 10, 12}
    assert {3, 11} <= late, "the steps that are dropped"
    assert len(late) >= 4, orders["late"]


def test_the_guard_stops_a_run_at_the_same_step_with_the_same_weights(
    shards: Path, tmp_path: Path
) -> None:
    words = (
        *(f"--data={shards}", "--deepspeed.zero_stage=1", "--micro_batch=24"),
        *("--checkpoint.every_steps=4", "--safety.max_nonfinite=2"),
    )
    found = {}
    for name, how in (("late", LATE), ("at_once", AT_ONCE)):
        run, told = tmp_path / name, tmp_path / f"{name}.order"
        spec = {**how, "rank": 0, "nan_gradient": [5, 6, 7], "order": str(told)}
        done = with_faults(1, spec, *words, f"--output={run}")
        assert done.returncode == 1, done.stdout
        assert "step 7 (samples " in done.stdout
        (line,) = [line for line in done.stdout.splitlines() if "3. in a row" in line]
        message = line.replace(str(run), "RUN")
        found[name] = rows(run), checkpoints(run), message, notes(done.stdout, run)
        # The passes of a step that is never taken.
        assert (("passes", 8) in order(told)) == (name == "late")
    assert found["late"] == found["at_once"]
    assert len(found["late"][0]) == 6
    assert [*found["late"][1]] == [4]


def test_a_save_or_a_stop_asked_for_in_the_passes_of_a_step_has_the_one_before(
    shards: Path, tmp_path: Path
) -> None:
    words = (
        *(f"--data={shards}", "--deepspeed.zero_stage=1", "--checkpoint.keep=99"),
        "--safety.max_nonfinite=1",
    )
    faults = {"rank": 0, "nan_gradient": [3]}
    run = tmp_path / "at_once"
    often = "--checkpoint.every_steps=1"
    done = with_faults(1, {**AT_ONCE, **faults}, *words, often, f"--output={run}")
    assert done.returncode == 0, done.stdout
    expected = checkpoints(run)
    assert [*expected] == [*range(1, STEPS + 1)]
    # A checkpoint is always due by the clock, and never known to be.
    late, told = tmp_path / "late", tmp_path / "late.order"
    clock = ("--checkpoint.every_minutes=0", "--checkpoint.every_steps=100")
    spec = {**LATE, **faults, "order": str(told)}
    done = with_faults(1, spec | {"term": 6}, *words, *clock, f"--output={late}")
    assert done.returncode == SIGTERMED, done.stdout
    assert "stopped after step 5 of 12, checkpoint saved" in done.stdout
    assert order(told)[-2:] == [("passes", 6), ("row", 5)]
    assert checkpoints(late) == {step: expected[step] for step in range(1, 6)}
    # Killed while it has not yet learnt what step 8 came to.
    done = with_faults(1, spec | {"kill": 9}, *words, *clock, f"--output={late}")
    assert done.returncode == -signal.SIGKILL, done.stdout
    assert "resuming after step 5" in done.stdout
    assert metrics(late)[-1]["step"] == 7
    done = with_faults(1, spec, *words, *clock, f"--output={late}")
    assert done.returncode == 0, done.stdout
    assert checkpoints(late) == expected
    assert rows(late) == rows(run)


def test_a_batch_that_cannot_be_read_ends_the_run_after_the_row_of_the_step_before(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}", "--deepspeed.zero_stage=1")
    done = with_faults(2, {**LATE, "broken": 5}, *words)
    assert done.returncode != 0
    assert done.stdout.count("the loader says so") == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
