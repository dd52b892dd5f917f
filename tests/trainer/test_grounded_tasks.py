"""VQA, NLVR2 and SNLI-VE from their files to results, by the real commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import to_yaml
from tests.trainer.published import (
    colour_hypotheses,
    colour_questions,
    colour_sentences,
)
from tests.trainer.tiny import TINY_MASKVLM, config
from trainer import evaluate, finetune
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES
from trainer.tasks.vqa_answers import accuracy

Words = list[str]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has keys and no checkpoint: what --from_scratch needs."""
    folder = tmp_path_factory.mktemp("run") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config(shards, folder)))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Words]]:
    """Keys of each task for its files of train and val."""
    folder = tmp_path_factory.mktemp("published")
    keys: dict[str, dict[str, Words]] = {}
    for task, write, names in (
        ("vqa", colour_questions, ("questions", "annotations", "images")),
        ("nlvr2", colour_sentences, ("sentences", "images")),
        ("snli_ve", colour_hypotheses, ("hypotheses", "images")),
    ):
        keys[task] = {}
        for split, count in (("train2014", 96), ("val2014", 48)):
            files = write(folder / task, split, count)
            keys[task][split] = [
                f"--{name}={file}" for name, file in zip(names, files, strict=True)
            ]
    return keys


def learn(run: Path, task: str, words: Words, output: Path, *more: str) -> Path:
    always = ("--from_scratch", "--batch=16", "--lr=3e-3", "--decoders=1")
    given = [f"--task={task}", f"--output={output}", *always, *words, *more]
    finetune.main([str(run), *given])
    return output


def measure(tuned: Path, task: str, words: Words, *more: str) -> dict[str, Any]:
    evaluate.main([str(tuned), f"--task={task}", *words, *more])
    found: dict[str, Any] = json.loads((tuned / f"{task}.json").read_text())
    return found


