"""A normal run lies in the band of the committed reference curves, a broken one not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.curves import RESULTS, band, windows
from tests.conftest import ROOT, launch_environment, python
from trainer.contract import read_metrics

STEPS = 100
# None of those that the curves are the mean of.
SEED = 11


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole bundled corpus, as the curves' command has it."""
    output = tmp_path_factory.mktemp("curves") / "shards"
    config = ROOT / "examples" / "emoji.yaml"
    done = python(
        "-m", "pipeline.preprocess", f"--config={config}", f"--output={output}"
    )
    assert done.returncode == 0, done.stdout
    return output


def outside(data: Path, run: Path, *words: str) -> dict[str, int]:
    """Windows of a short run's losses that lie outside the band."""
    stored = json.loads(RESULTS.read_text())
    done = python(
        "-m",
        "trainer.pretrain",
        f"--config={stored['recipe']}",
        f"--data={data}",
        f"--output={run}",
        f"--seed={SEED}",
        f"--max_steps={STEPS}",
        "--eval.every_steps=0",
        "--log.tensorboard=false",
        *words,
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    rows, found = read_metrics(run), {}
    for name in ("mlm_loss", "recon_loss"):
        ours = windows(rows, name)
        low, high = (edge[: len(ours)] for edge in band(stored["curves"][name]))
        found[name] = int(np.sum((ours < low) | (ours > high)))
    return found


def test_a_short_run_of_another_seed_lies_in_the_band(
    emoji: Path, tmp_path: Path
) -> None:
    assert outside(emoji, tmp_path / "run") == {"mlm_loss": 0, "recon_loss": 0}


def test_a_run_at_a_tenth_of_the_learning_rate_does_not(
    emoji: Path, tmp_path: Path
) -> None:
    found = outside(emoji, tmp_path / "run", "--optimizer.lr=0.0003")
    assert found["mlm_loss"]
    assert found["recon_loss"]
