"""MaskVLM trains on two ranks, resumes, changes ranks and ZeRO stage, and takes the
same steps however they are split. Real launches over gloo.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForPreTraining

from tests.trainer.sequence import launch_all
from tests.trainer.test_maskvlm import Pairs
from tests.trainer.tiny import TINY_MASKVLM, column, config
from trainer.check import check
from trainer.contract import METRICS, complete_checkpoints, read_validation
from trainer.export import ExportConfig, export
from trainer.metrics import keep_steps
from trainer.models import hf_maskvlm
from trainer.models.maskvlm_encoder import Passes
from trainer.trained import load_trained

STEPS = 6
# fp32 sums in another order, which six steps of AdamW amplify a little.
CLOSE = 2e-4
LOSSES = ("mlm", "mim", "itc", "itm")
NAMES = (
    "loss",
    *(f"{name}_loss" for name in LOSSES),
    "grad_norm",
    "itc_image_to_text_r1",
    "itm_accuracy",
    "itc_temperature",
)
WHOLE = "--micro_batch=24"
RECOMPUTE = "--deepspeed.activation_checkpointing=true"


class Runs:
    """Runs below a folder."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self._shards = folder, shards

    def call(self, name: str, stage: int, *words: str) -> list[str]:
        """Arguments that take the run `name` to its end, or to other `--max_steps`."""
        where = (f"--data={self._shards}", f"--output={self.folder / name}")
        often = ("--checkpoint.every_steps=2", "--checkpoint.keep=9")
        zero = f"--deepspeed.zero_stage={stage}"
        return [*where, zero, *often, f"--max_steps={STEPS}", *words]

    def cut(self, name: str, to: str, step: int) -> None:
        """Make the run `to`: `name` as it was killed after the checkpoint at `step`."""
        shutil.copytree(self.folder / name, self.folder / to)
        for later, path in complete_checkpoints(self.folder / to):
            if later > step:
                shutil.rmtree(path)
        keep_steps(self.folder / to / METRICS, step)

    def losses(self, name: str) -> list[float]:
        """Losses and figures of all its steps."""
        assert column(self.folder / name, "step") == list(range(1, STEPS + 1))
        return [
            value for metric in NAMES for value in column(self.folder / name, metric)
        ]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file: launches of 2, 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("maskvlm")
    made = Runs(folder, shards)
    call = made.call
    launch_all(
        2,
        [
            call("two", 1, "--eval.every_steps=6"),
            call("three", 3, RECOMPUTE, "--eval.every_steps=6"),
        ],
        folder / "two.json",
        tiny=TINY_MASKVLM,
    )
    made.cut("two", "again", 4)
    made.cut("two", "moved", 2)
    launch_all(
        1,
        [
            call("whole", 0, WHOLE, "--eval.every_steps=6"),
            call("moved", 3, "--max_steps=4"),
        ],
        folder / "one.json",
        tiny=TINY_MASKVLM,
    )
    launch_all(
        2,
        [call("again", 1), call("moved", 2)],
        folder / "again.json",
        tiny=TINY_MASKVLM,
    )
    return made


def test_a_run_on_as_many_ranks_resumes_bitwise(runs: Runs) -> None:
    assert runs.losses("again") == runs.losses("two")


@pytest.mark.parametrize("name", ["two", "three", "moved"])
def test_splits_ranks_and_stages_take_the_same_steps(runs: Runs, name: str) -> None:
    """Two ranks with two micro-batches each; ZeRO 3 with activations computed again;
    from 2 ranks to 1 in ZeRO 3 and back in ZeRO 2. All as one rank with all pairs.
    """
    assert runs.losses(name) == pytest.approx(runs.losses("whole"), rel=CLOSE)
    for exact in ("sample_digest", "itc_text_to_image_r1"):
        assert column(runs.folder / name, exact) == column(runs.folder / "whole", exact)


def test_every_loss_falls_under_the_curve_of_chance(runs: Runs) -> None:
    first = {name: column(runs.folder / "two", f"{name}_loss")[0] for name in LOSSES}
    # Of 24 pairs, of two answers, and of grey for pixels.
    assert first["itc"] == pytest.approx(3.18, abs=0.6)
    assert first["itm"] == pytest.approx(0.69, abs=0.2)
    assert 0 < first["mim"] < 0.5
    assert column(runs.folder / "two", "itc_temperature")[0] == pytest.approx(0.07)
    # Pixels of other images differ by more than six steps teach: that loss is left out.
    for name in ("mlm", "itc", "itm"):
        losses = column(runs.folder / "two", f"{name}_loss")
        assert sum(losses[-2:]) < sum(losses[:2]), name