@pytest.fixture(scope="module")
def learned(
    run: Path,
    published: dict[str, dict[str, Words]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Each task's fine-tuned model, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("learned")

    def of(task: str) -> Path:
        output = folder / task
        if not output.exists():
            dev = published[task]["val2014"]
            dev = [word.replace("--", "--dev_") for word in dev]
            if task == "snli_ve":
                dev = dev[:1]
            words = published[task]["train2014"] + dev
            learn(run, task, words, output, "--epochs=8")
        return output

    return of


TASKS = ("vqa", "nlvr2", "snli_ve")


@pytest.mark.parametrize("task", TASKS)
def test_colours_are_learned_beyond_chance(
    task: str, learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    result = measure(learned(task), task, published[task]["val2014"], "--examples=2")
    found = result["metrics"]["accuracy"]
    low, high = found["ci95"]
    assert low <= found["value"] <= high
    assert found["chance"] < 0.6
    assert found["value"] > found["chance"] + 0.3
    assert low > found["chance"]
    assert result["examples"]["used"] == found["n"]
    assert result["fine_tuned"]
    assert all(len(digest) == 64 for digest in result["files"].values())
    page = (learned(task) / f"{task}.html").read_text()
    assert page.count("data:image/png") >= (4 if task == "nlvr2" else 2)
    assert "Near the threshold" in page


def test_maskvlm_learns_the_same_tasks(
    shards: Path, published: dict[str, dict[str, Words]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    given = [*TINY_MASKVLM, f"--data={shards}", f"--output={run}"]
    keys = parse_run(PretrainConfig, given, prog="", description="", recipes=RECIPES)
    (run / "config.yaml").write_text(to_yaml(keys))
    for task in TASKS:
        words = published[task]["train2014"]
        learn(run, task, words, tmp_path / task, "--epochs=8")
        result = measure(tmp_path / task, task, published[task]["val2014"])
        found = result["metrics"]["accuracy"]
        assert found["ci95"][0] > found["chance"] + 0.1


def test_vqa_is_scored_as_a_naive_reading_of_its_files_says(
    learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    words = published["vqa"]["val2014"]
    result = measure(learned("vqa"), "vqa", words, "--examples=0")
    said = json.loads((learned("vqa") / result["predictions"]).read_text())
    given = {row["question_id"]: row["answer"] for row in said}
    annotations = json.loads(Path(words[1].split("=")[1]).read_text())["annotations"]
    scores: dict[str, list[float]] = {}
    for one in annotations:
        people = [answer["answer"] for answer in one["answers"]]
        score = accuracy(given[one["question_id"]], people)
        for name in ("accuracy", f"accuracy {one['answer_type']}"):
            scores.setdefault(name, []).append(score)
    assert set(scores) == set(result["metrics"])
    for name, values in scores.items():
        assert result["metrics"][name]["value"] == pytest.approx(np.mean(values))
        assert result["metrics"][name]["n"] == len(values)
    kept = np.load(learned("vqa") / "vqa.npz")
    assert kept["accuracy"].mean() == pytest.approx(np.mean(scores["accuracy"]))
    assert len(np.unique(kept["groups"])) == 24
    assert result["best_that_the_vocabulary_allows"] == 1
    assert result["vocabulary"] == 4


def test_answers_that_are_kept_back_are_predicted_and_not_measured(
    learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    questions, _, images = published["vqa"]["val2014"]
    result = measure(learned("vqa"), "vqa", [questions, images])
    assert set(result["metrics"]) == {"predictions"}
    said = json.loads((learned("vqa") / result["predictions"]).read_text())
    assert len(said) == 48
    assert {"question_id", "answer"} == set(said[0])


def test_nlvr2_is_scored_as_the_official_script_scores(
    learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    words = published["nlvr2"]["val2014"]
    result = measure(learned("nlvr2"), "nlvr2", words, "--examples=0")
    with open(learned("nlvr2") / result["predictions"]) as file:
        given = dict(csv.reader(file))
    lines = Path(words[0].split("=")[1]).read_text().splitlines()
    right: list[bool] = []
    whole: dict[str, bool] = {}
    for line in lines:
        one = json.loads(line)
        parts = one["identifier"].split("-")
        parts[2] = ""
        good = given[one["identifier"]].lower() == one["label"].lower()
        right.append(good)
        whole["-".join(parts)] = whole.get("-".join(parts), True) and good
    metrics = result["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert metrics["consistency"]["value"] == pytest.approx(np.mean([*whole.values()]))
    assert metrics["consistency"]["n"] == len(whole)
    kept = np.load(learned("nlvr2") / "nlvr2.npz")
    assert np.array_equal(kept["said"] == kept["labels"], right)


def test_hypotheses_without_a_label_are_counted_in_both(
    learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    kept = json.loads((learned("snli_ve") / "examples.json").read_text())
    assert kept["train"]["examples"] == {
        "undecided": 9,
        "missing_image": 0,
        "damaged_image": 0,
        "used": 87,
        "cut_texts": 0,
    }
    words = published["snli_ve"]["val2014"]
    result = measure(learned("snli_ve"), "snli_ve", words, "--examples=0")
    assert result["examples"]["undecided"] == 4
    assert result["metrics"]["accuracy"]["n"] == 44


def test_missing_images_are_refused_before_training_or_counted(
    run: Path, published: dict[str, dict[str, Words]], tmp_path: Path
) -> None:
    path, images = (word.split("=")[1] for word in published["snli_ve"]["train2014"])
    fewer = tmp_path / "images"
    shutil.copytree(images, fewer)
    (fewer / "train20140.jpg").unlink()
    (fewer / "train20141.jpg").write_bytes(b"\xff\xd8 damaged")
    words = [f"--hypotheses={path}", f"--images={fewer}"]
    with pytest.raises(ValueError, match=r"train20140\.jpg.*--unreadable leave_out"):
        learn(run, "snli_ve", words, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    more = ("--unreadable=leave_out", "--max_steps=1")
    output = learn(run, "snli_ve", words, tmp_path / "out", *more)
    found = json.loads((output / "examples.json").read_text())["train"]["examples"]
    assert (found["missing_image"], found["damaged_image"], found["used"]) == (1, 1, 85)
    # One that is found damaged in training: what the error recommends works there.
    (fewer / "train20140.jpg").write_bytes(b"\xff\xd8 damaged")
    again = tmp_path / "again"
    with pytest.raises(ValueError, match=r"train2014[01]\.jpg.*--unreadable leave_out"):
        learn(run, "snli_ve", words, again, "--epochs=1")
    learn(run, "snli_ve", words, again, *more)
    found = json.loads((again / "examples.json").read_text())["train"]["examples"]
    assert (found["damaged_image"], found["used"]) == (2, 85)
    # With a checkpoint its keys are kept.
    with pytest.raises(ValueError, match="other keys"):
        learn(run, "snli_ve", words, again, "--max_steps=2")


@pytest.mark.parametrize(
    ("task", "key", "field"),
    [("snli_ve", "hypotheses", "gold_label"), ("nlvr2", "sentences", "label")],
)
def test_examples_of_one_class_are_refused(
    run: Path,
    published: dict[str, dict[str, Words]],
    learned: Callable[[str], Path],
    tmp_path: Path,
    task: str,
    key: str,
    field: str,
) -> None:
    calls = []
    for part in ("train2014", "val2014"):
        words = dict(word[2:].split("=") for word in published[task][part])
        rows = [json.loads(line) for line in Path(words[key]).read_text().splitlines()]
        alike = [row for row in rows if row[field] == rows[0][field]]
        file = tmp_path / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in alike))
        calls.append([f"--{key}={file}", f"--images={words['images']}"])
    with pytest.raises(ValueError, match="so that there is nothing to tell apart"):
        learn(run, task, calls[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="so that there is nothing to tell apart"):
        measure(learned(task), task, calls[1])


def test_fine_tuning_is_not_continued_on_other_examples(
    run: Path, published: dict[str, dict[str, Words]], tmp_path: Path
) -> None:
    path, *rest = (word.split("=")[1] for word in published["vqa"]["train2014"])
    questions = shutil.copy(path, tmp_path)
    words = [f"--questions={questions}", f"--annotations={rest[0]}"]
    words += [f"--images={rest[1]}"]
    output = learn(run, "vqa", words, tmp_path / "out", "--max_steps=1")
    learn(run, "vqa", words, tmp_path / "out", "--max_steps=2")
    values = json.loads(Path(questions).read_text())
    values["questions"].pop()
    Path(questions).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="other examples"):
        learn(run, "vqa", words, output, "--max_steps=3")


def test_a_vocabulary_of_one_answer_is_refused(
    run: Path, published: dict[str, dict[str, Words]], tmp_path: Path
) -> None:
    words = [*published["vqa"]["train2014"], "--min_questions=25"]
    with pytest.raises(ValueError, match="lower --min_questions"):
        learn(run, "vqa", words, tmp_path / "out")


def test_tasks_need_their_own_fine_tuning(
    run: Path, learned: Callable[[str], Path], published: dict[str, dict[str, Words]]
) -> None:
    words = published["nlvr2"]["val2014"]
    with pytest.raises(ValueError, match="needs it"):
        measure(run, "nlvr2", words)
    with pytest.raises(ValueError, match="has learned snli_ve, not nlvr2"):
        measure(learned("snli_ve"), "nlvr2", words)
