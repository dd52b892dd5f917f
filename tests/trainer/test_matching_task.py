"""Matching of items, from pairs to numbers and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.manifest import PAIR_DTYPE, file_sha256, load_manifest
from pipeline.pairs import main as make_pairs
from tests.conftest import launch_environment, python
from tests.trainer.pages import Page
from trainer.dataset import Dataset
from trainer.evaluate import main as evaluate
from trainer.finetune import main as finetune
from trainer.options import load_config
from trainer.tasks.finetuning import with_head
from trainer.tasks.matching import Matching, MatchingModel, MatchingTraining, shown
from trainer.tasks.pair_files import read_pairs
from trainer.tasks.pretrained import load_pretrained
from trainer.tasks.samples import Samples

_KEYS = MatchingTraining(pairs="-", text_only=0.25, image_only=0.25)


@pytest.fixture(scope="module")
def pairs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pairs") / "train.npy"
    make_pairs([str(shards), "--column=base", f"--output={output}", "--limit=40"])
    return output


@pytest.fixture(scope="module")
def tuned(whole: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen its few pairs often enough to know them."""
    output = tmp_path_factory.mktemp("matching") / "tuned"
    words = (str(whole), "--task=matching", f"--pairs={pairs}", f"--output={output}")
    done = python(
        *("-m", "trainer.finetune", *words, "--batch=16", "--epochs=12", "--lr=0.003"),
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == str(output)
    return output


def task(shards: Path, whole: Path, pairs: Path) -> Matching:
    samples = Samples(
        [Dataset(shards, split) for split in ("train", "val")],
        load_config(whole),
        seed=0,
    )
    return Matching(
        samples,
        _KEYS,
        pairs=read_pairs(str(pairs), samples),
        dev_pairs=None,
        evaluation=None,
        seed=0,
    )


def test_evaluation_writes_numbers_with_intervals_and_examples_to_look_at(
    tuned: Path, pairs: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate([str(tuned), "--task=matching", f"--pairs={pairs}", "--examples=3"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{tuned}/matching.json"
    assert "80 of 80 pairs of" in said.err
    assert "the very pairs that the model learned" in said.err
    found = json.loads((tuned / "matching.json").read_text())
    assert found["manifest_sha256"] == load_manifest(shards).sha256
    assert found["pairs_sha256"] == file_sha256(pairs)
    assert found["command"].startswith("python -m trainer.evaluate")
    assert found["seed"] == 0
    assert found["pretraining_steps"] == 12
    assert found["n_pairs"] == 80
    assert found["trained_on_these_pairs"] is True
    assert set(found["metrics"]) == {"pr_auc_both", "pr_auc_image", "pr_auc_text"}
    for metric in found["metrics"].values():
        low, high = metric["ci95"]
        assert low <= metric["value"] <= high
        assert metric["chance"] == 0.5
        assert metric["n"] == 80
    # It was trained on these pairs: it knows them.
    assert found["metrics"]["pr_auc_both"]["value"] > 0.8
    page = Page((tuned / "matching.html").read_text())
    n_examples = sum(word.startswith("They ") for word in page.words)
    assert 3 < n_examples <= 9
    assert page.tags["img"] == 2 * n_examples
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)


def test_the_same_call_gives_the_same_files(
    tuned: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("again.json", "again.html", "again.npz")
    others = unlearned(pairs, tmp_path / "others.npy")
    seen = []
    for _ in range(2):
        words = [
            "--task=matching",
            f"--pairs={others}",
            "--name=again",
            "--modes=[text]",
        ]
        evaluate([str(tuned), *words])
        assert "the very pairs that" not in capsys.readouterr().err
        seen.append([(tuned / name).read_bytes() for name in files])
    assert seen[0] == seen[1]
    found = json.loads(seen[0][0])
    assert set(found["metrics"]) == {"pr_auc_text"}
    assert found["trained_on_these_pairs"] is False
    assert found["n_pairs_trained_on"] == 0


def unlearned(pairs: Path, output: Path) -> Path:
    """Pairs of the same samples, none of which is in the file."""
    table = np.load(pairs)
    table["right_uid"] = np.roll(table["right_uid"], 1)
    given = np.load(pairs)[["left_uid", "right_uid"]].tolist()
    known = {frozenset(pair) for pair in given}
    drawn = table[["left_uid", "right_uid"]].tolist()
    new = [len(set(pair)) == 2 and frozenset(pair) not in known for pair in drawn]
    assert sum(new) > 40
    np.save(output, table[new])
    return output


def test_a_part_of_the_learned_pairs_is_told_from_others(
    tuned: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = np.load(unlearned(pairs, tmp_path / "others.npy"))
    learned = np.load(pairs)[:30]
    # The other way around it is the same pair.
    left, right = learned["left_uid"].copy(), learned["right_uid"].copy()
    learned["left_uid"], learned["right_uid"] = right, left
    some = np.concatenate([others, learned])
    # Others write uids as they please: these are the same bits.
    dtype = [(n, "i8" if n == "left_uid" else some.dtype[n]) for n in some.dtype.names]
    signed = np.zeros(len(some), dtype=dtype)
    for name in some.dtype.names:
        signed[name] = some[name].view("i8") if name == "left_uid" else some[name]
    np.save(tmp_path / "some.npy", signed)
    words = ["--task=matching", f"--pairs={tmp_path / 'some.npy'}", "--name=some"]
    evaluate([str(tuned), *words, "--modes=[text]", "--examples=0"])
    assert f"30 of {len(others) + 30} pairs of" in capsys.readouterr().err
    found = json.loads((tuned / "some.json").read_text())
    assert found["trained_on_these_pairs"] is True
    assert found["n_pairs_trained_on"] == 30


def test_dev_pairs_that_are_learned_are_told_before_training(
    whole: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = [str(whole), "--task=matching", f"--pairs={pairs}", "--max_steps=1"]
    others = unlearned(pairs, tmp_path / "others.npy")
    for dev, told in ((others, False), (pairs, True)):
        output = tmp_path / dev.stem
        finetune([*learn, f"--dev_pairs={dev}", f"--output={output}"])
        said = capsys.readouterr().err
        assert (f"80 of 80 pairs of {dev} are in {pairs} too" in said) == told


def test_scores_of_a_file_are_those_of_its_pairs_one_by_one(
    shards: Path, whole: Path, pairs: Path
) -> None:
    one = task(shards, whole, pairs)
    start = load_pretrained(whole, data=None, from_scratch=False, seed=0)
    model = with_head(one, start.model, seed=0).eval()
    assert isinstance(model, MatchingModel)
    with torch.inference_mode():
        known = read_pairs(str(pairs), one._samples)
        for mode in ("text", "image", "both"):
            scores = one.scores(model, known, mode, batch=7, quiet=True)
            for number in (0, 33, 79):
                sides = [
                    one._samples.items(
                        known.rows[[number], side],
                        captions=known.captions[[number], side],
                    ).shown(np.array([mode != "text"]), np.array([mode != "image"]))
                    for side in (0, 1)
                ]
                left, right = model(*sides), model(*reversed(sides))
                assert left.item() == pytest.approx(scores[number], abs=1e-5)
                # No side is another's.
                assert left.item() == pytest.approx(right.item(), abs=1e-6)


def test_modality_dropout_has_its_rates_and_follows_from_pair_and_epoch() -> None:
    uids = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, 4000)
    image, text = shown(uids, text_only=0.3, image_only=0.2, seed=5, epoch=2)
    assert (image | text).all()
    for side in (0, 1):
        assert (~image[:, side]).mean() == pytest.approx(0.3, abs=0.03)
        assert (~text[:, side]).mean() == pytest.approx(0.2, abs=0.03)
    both_alone = (~image).all(1).mean()
    assert both_alone == pytest.approx(0.09, abs=0.02)
    turned = shown(uids[::-1], text_only=0.3, image_only=0.2, seed=5, epoch=2)
    assert np.array_equal(turned[0], image[::-1])
    for seed, epoch in ((5, 3), (6, 2)):
        other = shown(uids, text_only=0.3, image_only=0.2, seed=seed, epoch=epoch)
        assert not np.array_equal(other[0], image)
    image, text = shown(uids, text_only=0.0, image_only=0.0, seed=5, epoch=2)
    assert image.all()
    assert text.all()
    image, text = shown(uids, text_only=1.0, image_only=0.0, seed=5, epoch=2)
    assert not image.any()


def test_a_batch_shows_the_samples_of_the_file(
    shards: Path, whole: Path, pairs: Path
) -> None:
    one = task(shards, whole, pairs)
    table = np.load(pairs)
    batch = one.batch(np.array([4, 2]), epoch=1)
    assert batch.labels.tolist() == [bool(table["label"][n]) for n in (4, 2)]
    for side, items in (("left", batch.left), ("right", batch.right)):
        for row, number in enumerate((4, 2)):
            at = one._samples.rows(table[[number]][f"{side}_uid"])
            if items.has_image[row]:
                assert np.array_equal(items.pixels[row], one._samples.image(int(at[0])))
            if items.has_text[row]:
                assert np.array_equal(
                    items.texts[row], one._samples.text(int(at[0]), 0)
                )


def damaged(pairs: Path, path: Path, **changes: object) -> Path:
    table = np.load(pairs)
    for name, value in changes.items():
        table[name] = value
    np.save(path, table)
    return path


def test_wrong_pairs_are_refused_with_their_cure(
    shards: Path, whole: Path, tuned: Path, pairs: Path, tmp_path: Path
) -> None:
    strange = damaged(pairs, tmp_path / "strange.npy", left_uid=7)
    alike = damaged(pairs, tmp_path / "alike.npy", label=1)
    wrong = damaged(pairs, tmp_path / "wrong.npy", label=3)
    np.save(tmp_path / "plain.npy", np.arange(4))
    (tmp_path / "text.npy").write_text("left,right\n")
    words = ["--task=matching", f"--pairs={tmp_path / 'missing.npy'}"]
    cure = r"is no file: make it with python -m pipeline\.pairs"
    with pytest.raises(ValueError, match=cure):
        finetune([str(whole), *words, f"--output={tmp_path / 'o'}"])
    with pytest.raises(ValueError, match=cure):
        evaluate([str(tuned), *words])
    samples = task(shards, whole, pairs)._samples
    for path, expected in (
        (strange, "80 of 80 uids are not in .* 0000000000000007"),
        (alike, "all 80 pairs have the same label"),
        (wrong, "neither 0 nor 1"),
        (tmp_path / "plain.npy", "holds no pairs"),
        (tmp_path / "text.npy", "is no array of numpy"),
    ):
        with pytest.raises(ValueError, match=expected):
            read_pairs(str(path), samples)
    # Nor is a file of the model's overwritten.
    before = (tuned / "origin.json").read_bytes()
    words = ["--task=matching", f"--pairs={pairs}", "--name=origin"]
    with pytest.raises(ValueError, match=r"--name origin is kept for a file that"):
        evaluate([str(tuned), *words])
    assert (tuned / "origin.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"was not fine-tuned.*trainer\.finetune"):
        evaluate([str(whole), "--task=matching", f"--pairs={pairs}"])
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "dtype", "value", "expected"),
    [
        (
            "left_uid",
            "U16",
            "00bcbd62cda87e53",
            r"left_uid is of type <U16.*\(uint64\)",
        ),
        ("right_uid", "f8", 7.0, "right_uid is of type float64.*whole numbers"),
        ("label", "f4", 0.5, "neither 0 nor 1: write 1 for"),
        ("label", "U1", "1", "neither 0 nor 1"),
        ("left_caption", "i2", -5, "a left_caption is -5: .*from 0, or -1"),
        ("right_caption", "f4", 0.0, "right_caption is of type float32.*from 0, or -1"),
        ("right_uid", "u8", 0, "1 of 3 pairs are of a sample and itself.* number 0"),
    ],
)
def test_values_that_stand_for_no_pair_are_refused_as_what_they_are(
    tmp_path: Path, name: str, dtype: str, value: object, expected: str
) -> None:
    fields: list[Any] = [
        (n, dtype if n == name else PAIR_DTYPE[n]) for n in PAIR_DTYPE.names or ()
    ]
    table = np.zeros(3, dtype=fields)
    table["label"], table["left_caption"] = np.array([0, 1, 1]), -1
    if name != "left_uid":
        table["left_uid"] = [0, 1, 2]
    if name != "right_uid":
        table["right_uid"] = [1, 2, 3]
    table[name] = [value, 5, 6] if name == "right_uid" else value
    np.save(tmp_path / "p.npy", table)
    with pytest.raises(ValueError, match=expected):
        # Before a sample is looked for.
        read_pairs(str(tmp_path / "p.npy"), None)  # type: ignore[arg-type]


def test_a_caption_that_a_sample_lacks_is_refused(
    shards: Path, whole: Path, pairs: Path, tmp_path: Path
) -> None:
    table = np.load(pairs)
    table["right_caption"][3] = 99
    np.save(tmp_path / "p.npy", table)
    said = (
        r"1 of 80 pairs show a caption .* number 3, from 0, whose right_caption is 99"
    )
    with pytest.raises(ValueError, match=said):
        task(shards, whole, tmp_path / "p.npy")


def test_a_file_that_is_no_array_is_answered_with_the_one_that_is(
    pairs: Path, shards: Path, whole: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"parquet is no array.*give the \.npy"
    ) as found:
        task(shards, whole, pairs.with_suffix(".parquet"))
    assert "pickle" not in str(found.value)


def test_pairs_of_three_columns_will_do(
    shards: Path, whole: Path, pairs: Path, tmp_path: Path
) -> None:
    table = np.load(pairs)
    np.save(tmp_path / "p.npy", table[["left_uid", "right_uid", "label"]].copy())
    one = task(shards, whole, tmp_path / "p.npy")
    assert one.n_train == 80
