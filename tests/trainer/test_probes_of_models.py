"""Probes measure every model that restores words or pixels in the same way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from tests.conftest import launch_environment, python
from tests.trainer.tiny import TINY, TINY_MASKVLM
from trainer import evaluate
from trainer.dataset import Dataset
from trainer.masking import Mode
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES
from trainer.probes import Pairs, load_pairs, make_inputs, measure, with_rates
from trainer.tasks.pretrained import drawn_model

KEYS = {"mlim": TINY, "maskvlm": TINY_MASKVLM}


def keys_of(name: str, shards: Path, *more: str) -> PretrainConfig:
    words = [*KEYS[name], f"--data={shards}", "--output=-", *more]
    return parse_run(PretrainConfig, words, prog="", description="", recipes=RECIPES)


def built(keys: PretrainConfig, shards: Path) -> tuple[Any, Pairs]:
    """A model with drawn weights, and held-out pairs."""
    dataset = Dataset(shards, "val")
    model: Any = drawn_model(keys, dataset.tokenizer, seed=0).eval()
    return model, load_pairs(dataset, keys, seed=0, limit=12, group=None)


@pytest.mark.parametrize("name", KEYS)
def test_losses_of_pairs_add_up_to_those_of_training(name: str, shards: Path) -> None:
    keys = keys_of(name, shards)
    model, pairs = built(keys, shards)
    losses = measure(
        model,
        keys,
        pairs,
        seed=0,
        draws=1,
        batch=5,
        device=torch.device("cpu"),
        progress=tqdm(disable=True),
    )
    words, image = keys.model.word_loss, keys.model.image_loss
    assert set(losses) == {words, image}
    for probe, mode in ((words, Mode.TEXT_HEAVY), (image, Mode.IMAGE_HEAVY)):
        inputs, masks = make_inputs(
            keys,
            uids=pairs.uids,
            pixels=pairs.pixels,
            texts=pairs.texts,
            seed=0,
            draw_number=0,
            mode=mode,
            device=torch.device("cpu"),
        )
        with torch.inference_mode():
            whole = float(model(inputs, masks).losses[probe])
        found = losses[probe]["true"]
        assert found.sums.sum() == pytest.approx(whole, rel=1e-5)
        assert (found.sums > 0).all()
        # The same masks under every condition, and partners that matter.
        for other in losses[probe].values():
            assert np.array_equal(other.counts, found.counts)
        assert not np.allclose(losses[probe]["shuffled"].sums, found.sums)


def test_rates_of_a_probe_are_those_given(shards: Path) -> None:
    keys = keys_of("maskvlm", shards)
    model, pairs = built(keys, shards)
    lighter = with_rates(keys, text=0.3, image=None)
    assert lighter.mask.text_rates[Mode.TEXT_HEAVY] == 0.3
    assert lighter.mask.image_rates == keys.mask.image_rates
    counts = [
        measure(
            model,
            each,
            pairs,
            seed=0,
            draws=1,
            batch=12,
            device=torch.device("cpu"),
            progress=tqdm(disable=True),
        )["mlm"]["true"].counts.sum()
        for each in (lighter, keys)
    ]
    assert counts[0] < counts[1] / 2


def test_a_loss_without_a_head_is_not_probed(shards: Path) -> None:
    keys = keys_of("maskvlm", shards, "--model.mim_weight=0")
    model, pairs = built(keys, shards)
    found = measure(
        model,
        keys,
        pairs,
        seed=0,
        draws=1,
        batch=12,
        device=torch.device("cpu"),
        progress=tqdm(disable=True),
    )
    assert set(found) == {"mlm"}
    # MLIM has its decoder whatever its loss weighs.
    model = dataclasses.replace(keys_of("mlim", shards).model, recon_weight=0.0)
    assert model.restores == ("mlm", "recon")


def test_a_run_of_maskvlm_is_probed_by_the_same_command(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*KEYS["maskvlm"], f"--data={shards}", f"--output={run}", "--max_steps=2")
    more = ("--eval.every_steps=0", "--eval.probes_every_steps=2")
    more += ("--eval.probe_pairs=8", "--eval.panel_pairs=2")
    done = python("-m", "trainer.pretrain", *words, *more, env=launch_environment())
    assert done.returncode == 0, done.stdout
    rows = (run / "validation.jsonl").read_text().splitlines()
    assert {"probe_mlm_blank_gap", "probe_mim_empty_gap"} <= set(json.loads(rows[-1]))
    assert len(list((run / "panels").iterdir())) == 1
    evaluate.main([str(run), "--task=probes", "--examples=2", "--max_pairs=12"])
    found = json.loads((run / "probes.json").read_text())
    assert set(found["mim"]["conditions"]) == {"true", "shuffled", "empty"}
    assert "recon" not in found
    assert Image.open(run / found["figures"][0]["file"]).size[0] > 400
    assert [token for token in found["top_words"][0]["tokens"] if token["masked"]]
    done = python("-m", "trainer.report", run, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stdout
    page = (tmp_path / "page.html").read_text()
    assert "MIM loss, absolute error" in page
    assert "RECON loss, squared error" not in page
