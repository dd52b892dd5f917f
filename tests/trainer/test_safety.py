"""Real ranks, with faults put into one of them (`faults.py`)."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tiny import column, metrics, with_faults
from trainer.contract import complete_checkpoints, may_change
from trainer.options import SafetyConfig
from trainer.safety import Guard, Losses
from trainer.spikes import Level


def fingerprints(path: Path, rank: int) -> dict[int, tuple[str, str]]:
    """What a rank held before and after the update of each step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        line["step"]: (line["before"], line["after"])
        for line in lines
        if line["rank"] == rank
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_fault_on_one_rank_changes_nothing_on_any(
    stage: int, shards: Path, tmp_path: Path
) -> None:
    run, held = tmp_path / "run", tmp_path / "held.jsonl"
    done = with_faults(
        2,
        {
            "nan_gradient": [2],
            "nan_loss": [4],
            "spike": [6],
            "fingerprints": str(held),
        },
        f"--data={shards}",
        f"--output={run}",
        f"--deepspeed.zero_stage={stage}",
        "--max_steps=7",
        "--safety.spike_action=skip",
        "--safety.spike_window=3",
        "--safety.spike_threshold=20",
    )
    assert done.returncode == 0, done.stdout
    assert column(run, "skipped") == [0, 1, 0, 1, 0, 1, 0]
    assert column(run, "step") == [1, 2, 3, 4, 5, 6, 7]
    for rank in (0, 1):
        found = fingerprints(held, rank)
        unchanged = [step for step, (old, new) in found.items() if old == new]
        assert unchanged == [2, 4, 6], "weights, moments or step counts of a rank"
        assert all(found[step][1] == found[step + 1][0] for step in range(1, 7))
    rows = metrics(run)
    assert math.isfinite(rows[1]["loss"])
    assert not math.isfinite(rows[1]["grad_norm"])
    assert not math.isfinite(rows[3]["loss"])
    # A dropped step has a norm like any other.
    assert 10 * rows[4]["grad_norm"] < rows[5]["grad_norm"] < math.inf
    assert all(math.isfinite(rows[at]["loss"]) for at in (0, 2, 4, 6))
    for step in (2, 4, 6):
        assert f"python -m trainer.replay {run} --step {step}" in done.stdout
    assert rows[1]["sample_digest"] in done.stdout


def test_a_fault_that_the_device_finds_changes_nothing_on_any_rank(
    shards: Path, tmp_path: Path
) -> None:
    words = (f"--data={shards}", "--deepspeed.zero_stage=1", "--max_steps=6")
    found, rows = {}, {}
    for where in ("device", "host"):
        run, held = tmp_path / where, tmp_path / f"{where}.jsonl"
        faults = {"nan_gradient": [2], "nan_loss": [4], "fingerprints": str(held)}
        # A spike is known to the host alone, before an update is taken.
        action = "log" if where == "device" else "skip"
        done = with_faults(
            *(2, {**faults, "fused": True}, *words, f"--output={run}"),
            f"--safety.spike_action={action}",
        )
        assert done.returncode == 0, done.stdout
        found[where] = [fingerprints(held, rank) for rank in (0, 1)]
        rows[where] = metrics(run)
        for name in ("skipped", "loss", "grad_norm"):
            assert len(column(run, name)) == 6
    assert found["device"] == found["host"], "weights, moments and step counts"
    for each in found["device"]:
        assert [step for step, (old, new) in each.items() if old == new] == [2, 4]
    same = ("skipped", "loss", "mlm_loss", "recon_loss", "grad_norm", "lr")
    for one, other in zip(rows["device"], rows["host"], strict=True):
        assert repr([one[name] for name in same]) == repr([other[n] for n in same])
    assert math.isinf(rows["device"][1]["grad_norm"])
    assert not math.isfinite(rows["device"][3]["loss"])


def test_a_run_that_stops_says_why_and_saves_nothing_over_a_good_checkpoint(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}", "--checkpoint.every_steps=2")
    spec = {"nan_gradient": [4]}
    done = with_faults(2, spec, *words, "--safety.nonfinite=stop", "--max_steps=5")
    assert done.returncode != 0
    assert done.stdout.count("step 4 (samples ") == 1, "one rank tells"
    assert f"python -m trainer.replay {run} --step 4" in done.stdout
    assert "--safety.nonfinite skip" in done.stdout
    assert [step for step, _ in complete_checkpoints(run)] == [2]


