"""A run's page of curves, probes and restored squares, from a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pretraining import main, windows
from tests.conftest import launch_environment, python
from tests.trainer.tiny import TINY, column


def test_a_run_becomes_curves_probes_and_restored_squares(
    shards: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "found" / "tiny"
    words = (f"--data={shards}", f"--output={run}", "--schedule.steps=100")
    often = ("--eval.every_steps=50", "--eval.probes_every_steps=50")
    few = ("--eval.probe_pairs=16", "--eval.panel_pairs=2", "--eval.max_pairs=32")
    done = python(
        *("-m", "trainer.pretrain", *TINY, *words, *often, *few),
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    output.parent.mkdir()
    main([str(run), f"--output={output}", "--examples=3"])
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["steps"] == 100
    assert [row["step"] for row in found["held_out"]] == [50, 100]
    assert [row["step"] for row in found["probes"]] == [50, 100]
    assert found["hours"] * 3600 == pytest.approx(sum(column(run, "step_s")))
    assert str(shards) not in output.with_suffix(".json").read_text()
    for path in (output.with_suffix(".png"), tmp_path / "found" / "tiny-restored.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 0


def test_a_run_that_looked_at_nothing_is_refused_with_the_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--eval\.probes_every_steps above 0"):
        main([str(tmp_path)])


def test_windows_are_means_of_whole_windows() -> None:
    names = ("mlm_loss", "recon_loss", "mlm_accuracy", "step_s", "pairs_per_s")
    rows = [{"step": n, **dict.fromkeys(names, float(n))} for n in range(1, 121)]
    for row in rows[:60]:
        row["psnr"] = 10.0
    found = windows(rows)
    assert found["step"] == [50.0, 100.0]
    assert found["mlm_loss"] == [25.5, 75.5]
    assert found["psnr"][0] == 10.0
