"""The recipes: what their cards say of the models is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from trainer.models.mlim import MlimForPreTraining
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES

BERT_WORDS = 30522
CARD = ("command", "hardware", "parameters", "expect")


def recipe(name: str) -> PretrainConfig:
    words = [f"--config={name}", "--data=shards", "--output=run"]
    return parse_run(PretrainConfig, words, prog="", description="", recipes=RECIPES)


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def model_of(name: str, vocab_size: int) -> MlimForPreTraining:
    config = recipe(name)
    with torch.device("meta"):
        return MlimForPreTraining(
            config.model,
            vocab_size=vocab_size,
            special_ids={"mask": 4},
            max_text=config.text.max_tokens,
            image_size=config.image.size,
        )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_headed_by_its_card(path: Path) -> None:
    text = path.read_text()
    card = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("\n".join(card))
    for field in CARD:
        assert any(line.startswith(f"# {field} ") for line in card), field
    assert f"--config {path.stem}" in text
    config = recipe(path.stem)
    assert config.global_batch % config.lanes == 0
    assert yaml.safe_load(text)["model"]


@pytest.mark.parametrize("name", ["mlim-small", "mlim-base", "mlim-large-384"])
def test_the_card_counts_the_model(name: str) -> None:
    model = model_of(name, BERT_WORDS)
    card = (RECIPES / f"{name}.yaml").read_text()
    assert f"{count(model):,} with BERT's 30,522 words" in card
    side = model.config.patch_size
    assert f"{model.grid**2} image tokens of {side} px" in card


def test_the_tiny_card_counts_the_model_for_any_tokenizer() -> None:
    rest, more = (count(model_of("mlim-tiny", words)) for words in (0, 1))
    card = (RECIPES / "mlim-tiny.yaml").read_text()
    assert f"{rest:,} and {more - rest} for each word" in card


def test_the_large_recipe_meets_the_paper_s_budgets() -> None:
    """About 200 K and 2.8 M parameters, 144 tokens, BERT-large."""
    model = model_of("mlim-large-384", BERT_WORDS)
    assert count(model.embedder) == 202_952
    assert count(model.decoder) == 2_793_603
    assert model.grid**2 == 144
    config = model.config
    shape = (config.layers, config.width, config.heads, config.ffn_width)
    assert shape == (24, 1024, 16, 4096)
