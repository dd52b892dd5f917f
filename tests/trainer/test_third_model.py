"""Another model is one file and one recipe."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import trainer.models
from pipeline.config import to_yaml
from pipeline.pairs import main as make_pairs
from tests.conftest import free_port
from tests.trainer.tiny import column, succeeds
from trainer.contract import read_validation
from trainer.evaluate import main as evaluate
from trainer.finetune import main as finetune
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


def test_it_learns_a_task_by_what_its_own_file_offers(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    run, pairs, output = tmp_path / "run", tmp_path / "pairs.npy", tmp_path / "tuned"
    words = [f"--data={shards}", f"--output={run}", "--model.name=bag"]
    words += ["--image.size=16"]
    config = parse_run(PretrainConfig, words, prog="", description="")
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    make_pairs([str(shards), "--column=base", f"--output={pairs}", "--limit=32"])
    learn = [str(run), "--from_scratch", f"--output={output}"]
    task = ["--task=matching", f"--pairs={pairs}"]
    finetune([*learn, *task, "--batch=16", "--epochs=12", "--lr=0.05"])
    losses = column(output, "loss")
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    evaluate([str(output), *task])
    found = json.loads((output / "matching.json").read_text())["metrics"]
    assert found["pr_auc_both"]["value"] > found["pr_auc_both"]["chance"]
    with pytest.raises(ValueError, match=r"BagConfig.* bag\.py, a method `ranker`"):
        finetune([*learn[:2], f"--output={tmp_path}/o", "--task=retrieval"])


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
