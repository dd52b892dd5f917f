"""Probes on a real run of the tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.manifest import load_manifest
from tests.conftest import launch_environment, python
from tests.trainer.tiny import TINY, config
from trainer import trained
from trainer.dataset import Dataset
from trainer.evaluate import main as evaluate_here
from trainer.probes import Losses, load_pairs, partners, summarise


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "run"
    words = (*TINY, f"--data={shards}", f"--output={output}", "--max_steps=2")
    done = python("-m", "trainer.pretrain", *words, env=launch_environment())
    assert done.returncode == 0, done.stdout
    return output


def evaluate(run: Path, *more: str) -> str:
    words = ("-m", "trainer.evaluate", run, "--task=probes", "--examples=2", *more)
    done = python(*words, env=launch_environment())
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_probes_write_results_with_intervals_and_pictures(run: Path) -> None:
    printed = evaluate(run, "--group=base")
    result = json.loads((run / "probes.json").read_text())
    n_val = len(Dataset(result["data"], "val"))
    assert result["pairs"] == n_val
    assert 1 < result["groups"] <= n_val
    for probe, wrong in (("mlm", "blank"), ("recon", "empty")):
        assert set(result[probe]["conditions"]) == {"true", "shuffled", wrong}
        for entry in (
            *result[probe]["conditions"].values(),
            *result[probe]["gaps"].values(),
        ):
            low, high = entry["ci95"]
            assert low <= entry["mean"] <= high
        assert probe in printed
    for figure in result["figures"]:
        assert Image.open(run / figure["file"]).size[0] > 400
    for pair in result["top_words"]:
        assert Image.open(run / pair["image"]).size == (16, 16)
        masked = [token for token in pair["tokens"] if token["masked"]]
        assert masked
        for token in masked:
            shares = [share for _, share in token["top5"]]
            assert len(shares) == 5
            assert shares == sorted(shares, reverse=True)


def test_probes_write_a_page_of_the_best_the_worst_and_the_nearest_pairs(
    run: Path,
) -> None:
    evaluate(run, "--draws=1")
    result = json.loads((run / "probes.json").read_text())
    with np.load(run / "probes.npz", allow_pickle=False) as found:
        kept = dict(found)
    page = (run / "probes.html").read_text()
    assert "http" not in page
    for probe, partner, wrong in (
        ("mlm", "image", "blank"),
        ("recon", "caption", "empty"),
    ):
        for name in ("shuffled", wrong):
            metric = result["metrics"][f"{probe}_{name}_gap"]
            gap = result[probe]["gaps"][name]
            assert (metric["value"], metric["ci95"]) == (gap["mean"], gap["ci95"])
            assert (metric["chance"], metric["n"]) == (0, result["pairs"])
        gaps = kept[f"{probe}_shuffled"] - kept[f"{probe}_true"]
        gaps = gaps[np.isfinite(gaps)]
        parts = [
            section(page, f"{probe}: {title}")
            for title in (
                f"the right {partner} helps most",
                f"a wrong {partner} is better than the right one",
                f"right and wrong {partner} are nearest in worth",
            )
        ]
        shown = np.argsort(np.abs(gaps))[:2]
        for part, values in zip(
            parts,
            (np.sort(gaps)[::-1][:2], np.sort(gaps)[:2], gaps[shown]),
            strict=True,
        ):
            assert part.count("<img") == (4 if partner == "image" else 8)
            assert all(f"{value:+.3g} " in part for value in values)


def section(page: str, title: str) -> str:
    """A part of a page, up to the next one."""
    assert page.count(f"<h2>{title}</h2>") == 1
    return page.split(f"<h2>{title}</h2>")[1].split("<h2>", maxsplit=1)[0]


def test_probes_of_a_diverged_model_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.load_trained

    def diverged(*given: Any, **more: Any) -> Any:
        found = whole(*given, **more)
        with torch.no_grad():
            found.model.words.weight.fill_(torch.nan)
        return found

    monkeypatch.setattr(trained, "load_trained", diverged)
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("probes.json", "probes.html", "probes.npz", "probes"):
        found = copy / name
        shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="its training diverged"):
        evaluate_here([str(copy), "--max_pairs=4", "--draws=1"])
    assert sorted(copy.rglob("*")) == before


def test_pairs_without_a_masked_word_or_square_do_not_count(
    run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    rare = ("--text_rate=0.03", "--image_rate=0.02", "--draws=1")
    whole = trained.load_trained

    def by_chance(*given: Any, **more: Any) -> Any:
        found = whole(*given, **more)
        mask = dataclasses.replace(found.config.mask, count="bernoulli")
        config = dataclasses.replace(found.config, mask=mask)
        return dataclasses.replace(found, config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "load_trained", by_chance)
        evaluate_here([str(copy), *rare])
        result = json.loads((copy / "probes.json").read_text())
        with np.load(copy / "probes.npz", allow_pickle=False) as found:
            kept = dict(found)
        for probe in ("mlm", "recon"):
            measured = int(np.isfinite(kept[f"{probe}_true"]).sum())
            assert 0 < measured < result["pairs"]
            assert result["metrics"][f"{probe}_true"]["n"] == measured
        # Nothing at all in two pairs.
        with pytest.raises(ValueError, match=r"nothing is masked .* raise --text_rate"):
            evaluate_here([str(copy), "--text_rate=1e-6", "--max_pairs=2"])


def test_a_result_of_something_else_is_not_replaced(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "probes.json").write_text('{"task": "linear_probe", "metrics": {}}')
    with pytest.raises(ValueError, match=r"no result of probes.*: move it away"):
        evaluate_here([str(copy)])
    with pytest.raises(ValueError, match="--name probes"):
        evaluate_here(
            [str(copy), "--task=linear_probe", "--column=base", "--name=probes"]
        )


def test_the_same_seed_measures_the_same(run: Path) -> None:
    results = []
    for _ in range(2):
        evaluate(run, "--max_pairs=20", "--seed=3")
        results.append(json.loads((run / "probes.json").read_text()))
    assert results[0] == results[1]
    assert results[0]["pairs"] == 20


def test_wrong_calls_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    for words, expected in (
        ((tmp_path,), "is no run"),
        ((run, "--split=test"), "has: train, val"),
        ((run, "--group=colour"), "columns.keep colour"),
        ((run, "--task=probe"), "Did you mean 'probes'?"),
        ((run, "--group=status"), "into one group"),
        ((run, "--draws=0"), "draws"),
        ((run, "--max_pairs=1"), "max_pairs"),
    ):
        done = python("-m", "trainer.evaluate", *words, env=launch_environment())
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stdout
        assert expected in done.stdout.splitlines()[-1]


def test_data_of_another_tokenizer_is_refused_naming_both_hashes(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    manifest = load_manifest(shards)
    info = dataclasses.replace(manifest.tokenizer, sha256="f" * 64)
    files = {**manifest.files, "tokenizer/tokenizer.json": info.sha256}
    changed = dataclasses.replace(manifest, tokenizer=info, files=files)
    (other / "manifest.json").write_text(changed.to_json())
    seal = f"{changed.sha256}  manifest.json\n"
    (other / "manifest.json.sha256").write_text(seal)
    done = python("-m", "trainer.evaluate", run, "--data", other)
    assert done.returncode == 1
    assert manifest.tokenizer.sha256 in done.stdout.splitlines()[-1]
    assert "f" * 64 in done.stdout.splitlines()[-1]


def test_partners_are_other_pairs_of_other_groups(shards: Path, run: Path) -> None:
    dataset = Dataset(shards, "val")
    keys = config(shards, run)
    pairs = load_pairs(dataset, keys, seed=0, limit=None, group="base")
    partner = partners(pairs, seed=0)
    assert (pairs.groups[partner] != pairs.groups).all()
    assert len(set(partner.tolist())) > len(pairs) / 3


def test_intervals_cover_a_known_gap_and_resample_groups_whole() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(1.0, 0.1, 400)
    counts = np.ones(400)
    losses = {
        "true": Losses(sums=true, counts=counts),
        "worse": Losses(sums=true + generator.normal(0.2, 0.1, 400), counts=counts),
    }
    alone = summarise(losses, np.arange(400), 0)["gaps"]["worse"]
    assert alone["ci95"][0] < 0.2 < alone["ci95"][1]
    assert alone["mean"] == pytest.approx(0.2, abs=0.02)
    # Four copies of a hundred pairs are no more evidence than the hundred.
    copies = {
        name: Losses(sums=np.tile(loss.sums[:100], 4), counts=counts)
        for name, loss in losses.items()
    }
    grouped = summarise(copies, np.tile(np.arange(100), 4), 0)["gaps"]["worse"]
    naive = summarise(copies, np.arange(400), 0)["gaps"]["worse"]
    width = [interval[1] - interval[0] for interval in (grouped["ci95"], naive["ci95"])]
    assert width[0] > 1.6 * width[1]
