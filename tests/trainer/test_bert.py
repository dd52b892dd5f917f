"""The encoder and BERT of `transformers` are the same function of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

from pipeline.manifest import load_manifest
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import SMALL_MLIM, column, config
from trainer import checkpoint
from trainer.check import check
from trainer.contract import complete_checkpoints
from trainer.masking import Masks
from trainer.models.base import Inputs
from trainer.models.bert import from_bert, read_body, to_bert
from trainer.models.mlim import MlimForPreTraining
from trainer.stream import pack

V, MAX_TEXT = 60, 24
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
POST = "--model.norm=post"


def bert(kind: Any = BertForPreTraining, **changes: int) -> Any:
    """A random BERT with weights so large that no wrong one can hide."""
    torch.manual_seed(1)
    model = kind(BertConfig(**{"vocab_size": V, **SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def encoder() -> MlimForPreTraining:
    special = {"mask": 4}
    return MlimForPreTraining(
        SMALL_MLIM, vocab_size=V, special_ids=special, max_text=MAX_TEXT, image_size=16
    )


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, V, (length,), generator=generator)
        for length in (7, 3, 24, 11, 16)
    ]


def our_states(model: MlimForPreTraining) -> list[torch.Tensor]:
    """Hidden states of each text alone, without an image."""
    lengths = np.array([len(text) for text in texts()])
    stream, ids = pack(lengths, torch.cat(texts()).numpy(), 0)
    none = torch.zeros(len(lengths), MAX_TEXT, dtype=torch.bool)
    masks = Masks(mode=none[:, 0].long(), text=none, image=none[:, :0])
    inputs = Inputs(stream, ids, torch.empty(0), 8, 1)
    with torch.no_grad():
        hidden = model.encode(inputs, masks)
    return [
        hidden[stream.text_row[stream.text_pair == pair][:length]]
        for pair, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", [BertForPreTraining, BertModel])
def test_hidden_states_on_text_are_those_of_bert(kind: Any, tmp_path: Path) -> None:
    theirs = bert(kind)
    theirs.save_pretrained(tmp_path)
    model = encoder()
    head = model.mlm_dense.weight.clone()
    weights = read_body(str(tmp_path), max_text=MAX_TEXT)
    assert ("mlm_bias" in weights) == (kind is BertForPreTraining)
    model.load_state_dict(weights, strict=False)
    plain = theirs.bert if kind is BertForPreTraining else theirs
    for text, ours in zip(texts(), our_states(model), strict=True):
        with torch.no_grad():
            expected = plain(text[None]).last_hidden_state[0]
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
        if kind is BertForPreTraining:
            logits = theirs.cls.predictions(expected)
            torch.testing.assert_close(
                model.word_logits(ours), logits, atol=1e-4, rtol=1e-4
            )
    if kind is BertModel:
        assert torch.equal(model.mlm_dense.weight, head)


def test_weights_come_back_from_bert_as_they_went() -> None:
    ours = encoder().state_dict()
    back = from_bert(to_bert(ours, layers=2), max_text=MAX_TEXT)
    own = {"image_positions", "embedder", "decoder"}
    assert back.keys() == {name for name in ours if name.split(".")[0] not in own}
    assert all(torch.equal(back[name], ours[name]) for name in back)


def test_reading_a_body_takes_no_number_from_the_run(tmp_path: Path) -> None:
    bert(BertModel).save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_body(str(tmp_path), max_text=MAX_TEXT)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def body(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with the shape of the tiny recipe and the tokenizer of `shards`."""
    folder = tmp_path_factory.mktemp("body")
    size = load_manifest(shards).tokenizer.vocab_size
    bert(vocab_size=size).save_pretrained(folder)
    copied = (shards / "tokenizer" / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(copied)
    return folder


def test_a_run_starts_from_its_body_and_resumes_from_its_checkpoint(
    shards: Path, body: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [f"--data={shards}", f"--output={run}", POST, "--optimizer.lr=0"]
    first = [*words, f"--model.body={body}", "--max_steps=1"]
    # Gone, and not missed.
    again = [*words, "--model.body=gone", "--max_steps=2"]
    printed = launch_all(1, [first, again], tmp_path / "calls.json")
    assert "model.body gone is not looked at" in printed
    assert column(run, "step") == [1, 2]
    _, path = complete_checkpoints(run)[-1]
    taken = checkpoint.load_weights(path)
    for name, value in read_body(str(body), max_text=48).items():
        assert torch.equal(taken[name], value), name


def test_a_body_that_does_not_fit_is_refused_with_the_keys_to_change(
    shards: Path, body: Path, tmp_path: Path
) -> None:
    def refused(match: str, *words: str) -> None:
        with pytest.raises(ValueError, match=match):
            check(config(shards, tmp_path / "new", *words))

    ours = f"--model.body={body}"
    wider = [POST, "--model.width=64", "--model.layers=3", ours]
    refused(r"give --model\.layers 2 \(now 3\), --model\.width 32 \(now 64\)", *wider)
    refused(r"--text\.max_tokens 64 or less", POST, ours, "--text.max_tokens=65")
    refused("BERT, which is post-norm", ours)
    refused("model.body null with it", POST, ours, "--init=somewhere")
    refused("cannot be read", POST, f"--model.body={tmp_path}")
    assert not (tmp_path / "new").exists()


def test_a_body_with_other_words_is_refused(
    shards: Path, body: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    size = load_manifest(shards).tokenizer.vocab_size
    bert(vocab_size=size + 1).save_pretrained(other)
    words = [POST, f"--model.body={other}"]
    with pytest.raises(ValueError, match=r"preprocess .* --tokenizer"):
        check(config(shards, tmp_path / "new", *words))
    bert(vocab_size=size).save_pretrained(other)
    check(config(shards, tmp_path / "new", *words))
    text = (body / "tokenizer.json").read_text()
    swapped = text.replace('"a":', '"\0":').replace('"b":', '"a":')
    (other / "tokenizer.json").write_text(swapped.replace('"\0":', '"b":'))
    with pytest.raises(ValueError, match="numbers words differently"):
        check(config(shards, tmp_path / "new", *words))
