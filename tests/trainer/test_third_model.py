"""Another model is one file and one recipe."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import trainer.models
from tests.conftest import free_port
from tests.trainer.tiny import column, succeeds
from trainer.contract import read_validation
from trainer.models.base import find, names
from trainer.options import PretrainConfig, parse_run

HERE = Path(__file__).parent
RECIPE = """\
model: {name: bag, width: 8}
image: {size: 16}
lanes: 12
global_batch: 24
micro_batch: 6
schedule: {steps: 8, warmup: 2}
optimizer: {lr: 0.02}
log: {tensorboard: false, norms_every: 4}
eval: {every_steps: 4}
checkpoint: {every_steps: 4}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model's file, beside those of the package."""
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(HERE / "third_model.py", models / "bag.py")
    monkeypatch.setattr(
        trainer.models, "__path__", [*trainer.models.__path__, str(models)]
    )
    return models


def test_a_file_and_a_recipe_are_trained_resumed_and_measured_on_two_ranks(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    recipe, run = tmp_path / "bag.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port())]
    command += ["--module", "tests.trainer.with_model", str(folder)]
    command += [f"--config={recipe}", f"--data={shards}"]
    succeeds([*command, f"--output={run}", "--max_steps=4"])
    said = succeeds([*command, f"--output={run}"])
    assert "resuming after step 4" in said
    losses = column(run, "colour_loss")
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert column(run, "loss") == losses
    measured = read_validation(run)
    assert [row["step"] for row in measured] == [4, 8]
    assert all(0 < row["val_colour_loss"] == row["val_loss"] for row in measured)


def test_keys_are_those_of_the_model_that_is_named(folder: Path) -> None:
    words = ["--data=x", "--output=y", "--model.name=bag", "--model.width=3"]
    words += ["--image.size=16"]
    config = parse_run(PretrainConfig, words, prog="", description="")
    assert config.model == find("bag")(width=3)
    with pytest.raises(ValueError, match=r"unknown key 'model\.layers'"):
        parse_run(PretrainConfig, [*words, "--model.layers=2"], prog="", description="")


def test_a_model_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert "mlim" in names()
    words = ["--data=x", "--output=y", "--model.name=mlin"]
    with pytest.raises(ValueError, match=r"'mlin' is none of .*mean 'mlim'"):
        parse_run(PretrainConfig, words, prog="", description="")
