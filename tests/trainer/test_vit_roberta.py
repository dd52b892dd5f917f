"""The encoders are ViT, RoBERTa and BERT of `transformers`, weight for weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from pipeline.manifest import load_manifest
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import TINY_MASKVLM, column, config
from trainer import checkpoint
from trainer.check import check
from trainer.contract import complete_checkpoints
from trainer.models.base import Inputs, Sizes
from trainer.models.maskvlm import MaskVlmForPreTraining
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.maskvlm_encoder import Passes
from trainer.models.vit_roberta import read_image_body, read_text_body
from trainer.stream import pack

V, MAX_TEXT = 60, 24
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TWO = (
    "--model.image_layers=2",
    "--model.text_layers=2",
    "--model.text_norm=post",
    "--model.text_norm_eps=1e-12",
)
TEXTS = [7, 3, 24, 11, 16]


def drawn(kind: Any, sizes: Any) -> Any:
    """A random model with weights so large that no wrong one can hide."""
    torch.manual_seed(1)
    model = kind(sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def vit(kind: Any = ViTModel, **changes: Any) -> Any:
    sizes = {"image_size": 16, "patch_size": 4, **SHAPE}
    return drawn(kind, ViTConfig(**{**sizes, **changes}))


def roberta(kind: Any = RobertaModel, **changes: Any) -> Any:
    sizes = {"vocab_size": V, "max_position_embeddings": 40, **SHAPE}
    return drawn(kind, RobertaConfig(**{**sizes, **changes}))


def bert(kind: Any = BertModel, **changes: Any) -> Any:
    sizes = {"vocab_size": V, "max_position_embeddings": 40, **SHAPE}
    return drawn(kind, BertConfig(**{**sizes, **changes}))


def build(image_size: int = 16, **keys: Any) -> MaskVlmForPreTraining:
    shape = {"width": 32, "heads": 2, "ffn_width": 64, "patch_size": 4}
    layers = {"image_layers": 2, "text_layers": 2, "text_norm_eps": 1e-12}
    given: dict[str, Any] = {**shape, **layers, **keys}
    sizes = Sizes(V, {"mask": 4}, MAX_TEXT, image_size)
    return MaskVlmConfig(**given).build(sizes)


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_hidden_states_of_images_are_those_of_vit(
    kind: Any, size: int, tmp_path: Path
) -> None:
    theirs = vit(kind)
    theirs.save_pretrained(tmp_path)
    model = build(size)
    weights = read_image_body(str(tmp_path), grid=model.grid)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, size, size, generator=generator) * 2 - 1
    body = theirs if kind is ViTModel else theirs.vit
    with torch.no_grad():
        expected = body(pixels, interpolate_pos_encoding=True).last_hidden_state
        ours = model.encode_images(pixels)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (roberta, RobertaModel),
        (roberta, RobertaForMaskedLM),
        (bert, BertModel),
        (bert, BertForMaskedLM),
    ],
)
def test_hidden_states_of_texts_are_those_of_roberta_and_bert(
    make: Any, kind: Any, tmp_path: Path
) -> None:
    theirs = make(kind)
    theirs.save_pretrained(tmp_path)
    model = build()
    head = model.mlm_dense.weight.clone()
    weights = read_text_body(str(tmp_path), max_text=MAX_TEXT)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, V, (length,), generator=generator) for length in TEXTS]
    stream, ids = pack(np.array(TEXTS), torch.cat(texts).numpy(), 0)
    inputs = Inputs(stream, ids, torch.empty(0), 8, 1)
    masked = kind in (RobertaForMaskedLM, BertForMaskedLM)
    body = theirs.base_model if masked else theirs
    with torch.no_grad():
        encoded = model.encode_pairs(inputs, None, Passes(clean_texts=True))
        for pair, text in enumerate(texts):
            start = int(encoded.text.starts[pair])
            ours = encoded.text_td[start : start + len(text)]
            expected = body(text[None]).last_hidden_state[0]
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
            if masked:
                logits = theirs(text[None]).logits[0]
                torch.testing.assert_close(
                    model.word_logits(ours), logits, atol=2e-4, rtol=1e-4
                )
    if not masked:
        assert torch.equal(model.mlm_dense.weight, head)
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    read_text_body(str(tmp_path), max_text=MAX_TEXT)
    assert torch.equal(torch.rand(3), first)


@pytest.fixture(scope="module")
def bodies(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT and a BERT in the shape of the tiny recipe, with the tokenizer of
    `shards`.
    """
    folder = tmp_path_factory.mktemp("bodies")
    vit().save_pretrained(folder / "vit")
    size = load_manifest(shards).tokenizer.vocab_size
    bert(vocab_size=size, max_position_embeddings=64).save_pretrained(folder / "bert")
    copied = (shards / "tokenizer" / "tokenizer.json").read_bytes()
    (folder / "bert" / "tokenizer.json").write_bytes(copied)
    return folder


def test_a_run_starts_from_its_bodies(
    shards: Path, bodies: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*TWO, f"--data={shards}", f"--output={run}", "--optimizer.lr=0"]
    given = [f"--model.image_body={bodies}/vit", f"--model.text_body={bodies}/bert"]
    again = ["--model.image_body=gone", "--model.text_body=gone", "--max_steps=2"]
    calls = [[*words, *given, "--max_steps=1"], [*words, *again]]
    printed = launch_all(1, calls, tmp_path / "calls.json", tiny=TINY_MASKVLM)
    assert "model.image_body" in printed
    assert "is not looked at" in printed
    assert column(run, "step") == [1, 2]
    taken = checkpoint.load_weights(complete_checkpoints(run)[-1][1])
    expected = read_image_body(str(bodies / "vit"), grid=4)
    expected |= read_text_body(str(bodies / "bert"), max_text=32)
    for name, value in expected.items():
        assert torch.equal(taken[name], value), name


def test_a_body_that_does_not_fit_is_refused_with_the_keys_to_change(
    shards: Path, bodies: Path, tmp_path: Path
) -> None:
    def refused(match: str, *words: str) -> None:
        with pytest.raises(ValueError, match=match):
            check(config(shards, tmp_path / "new", *TWO, *words, tiny=TINY_MASKVLM))

    image, text = (
        f"--model.{key}_body={bodies}/{name}"
        for key, name in (("image", "vit"), ("text", "bert"))
    )
    check(config(shards, tmp_path / "new", *TWO, image, text, tiny=TINY_MASKVLM))
    refused(r"--model\.width 32 \(now 64\)", image, "--model.width=64")
    refused(r"--model\.patch_size 4 \(now 8\)", image, "--model.patch_size=8")
    refused(r"--model\.image_layers 2 \(now 3\)", image, "--model.image_layers=3")
    refused(r"--model\.text_layers 2 \(now 3\)", text, "--model.text_layers=3")
    refused(r"text_norm_eps 1e-12 \(now 1e-05\)", text, "--model.text_norm_eps=1e-5")
    refused(r"--text\.max_tokens 64 or less", text, "--text.max_tokens=65")
    refused("--model.text_norm post", text, "--model.text_norm=pre")
    refused("is a bert: give a checkpoint of vit", f"--model.image_body={bodies}/bert")
    refused("is a vit: give", f"--model.text_body={bodies}/vit")
    refused("cannot be read", f"--model.image_body={tmp_path}")
    other = tmp_path / "other"
    size = load_manifest(shards).tokenizer.vocab_size
    bert(vocab_size=size + 1, max_position_embeddings=64).save_pretrained(other)
    refused(r"text_body .* preprocess .* --tokenizer", f"--model.text_body={other}")
    assert not (tmp_path / "new").exists()