@pytest.mark.parametrize("name", ["two", "three"])
def test_held_out_pairs_are_measured_alike_on_any_number_of_ranks(
    runs: Runs, name: str
) -> None:
    found, expected = (
        read_validation(runs.folder / each)[-1] for each in (name, "whole")
    )
    assert found["step"] == expected["step"] == STEPS
    assert found.keys() == expected.keys()
    for key in ("val_itc_loss", "val_itm_loss", "val_mlm_loss", "val_mim_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3)
        assert found[key] > 0
    assert 0 <= found["val_itc_image_to_text_r1"] <= 1
    assert found["val_itc_temperature"] == pytest.approx(0.07, rel=0.05)


@pytest.fixture(scope="module")
def exported(runs: Runs) -> Path:
    """The export of a run."""
    folder = runs.folder / "out"
    export(ExportConfig(run=str(runs.folder / "two"), output=str(folder)))
    return folder


def test_an_exported_run_says_what_the_run_s_model_says(
    runs: Runs, exported: Path
) -> None:
    model = load_trained(runs.folder / "two").model
    loaded = AutoModelForPreTraining.from_pretrained(exported)
    assert type(loaded) is hf_maskvlm.MaskVlmForPreTraining
    pairs = Pairs([9, 4, 12, 7, 5, 6])
    inputs, masks = pairs.micro(model.config)
    hidden = torch.zeros(6, 12, dtype=torch.bool)
    hidden[:, 1:] = masks.text[:, :11]
    padded = {
        "input_ids": pad_sequence(pairs.texts, batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones_like(text) for text in pairs.texts], batch_first=True
        ),
        "pixel_values": inputs.pixels.permute(0, 3, 1, 2) / 127.5 - 1,
        "bool_masked_pos": masks.image,
        "text_masked_pos": hidden,
    }
    with torch.no_grad():
        losses = model(inputs, masks).losses
        found = loaded(**padded)
        clean = model.encode_pairs(inputs, None, Passes(True, False, True, False))
        own = torch.arange(6)
        logits = model.matching_logits(clean, own, own)
        image, text = (F.normalize(x, dim=1) for x in model.project(clean))
        joint = model.encode(inputs, masks)
        words = model.word_logits(joint.text.at(torch.arange(inputs.stream.text_used)))
    torch.testing.assert_close(found.mlm_loss, losses["mlm"] / masks.text.sum())
    side = model.config.patch_size
    pixels = int(masks.image.sum()) * side**2
    torch.testing.assert_close(found.mim_loss, losses["mim"] / pixels)
    torch.testing.assert_close(found.loss, found.mlm_loss + found.mim_loss)
    torch.testing.assert_close(found.itm_logits, logits)
    torch.testing.assert_close(found.image_embeds, image)
    torch.testing.assert_close(found.text_embeds, text)
    factor = model.itc_temperature().detach()
    torch.testing.assert_close(found.logits_per_image, factor * image @ text.T)
    rows = padded["attention_mask"].bool()
    torch.testing.assert_close(found.prediction_logits[rows], words)
    assert found.reconstruction.shape == (6, 3, 16, 16)
    encoder = AutoModel.from_pretrained(exported)
    assert type(encoder) is hf_maskvlm.MaskVlmModel
    names = ("input_ids", "attention_mask", "pixel_values")
    with torch.no_grad():
        states = encoder(**{name: padded[name] for name in names})
        alone = encoder(pixel_values=padded["pixel_values"])
        texts = encoder(**{name: padded[name] for name in names[:2]})
    torch.testing.assert_close(states.image_hidden_state, clean.image_bnd)
    torch.testing.assert_close(alone.image_hidden_state, clean.image_bnd)
    torch.testing.assert_close(texts.text_hidden_state, states.text_hidden_state)
    cls = states.image_joint_state[:, 0], states.text_joint_state[:, 0]
    with torch.no_grad():
        again = model.itm_head(torch.cat(cls, 1))
    torch.testing.assert_close(again, logits)


def test_each_side_has_its_embeddings_alone_and_wrong_shapes_are_told(
    exported: Path,
) -> None:
    loaded = AutoModelForPreTraining.from_pretrained(exported)
    pairs = Pairs([9, 4, 12, 7, 5, 6])
    inputs, _ = pairs.micro(loaded.maskvlm.config)
    pixels = inputs.pixels.permute(0, 3, 1, 2) / 127.5 - 1
    texts = pad_sequence(pairs.texts, batch_first=True)
    real = pad_sequence([torch.ones_like(text) for text in pairs.texts], True)
    with torch.no_grad():
        both = loaded(texts, real, pixels)
        images, words = loaded(pixel_values=pixels[:4]), loaded(texts, real)
    torch.testing.assert_close(images.image_embeds, both.image_embeds[:4])
    torch.testing.assert_close(words.text_embeds, both.text_embeds)
    assert images.text_embeds is images.itm_logits is words.image_embeds is None
    for model in (loaded, AutoModel.from_pretrained(exported)):
        with pytest.raises(ValueError, match="4 images and 6 texts"):
            model(texts, real, pixels[:4])
        with pytest.raises(ValueError, match=r"the model takes \[images, 3, 16, 16\]"):
            model(texts, real, pixels[..., :12])
        with pytest.raises(ValueError, match=r"the model takes \[images, 3, 16, 16\]"):
            model(pixel_values=pixels[0])
        with pytest.raises(ValueError, match="give input_ids, pixel_values or both"):
            model()


def test_a_new_run_starts_from_an_export(
    runs: Runs, exported: Path, tmp_path: Path, shards: Path
) -> None:
    words = (f"--init={exported}", "--model.itm_weight=0", "--model.mim_weight=0")
    config_of = config(shards, tmp_path / "new", *words, tiny=TINY_MASKVLM)
    check(config_of)
    with pytest.raises(ValueError, match=r"--model\.name maskvlm"):
        check(config(shards, tmp_path / "new", f"--init={exported}"))
    card = (exported / "README.md").read_text()
    assert "MaskVLM (Kwon et al., 2023" in card
    assert "| mim_loss |" in card
    assert str(runs.folder) not in card
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="a maskvlm is no BERT"):
        export(ExportConfig(run=str(runs.folder / "two"), output=out, body=True))
