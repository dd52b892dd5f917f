"""Weights & Biases: offline where it is installed, refused where it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.conftest import python
from tests.trainer.tiny import TINY
from trainer.tracking import Wandb, wandb_id

INSTALLED = importlib.util.find_spec("wandb") is not None


@pytest.mark.skipif(INSTALLED, reason="wandb is installed")
def test_asking_for_wandb_without_it_names_the_cure_before_anything_is_written(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*TINY, f"--data={shards}", f"--output={run}", "--log.wandb=retina")
    done = python("-m", "trainer.pretrain", *words)
    assert done.returncode == 1
    assert "pip install wandb" in done.stdout.splitlines()[-1]
    assert not run.exists()


def test_a_run_keeps_its_id_in_a_project(tmp_path: Path) -> None:
    first = wandb_id(tmp_path, "retina")
    assert wandb_id(tmp_path, "retina") == first
    assert json.loads((tmp_path / "wandb.json").read_text()) == {
        "project": "retina",
        "id": first,
    }
    assert wandb_id(tmp_path, "cornea") != first


@pytest.mark.skipif(not INSTALLED, reason="wandb is not installed")
def test_wandb_takes_metrics_and_pictures_offline_and_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    picture = tmp_path / "panel.png"
    Image.new("RGB", (8, 8)).save(picture)
    for step in (1, 2):
        tracker = Wandb(tmp_path, project="retina", config={"seed": 0})
        tracker.scalars({"step": step, "loss": 0.5, "sample_digest": "ff"})
        tracker.picture("reconstructions", picture, step)
        tracker.close()
    name = wandb_id(tmp_path, "retina")
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert len(written) >= 1
    assert any(path.rglob("*.png") for path in written)