def test_a_run_goes_back_from_a_spike_and_on_with_the_data_behind_it(
    shards: Path, tmp_path: Path
) -> None:
    run, held = tmp_path / "run", tmp_path / "held.jsonl"
    words = (
        f"--data={shards}",
        "--micro_batch=12",
        "--max_steps=9",
        "--safety.spike_action=roll_back",
        "--safety.spike_window=3",
        "--safety.spike_threshold=20",
        "--safety.roll_back_steps=3",
        "--checkpoint.every_steps=100",
        "--checkpoint.keep=1",
    )
    # Points of a run whose checkpoints were deleted to start anew are in nobody's way.
    for step in (1000, 1500):
        stale = run / "roll_back" / "checkpoints" / f"step-{step:08d}"
        stale.mkdir(parents=True)
        (stale / "complete.json").write_text(json.dumps({"step": step}))
    faults = {"spike": [5], "rank": 0, "fingerprints": str(held)}
    done = with_faults(1, faults, *words, f"--output={run}")
    assert done.returncode == 0, done.stdout
    assert [row.get("rolled_back_to") for row in metrics(run)] == [
        *[None] * 4,
        3,
        *[None] * 4,
    ]
    found = fingerprints(held, 0)
    assert found[6][0] == found[3][1] != found[4][1]
    # Killed before it has gone back, and after that.
    again = tmp_path / "again"
    # A checkpoint is whole at the latest when the next one is taken.
    for step, newest in ((5, {3}), (8, {5, 6})):
        done = with_faults(1, faults | {"kill": step}, *words, f"--output={again}")
        assert done.returncode == -signal.SIGKILL, done.stdout
        (resumed,) = (at for at, _ in complete_checkpoints(again))
        assert resumed in newest
    done = with_faults(1, faults, *words, f"--output={again}")
    assert done.returncode == 0, done.stdout
    assert f"resuming after step {resumed}" in done.stdout
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr", "skipped"):
        assert column(again, name) == column(run, name)
    marker = complete_checkpoints(again)[-1][1] / "complete.json"
    assert len(json.dumps(json.loads(marker.read_text()))) < 1024


def guard(**keys: Any) -> Guard:
    return Guard(SafetyConfig(**keys), Path("runs/x"), None)


def judged(guard: Guard, mlm: float, step: int = 1, norm: float = 1.0) -> bool:
    """Whether the update of a step is applied."""
    ruling = guard.before_update(Losses({"mlm": mlm, "recon": 0.1}))
    return guard.after_update(ruling, norm, step=step, digest="d").applied


def test_steps_that_are_not_finite_are_borne_so_many_in_a_row() -> None:
    bears = guard(max_nonfinite=2)
    for _ in range(3):
        assert not judged(bears, math.nan)
        assert not judged(bears, 5.0, norm=math.inf)
        assert judged(bears, 5.0)
    judged(bears, math.inf)
    judged(bears, math.inf)
    with pytest.raises(ValueError, match=r"3\. in a row of at most 2.*max_nonfinite"):
        judged(bears, math.inf)


def test_spikes_are_borne_until_too_many_come_close_together() -> None:
    bears = guard(spike_action="skip", spike_window=4, max_spikes=2)
    for _ in range(3):
        for _ in range(5):
            assert judged(bears, 5.0)
        assert not judged(bears, 50.0)
        assert not judged(bears, 90.0)
    with pytest.raises(ValueError, match="spike 3 of at most 2"):
        judged(bears, 500.0)


def test_a_logged_spike_is_told_and_taken() -> None:
    logs = guard(spike_window=4, max_spikes=0)
    for _ in range(5):
        judged(logs, 5.0)
    ruling = logs.before_update(Losses({"mlm": 50.0, "recon": 0.1}))
    outcome = logs.after_update(ruling, 1.0, step=6, digest="cafe")
    assert outcome.applied
    assert not outcome.roll_back
    assert outcome.note
    assert "--step 6" in outcome.note
    assert "cafe" in outcome.note


def test_a_resumed_guard_judges_like_one_that_went_on() -> None:
    keys = {"spike_action": "skip", "spike_window": 5, "max_spikes": 99}
    losses = [5 + math.sin(step) / 3 + 9 * (step % 13 == 12) for step in range(60)]
    whole = guard(**keys)
    expected = [judged(whole, loss) for loss in losses]
    assert 0 < expected.count(False) < 9
    resumed = guard(**keys)
    for at, loss in enumerate(losses):
        stored = json.loads(json.dumps(resumed.to_plain()))
        resumed = Guard(SafetyConfig(**keys), Path("runs/x"), stored)
        assert judged(resumed, loss) == expected[at]
    assert resumed.to_plain() == whole.to_plain()


def test_a_level_knows_noise_and_descent_from_a_spike() -> None:
    level, keys = Level(), {"window": 50, "threshold": 6.0}
    for step in range(2000):
        loss = 2 + 8 * math.exp(-step / 100) + 0.2 * math.sin(37.1 * step)
        assert not level.is_spike(loss, **keys), step
        level = level.after(loss, **keys)
    assert level.is_spike(4.0, **keys)
    assert not level.is_spike(2.3, **keys)


def test_a_loss_that_stays_high_is_the_new_level_in_the_end() -> None:
    level, keys = Level(), {"window": 20, "threshold": 6.0}
    for _ in range(50):
        level = level.after(2.0, **keys)
    steps = 0
    while level.is_spike(6.0, **keys):
        level, steps = level.after(6.0, **keys), steps + 1
        assert steps < 50
    assert steps > 1


def test_steps_with_nothing_masked_are_no_level_of_a_loss() -> None:
    level, keys = Level(), {"window": 5, "threshold": 6.0}
    for _ in range(50):
        level = level.after(0.0, **keys)
    assert not level.is_spike(6.0, **keys)


def test_only_keys_that_decide_no_weight_may_change_when_resuming() -> None:
    for key in ("nonfinite", "max_nonfinite", "max_spikes", "hang_minutes"):
        assert may_change(f"safety.{key}")
    for key in ("spike_action", "spike_window", "spike_threshold", "roll_back_steps"):
        assert not may_change(f"safety.{key}")
