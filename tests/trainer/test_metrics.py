from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.contract import read_metrics, read_validation
from trainer.metrics import Metrics, duration, keep_steps


def row(step: int) -> dict[str, object]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "mlm_loss": 0.5,
        "recon_loss": 0.5,
        "pairs_per_s": 10.0,
        "data_wait_frac": 0.0,
    }


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', "\x00\x00\x00", '{"step": 5}'])
def test_lines_after_the_checkpoint_and_torn_ones_are_dropped(
    tmp_path: Path, torn: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps(row(step)) + "\n" for step in range(1, 5)) + torn
    )
    keep_steps(path, 3)
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3]
    assert path.read_text().endswith("}\n")


def test_a_reader_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + '\n{"step": 2')
    assert [each["step"] for each in read_metrics(tmp_path)] == [1]
    assert read_metrics(tmp_path / "nowhere") == []


def test_continued_metrics_hold_each_step_once_in_both_files(tmp_path: Path) -> None:
    for first, last in ((0, 4), (2, 5)):
        metrics = Metrics(tmp_path, first_step=first, last_step=5, tensorboard=True)
        for step in range(first + 1, last + 1):
            metrics.write(row(step))
        metrics.close()
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_log_that_is_no_terminal_gets_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, first_step=0, last_step=2, tensorboard=False)
    metrics.write(row(1))
    metrics.validation({"step": 1, "val_loss": 0.875})
    metrics.write(row(2))
    metrics.close()
    printed = capsys.readouterr().err
    assert "step 2/2" in printed
    assert "val 0.8750" in printed
    assert "\r" not in printed


def test_validation_of_steps_that_are_taken_again_is_dropped(tmp_path: Path) -> None:
    for first in (0, 3):
        metrics = Metrics(tmp_path, first_step=first, last_step=6, tensorboard=False)
        for step in (2, 4):
            if step > first:
                metrics.validation({"step": step, "val_loss": float(first)})
        metrics.close()
    assert [(each["step"], each["val_loss"]) for each in read_validation(tmp_path)] == [
        (2, 0.0),
        (4, 3.0),
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (200.9, "3:20"), (7400, "2:03:20"), (353000, "4d 02:03")],
)
def test_durations_are_short_and_unambiguous(seconds: float, said: str) -> None:
    assert duration(seconds) == said
