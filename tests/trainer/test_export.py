"""An exported run is loaded by `transformers` and says what the run's model says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertModel,
)

from pipeline.manifest import file_sha256
from pipeline.tokenizer import load_tokenizer, read_tokenizer
from tests.conftest import launch_environment, python
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import config
from trainer.check import check
from trainer.dataset import Dataset
from trainer.export import ExportConfig, export
from trainer.exported_tokenizer import write_tokenizer
from trainer.initial import read_weights
from trainer.masking import MaskConfig, mam
from trainer.models import hf
from trainer.models.base import Inputs
from trainer.models.bert import read_body
from trainer.models.mlim import masked_words
from trainer.stream import capacity, pack
from trainer.tasks.texts import TextEncoder
from trainer.trained import Trained, load_trained

LENGTHS = [9, 4, 30, 17]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs of a `post`-norm and a `pre`-norm model, which has an ITM head,
    and exports of both.
    """
    folder = tmp_path_factory.mktemp("export")
    words = [f"--data={shards}", "--max_steps=2", "--eval.every_steps=2"]
    calls = [
        [*words, f"--output={folder / norm}", f"--model.norm={norm}"]
        for norm in ("post", "pre")
    ]
    calls[1] += ["--model.itm_weight=1", "--model.itm_group=3"]
    launch_all(1, calls, folder / "calls.json")
    done = python(
        *("-m", "trainer.export", folder / "post", folder / "out", "--body"),
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == str(folder / "out")
    assert not list(folder.glob(".*tmp"))
    return folder


@pytest.fixture(scope="module")
def trained(runs: Path) -> Trained:
    return load_trained(runs / "post")


def example(trained: Trained) -> tuple[Inputs, object, dict[str, torch.Tensor]]:
    """A masked micro-batch, and the same padded as `transformers` has it."""
    model = trained.model
    generator = torch.Generator().manual_seed(0)
    n_image, size = model.grid**2, trained.config.image.size
    total = sum(LENGTHS)
    flat = torch.randint(5, model.words.num_embeddings, (total,), generator=generator)
    stream, ids = pack(np.array(LENGTHS), flat.numpy(), n_image)
    masks = mam(
        MaskConfig(),
        seed=3,
        epoch=0,
        uids=torch.arange(len(LENGTHS)),
        n_text=stream.n_words,
        text_capacity=max(LENGTHS),
        n_image=n_image,
    )
    shape = (len(LENGTHS), size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    hidden = masked_words(stream, masks)
    inputs = Inputs(stream, ids, pixels, capacity(int(hidden.sum())), len(LENGTHS))
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    labels, real = torch.full_like(padded, -100), torch.zeros_like(padded)
    mask_id = model.mask_id
    for row in range(stream.text_used):
        at = int(stream.text_pair[row]), int(stream.text_position[row])
        padded[at], real[at] = ids[row], 1
        if hidden[row]:
            padded[at], labels[at] = mask_id, ids[row]
    return (
        inputs,
        masks,
        {
            "input_ids": padded,
            "attention_mask": real,
            "pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1,
            "bool_masked_pos": masks.image,
            "labels": labels,
        },
    )


def test_the_loaded_model_gives_the_outputs_and_losses_of_the_run(
    runs: Path, trained: Trained
) -> None:
    inputs, masks, padded = example(trained)
    loaded = AutoModelForPreTraining.from_pretrained(runs / "out")
    assert isinstance(loaded, hf.MlimForPreTraining)
    with torch.no_grad():
        hidden = trained.model.encode(inputs, masks)
        losses = trained.model(inputs, masks)
        found = loaded(**padded)
    stream = inputs.stream
    used = stream.text_used
    rows = (stream.text_pair[:used], stream.text_position[:used])
    expected = hidden[stream.text_row[:used]]
    torch.testing.assert_close(found.last_hidden_state[rows], expected)
    image = found.last_hidden_state[:, max(LENGTHS) :]
    torch.testing.assert_close(image, hidden[stream.image_row])
    words = int((padded["labels"] >= 0).sum())
    pixels = int(masks.image.sum()) * trained.model.config.patch_size**2
    torch.testing.assert_close(found.mlm_loss, losses.losses["mlm"] / words)
    torch.testing.assert_close(found.recon_loss, losses.losses["recon"] / pixels)
    weight = trained.model.config.recon_weight
    total = found.mlm_loss + weight * found.recon_loss
    torch.testing.assert_close(found.loss, total)
    encoder = AutoModel.from_pretrained(runs / "out")
    assert type(encoder) is hf.MlimModel
    labels = padded.pop("labels")
    assert labels.max() > 0
    with torch.no_grad():
        nothing = loaded(**padded, labels=torch.full_like(labels, -100))
    assert nothing.mlm_loss == 0
    with torch.no_grad():
        states = encoder(**padded).last_hidden_state
    assert torch.equal(states, found.last_hidden_state)


def test_a_model_saved_again_is_the_same(runs: Path, tmp_path: Path) -> None:
    first = AutoModelForPreTraining.from_pretrained(runs / "out")
    first.save_pretrained(tmp_path)
    second = hf.MlimForPreTraining.from_pretrained(tmp_path)
    assert first.config.to_json_string() == second.config.to_json_string()
    weights = second.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in first.state_dict().items())


def test_what_an_encoder_lacks_is_drawn_as_a_new_model_s(
    runs: Path, tmp_path: Path
) -> None:
    AutoModel.from_pretrained(runs / "out").save_pretrained(tmp_path)
    model = hf.MlimForPreTraining.from_pretrained(tmp_path).mlim
    assert torch.equal(model.mlm_bias, torch.zeros_like(model.mlm_bias))
    assert torch.equal(model.mlm_norm.weight, torch.ones_like(model.mlm_norm.weight))
    assert 0.015 < float(model.mlm_dense.weight.detach().std()) < 0.025


def test_the_body_is_a_bert_with_the_same_hidden_states(
    runs: Path, trained: Trained
) -> None:
    _, _, padded = example(trained)
    text = {name: padded[name] for name in ("input_ids", "attention_mask")}
    body = BertModel.from_pretrained(runs / "out" / "body").eval()
    with torch.no_grad():
        theirs = body(**text).last_hidden_state
        ours = AutoModel.from_pretrained(runs / "out")(**text).last_hidden_state
    real = text["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    weights = read_body(str(runs / "out" / "body"), max_text=48)
    own = trained.model.state_dict()
    assert all(torch.equal(weights[name], own[name]) for name in weights)


def test_the_tokenizer_gives_texts_as_the_model_was_trained_to_read_them(
    runs: Path, trained: Trained, shards: Path
) -> None:
    info = Dataset(str(shards), "train").tokenizer
    files = shards / "tokenizer" / "tokenizer.json"
    texts = ["a red heart", "a grinning face with big eyes", "heart " * 60]
    encoder = TextEncoder(files, info.special_ids, max_tokens=48)
    expected, _ = encoder.encode(texts)
    for folder in (runs / "out", runs / "out" / "body"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        rows = zip(found.input_ids, found.attention_mask, expected, strict=True)
        for ids, real, one in rows:
            assert ids[: len(one)].tolist() == one.tolist()
            assert real.tolist() == [1] * len(one) + [0] * (len(ids) - len(one))
        assert tokenizer.mask_token_id == trained.model.mask_id
        pair = tokenizer("a red heart", "a face").input_ids
        sep = info.special_ids["sep"]
        assert [pair.count(sep), pair[-1]] == [2, sep]


def test_data_tokenized_with_an_export_are_its_model_s(
    runs: Path, shards: Path
) -> None:
    stored = load_tokenizer(str(runs / "out"))
    own = read_tokenizer(shards / "tokenizer")
    assert stored == own


def test_a_tokenizer_that_adds_both_ends_is_exported_as_it_is(
    runs: Path, tmp_path: Path
) -> None:
    info = load_tokenizer(str(runs / "out")).info
    words = runs / "out" / "tokenizer.json"
    write_tokenizer(words, tmp_path, info.special_ids, max_text=9)
    assert (tmp_path / "tokenizer.json").read_bytes() == words.read_bytes()
    assert not (tmp_path / "dataset_tokenizer.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 9


def test_a_run_on_a_dataset_behind_a_url_is_exported_with_its_tokenizer(
    runs: Path, shards: Path, tmp_path: Path
) -> None:
    fsspec.filesystem("memory").put(str(shards), "/exported", recursive=True)
    output = tmp_path / "out"
    given = ExportConfig(
        run=str(runs / "post"), output=str(output), data="memory://exported"
    )
    export(given)
    names = ("tokenizer.json", "tokenizer_config.json", "dataset_tokenizer.json")
    for name in names:
        assert (output / name).read_bytes() == (runs / "out" / name).read_bytes()
    own = json.loads((shards / "tokenizer" / "tokenizer_config.json").read_bytes())
    found = json.loads((output / "tokenizer_config.json").read_bytes())
    assert found == own | {"model_max_length": 48}


def test_pixels_are_those_of_training(runs: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = AutoImageProcessor.from_pretrained(runs / "out")(
        Image.fromarray(pixels), return_tensors="pt"
    ).pixel_values
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(image[0], expected, atol=1e-6, rtol=0)
    wide = Image.new("RGB", (60, 33), "red")
    processor = AutoImageProcessor.from_pretrained(runs / "out")
    assert processor(wide, return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_the_card_has_data_recipe_and_results_and_no_paths(
    runs: Path, shards: Path
) -> None:
    card = (runs / "out" / "README.md").read_text()
    manifest = (shards / "manifest.json.sha256").read_text().split()[0]
    assert manifest in card
    rows = (runs / "post" / "metrics.jsonl").read_text().splitlines()
    assert f"| mlm_loss | {json.loads(rows[-1])['mlm_loss']:.4f} |" in card
    assert "| val_loss |" in card
    assert "global_batch: 24" in card
    assert str(runs) not in card
    assert str(shards.parent) not in card


def test_an_export_can_be_trained_on(
    runs: Path, shards: Path, trained: Trained
) -> None:
    words = file_sha256(shards / "tokenizer" / "tokenizer.json")
    given = read_weights(runs / "out", tokenizer_sha256=words)
    own = trained.model.state_dict()
    assert given.keys() == own.keys()
    assert all(torch.equal(given[name], own[name]) for name in own)
    keys = [f"--init={runs / 'out'}", "--model.norm=post"]
    check(config(shards, runs / "new", *keys))
    with pytest.raises(ValueError, match=r"out holds an exported model.*another --out"):
        check(config(shards, runs / "out", *keys))


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(match: str, run: Path, *, body: bool = False) -> None:
        with pytest.raises(ValueError, match=match):
            export(ExportConfig(run=str(run), output=str(out), body=body))

    refused("export without --body", runs / "pre", body=True)
    refused("is no run", tmp_path)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    refused("is not empty", runs / "pre")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "mine").unlink()
    export(ExportConfig(run=str(runs / "pre"), output=str(out)))
    assert (out / "model.safetensors").is_file()
    shutil.rmtree(out)


def test_texts_and_images_that_do_not_fit_are_refused(runs: Path) -> None:
    model = AutoModel.from_pretrained(runs / "out")
    ids = torch.full((1, 49), 7)
    with pytest.raises(ValueError, match="max_length=48"):
        model(ids)
    pixels = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        model(ids[:, :3], pixel_values=pixels)
    with pytest.raises(ValueError, match=r"the model takes \[images, 3, 16, 16\]"):
        model(ids[:, :3], pixel_values=pixels[:1, :, :8])
    left = torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match="pad on the right"):
        model(ids[:, :3], left)


def test_an_itm_head_is_exported_and_says_what_the_runs_says(
    runs: Path, tmp_path: Path
) -> None:
    run = load_trained(runs / "pre")
    inputs, _, padded = example(run)
    export(ExportConfig(run=str(runs / "pre"), output=str(tmp_path / "out")))
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    names = ("attention_mask", "pixel_values")
    real = padded["attention_mask"].bool()
    words = torch.zeros_like(padded["input_ids"])
    words[real] = inputs.token_ids[: inputs.stream.text_used]
    with torch.no_grad():
        expected = run.model.matching_logits(
            run.model.encode(inputs, None), inputs.stream
        )
        found = loaded(input_ids=words, **{name: padded[name] for name in names})
    torch.testing.assert_close(found.itm_logits, expected)
    assert AutoModel.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| val_itm_accuracy |" in card
