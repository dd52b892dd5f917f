"""Retrieval, zero-shot classification and linear probes, by their commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.manifest import load_manifest
from trainer.evaluate import main as evaluate
from trainer.finetune import main as finetune
from trainer.tasks import gallery
from trainer.tasks.retrieval_mlim import MlimRetrieval

IMAGES = 16


@pytest.fixture(scope="module")
def tuned(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few pairs often enough to know them."""
    output = tmp_path_factory.mktemp("retrieval") / "tuned"
    words = ("--task=retrieval", "--split=val", "--features=16", f"--output={output}")
    words = (*words, "--batch=20", "--epochs=30", "--lr=0.003", "--warmup=0.05")
    finetune([str(whole), *words, "--checkpoint_every=1000"])
    return output


@pytest.fixture
def two_without_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two samples of each split say nothing in any column."""
    real = gallery.column_of

    def some(*given: Any, flag: str) -> list[str]:
        return ["", " ", *real(*given, flag=flag)[2:]]

    monkeypatch.setattr(gallery, "column_of", some)


def kept(run: Path, task: str) -> dict[str, np.ndarray]:
    with np.load(run / f"{task}.npz", allow_pickle=False) as found:
        return dict(found)


def result(run: Path, task: str, *more: str) -> dict[str, Any]:
    evaluate([str(run), f"--task={task}", *more])
    found: dict[str, Any] = json.loads((run / f"{task}.json").read_text())
    return found


def test_what_was_learned_shows_in_both_stages_and_both_ways(
    tuned: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(tuned, "retrieval", "--group=base", "--candidates=8")
    assert found["manifest_sha256"] == load_manifest(shards).sha256
    assert "trainer.evaluate" in found["command"]
    assert found["images"] == found["captions"]
    for name in ("image_to_text_r5", "text_to_image_r5"):
        for stage in ("", "features_"):
            metric = found["metrics"][stage + name]
            assert metric["chance"] == pytest.approx(5 / found["images"])
            low, high = metric["ci95"]
            assert low <= metric["value"] <= high
            assert metric["value"] > 3 * metric["chance"]
    assert "features_text_to_image_r10" in capsys.readouterr().out
    page = (tuned / "retrieval.html").read_text()
    assert page.count("data:image/jpeg") > 20
    assert "the right one furthest down" in page


def test_the_same_evaluation_again_passes_no_pair_through_the_model(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"--max_images={IMAGES}", "--candidates=null", "--seed=3")
    first = result(tuned, "retrieval", *words)
    monkeypatch.setattr(
        MlimRetrieval, "matching_logits", lambda *_: pytest.fail("scored")
    )
    assert result(tuned, "retrieval", *words) == first
    with pytest.raises(pytest.fail.Exception, match="scored"):
        result(tuned, "retrieval", *words, "--seed=4")


def test_contrast_alone_is_resumed_and_measured_by_features(
    whole: Path, tmp_path: Path
) -> None:
    words = [str(whole), "--task=retrieval", "--split=val", f"--output={tmp_path}/o"]
    words += ["--matching=false", "--features=16", "--batch=10", "--epochs=1"]
    finetune([*words, "--max_steps=1"])
    finetune(words)
    found = result(tmp_path / "o", "retrieval")
    assert found["candidates"] == 0
    assert not [name for name in found["metrics"] if name.startswith("features_")]
    with pytest.raises(ValueError, match="scores no pairs: give --candidates 0"):
        result(tmp_path / "o", "retrieval", "--candidates=8")


def test_a_fine_tuning_from_before_a_key_goes_on_with_its_default(
    whole: Path, tmp_path: Path
) -> None:
    words = [str(whole), "--task=retrieval", "--split=val", f"--output={tmp_path}/o"]
    words += ["--features=16", "--batch=10", "--epochs=1"]
    finetune([*words, "--max_steps=1"])
    keys = tmp_path / "o" / "finetune.yaml"
    lines = keys.read_text().splitlines(keepends=True)
    keys.write_text("".join(one for one in lines if not one.startswith("matching")))
    found = result(tmp_path / "o", "retrieval", f"--max_images={IMAGES}")
    assert found["candidates"] == 32
    finetune([*words, "--max_steps=2"])
    lines = [one for one in lines if not one.startswith("matching")]
    keys.write_text("".join(lines))
    with pytest.raises(ValueError, match="matching: True -> False"):
        finetune([*words, "--matching=false"])


def test_a_model_as_it_was_pretrained_is_refused_where_it_cannot_rank(
    whole: Path,
) -> None:
    for task in ("retrieval", "zero_shot"):
        with pytest.raises(ValueError, match=r"pretrain with --model\.itm_weight 1"):
            result(whole, task, *(["--column=base"] * (task == "zero_shot")))


@pytest.mark.usefixtures("two_without_class")
@pytest.mark.parametrize("by", ["features", "pairs"])
def test_zero_shot_names_a_class_and_says_what_chance_would_give(
    tuned: Path, by: str
) -> None:
    words = ("--column=base", "--group=base", f"--max_images={IMAGES}", f"--by={by}")
    found = result(tuned, "zero_shot", *words, '--templates=["a {}", "the {}"]')
    assert found["by"] == by
    metric = found["metrics"]["accuracy"]
    assert metric["chance"] == pytest.approx(1 / found["classes"])
    assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert found["without_class"] == 2
    assert sum(row["samples"] for row in found["per_class"]) == IMAGES - 2
    each = kept(tuned, "zero_shot")
    assert each["accuracy"].mean() == metric["value"]
    assert len(each["groups"]) == len(each["said"]) == IMAGES - 2
    assert "Class by class" in (tuned / "zero_shot.html").read_text()


@pytest.mark.usefixtures("two_without_class")
def test_a_linear_probe_reads_classes_in_features_that_are_computed_once(
    tuned: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--column=group", "--max_train=120", "--max_images=60", "--show=both")
    words = (*words, "--penalties=[0.001,0.1]")
    for run in (whole, tuned):
        found = result(run, "linear_probe", *words)
        metrics = found["metrics"]
        # Naming the largest class always has exactly chance there.
        metric = metrics["mean_class_accuracy"]
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
        assert metric["value"] > 1.5 * metric["chance"]
        assert found["l2"] in (0.001, 0.1)
        assert (found["train_split"], found["split"]) == ("train", "val")
        assert found["train_samples"] == 118
        assert found["train_without_class"] == found["without_class"] == 2
        each = kept(run, "linear_probe")
        assert each["accuracy"].mean() == metrics["accuracy"]["value"]
        assert ((each["said"] == each["labels"]) == (each["accuracy"] == 1)).all()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("computed"))
        assert result(tuned, "linear_probe", *words) == found


@pytest.mark.parametrize(
    ("task", "words", "cure"),
    [
        ("zero_shot", ["--column=colour"], r"columns\.keep \[colour\]"),
        ("zero_shot", ["--column=base", '--templates=["a photo"]'], "needs {} once"),
        ("zero_shot", ["--column=status"], "one class"),
        ("linear_probe", ["--column=status"], "one class"),
        ("linear_probe", ["--column=base", "--held_out=1"], "between 0 and 1"),
        ("linear_probe", ["--column=base", "--split=train"], "give two splits"),
        ("zero_shot", ["--column=base", "--classes=no.txt"], "no.txt is no file"),
        ("retrieval", ["--group=colour"], "--group 'colour' is not in"),
        ("retrieval", ["--max_images=1"], "max_images"),
    ],
)
def test_wrong_calls_are_refused_with_their_cure(
    tuned: Path, task: str, words: list[str], cure: str
) -> None:
    with pytest.raises(ValueError, match=cure):
        result(tuned, task, *words)


def test_probes_of_a_fine_tuned_model_name_the_run_that_it_came_from(
    tuned: Path, whole: Path
) -> None:
    with pytest.raises(ValueError, match=f"was fine-tuned.* came from, {whole}"):
        evaluate([str(tuned), "--task=probes"])


def test_a_gallery_too_large_for_memory_is_refused_before_an_image_is_decoded(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST_SCORES", IMAGES)
    monkeypatch.setattr(gallery, "decode_into", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"scores, more than the 16 .* --max_images"):
        result(tuned, "retrieval")


def test_templates_and_ties_are_counted_as_they_are_said_to_be() -> None:
    from trainer.tasks.classes import Answers, confusion_matrix
    from trainer.tasks.prompts import numbered, sentences

    assert sentences(["cat", "dog"], ["a {}", "{}s"]) == [
        *("a cat", "cats"),
        *("a dog", "dogs"),
    ]
    names = ["cat", "dog", "owl"]
    answers = Answers(
        scores=np.array([[1.0, 0, 0], [1, 1, 0], [0, 3, 2], [0, 0, 1]]),
        labels=numbered(["cat", "dog", "owl", "eel"], names),
        names=names,
        groups=np.arange(4),
    )
    # A tie is no answer, and a class that is not asked for cannot be right.
    assert answers.ranks.tolist() == [0, 1, 1, 3]
    assert answers.margins[:3].tolist() == [1, 0, -1]
    assert confusion_matrix(answers).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
