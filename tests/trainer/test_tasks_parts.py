"""What tasks are built of: items through a body, intervals, precision, pages."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.pages import HOSTILE, Page
from tests.trainer.tiny import SMALL_MLIM
from trainer.models.base import ModelConfig, Sizes
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.tasks.average_precision import AveragePrecision
from trainer.tasks.bodies import Body, body_of, inputs_of
from trainer.tasks.body_mlim import MlimBody
from trainer.tasks.bootstrap import OneGroup, interval, mean_interval
from trainer.tasks.classes import Answers, MeanRecall
from trainer.tasks.evaluation import EvaluateConfig
from trainer.tasks.grounded import ranked
from trainer.tasks.items import Items
from trainer.tasks.results import (
    Example,
    Metric,
    Predictions,
    Result,
    as_plain,
    extremes,
    require_name,
    write_result,
)

CONFIG = SMALL_MLIM
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


MASKVLM = MaskVlmConfig(
    image_layers=1,
    text_layers=1,
    width=16,
    heads=2,
    ffn_width=32,
    patch_size=4,
    cross_layers=1,
    decoder_layers=1,
    projection_width=8,
)


def built(config: ModelConfig) -> Any:
    torch.manual_seed(0)
    sizes = Sizes(vocab_size=50, special_ids=SPECIAL, max_text=12, image_size=16)
    return config.build(sizes)


KINDS = {
    "mlim": (CONFIG, "cls"),
    "mlim, means": (CONFIG, "mean"),
    "maskvlm": (MASKVLM, "cls"),
    "maskvlm without matching": (
        replace(MASKVLM, itm_weight=0.0, itc_weight=0.0, mlm_weight=0.0),
        "cls",
    ),
}


@pytest.fixture(params=KINDS)
def body(request: pytest.FixtureRequest) -> Body:
    config, pooling = KINDS[request.param]
    return body_of(built(config), pooling=pooling)  # type: ignore[arg-type]


def items(count: int) -> Items:
    generator = np.random.default_rng(1)
    texts = [
        np.array([2, *generator.integers(5, 50, generator.integers(1, 9)), 3])
        for _ in range(count)
    ]
    pixels = generator.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return Items.of(pixels, texts)


def pooled(body: Body, of: Items) -> torch.Tensor:
    with torch.inference_mode():
        return body.pooled(of)


def test_an_item_has_the_same_vector_whatever_the_others_show(body: Body) -> None:
    whole = items(7)
    image = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    text = np.array([1, 1, 0, 1, 1, 0, 1], bool)
    mixed = whole.shown(image, text)
    together = pooled(body, mixed)
    assert together.shape == (7, body.width)
    for row in range(7):
        alone = pooled(body, mixed.rows(np.array([row])))
        assert torch.allclose(together[row], alone[0], atol=2e-6)
    assert len(torch.unique(together.round(decimals=4), dim=0)) == 7


def test_what_an_item_does_not_show_changes_nothing(body: Body) -> None:
    whole, nothing = items(3), np.zeros(3, bool)
    every = ~nothing
    other = Items.of(255 - whole.pixels, [text[::-1].copy() for text in whole.texts])
    texts_of_other = Items.of(other.pixels, whole.texts)
    seen = [
        pooled(body, each.shown(nothing, every)) for each in (whole, texts_of_other)
    ]
    assert torch.equal(*seen)
    images_of_whole = Items.of(whole.pixels, [t[[0, 0, -1]] for t in whole.texts])
    seen = [
        pooled(body, each.shown(every, nothing)) for each in (whole, images_of_whole)
    ]
    assert torch.equal(*seen)
    assert not torch.allclose(
        pooled(body, whole), pooled(body, Items.of(other.pixels, whole.texts))
    )


def test_pooling_reads_the_rows_that_it_says() -> None:
    """Against the hidden states of all rows, item by item."""
    pretrained, whole = built(CONFIG), items(4)
    bodies = {kind: MlimBody(pretrained, pooling=kind) for kind in ("cls", "mean")}  # type: ignore[arg-type]
    inputs = inputs_of(
        whole.pixels, whole.texts, n_image=16, device=torch.device("cpu")
    )
    with torch.inference_mode():
        hidden_td = pretrained.encode(inputs, None)
    start = 0
    for row, text in enumerate(whole.texts):
        length = len(text) + 16
        own = hidden_td[start : start + length]
        expected = {"cls": own[0], "mean": own.mean(0)}
        for kind, body in bodies.items():
            found = pooled(body, whole)[row]
            assert torch.allclose(found, expected[kind], atol=1e-5), kind
        start += length


def test_both_halves_of_maskvlm_have_looked_at_the_other_modality() -> None:
    body, whole = body_of(built(MASKVLM)), items(3)
    every, nothing = np.ones(3, bool), np.zeros(3, bool)
    both = pooled(body, whole)
    image = pooled(body, whole.shown(every, nothing))
    text = pooled(body, whole.shown(nothing, every))
    half = body.width // 2
    assert (image[:, half:] == 0).all()
    assert (text[:, :half] == 0).all()
    turned = Items.of(whole.pixels[::-1].copy(), whole.texts)
    # Of another image the text's half changes, too.
    assert not torch.allclose(pooled(body, turned)[0, half:], both[0, half:])
    with pytest.raises(ValueError, match="--pooling cls"):
        body_of(built(MASKVLM), pooling="mean")


def test_an_item_shows_something() -> None:
    whole = items(2)
    with pytest.raises(ValueError, match="item 1 has neither"):
        whole.shown(np.array([True, False]), np.array([True, False]))


def naive_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum over thresholds of the gain in recall times the precision."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        shown = scores >= threshold
        recall = labels[shown].sum() / labels.sum()
        total += (recall - recall_before) * labels[shown].mean()
        recall_before = recall
    return total


def test_average_precision_is_that_of_the_definition_also_for_weights() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.integers(0, 8, 30).astype(np.float64)
        labels = generator.random(30) < 0.4
        labels[0] = True
        measure = AveragePrecision(scores, labels)
        assert measure() == pytest.approx(naive_average_precision(scores, labels))
        times = generator.integers(0, 4, 30)
        times[0] = 1
        repeated = naive_average_precision(
            np.repeat(scores, times), np.repeat(labels, times)
        )
        assert measure(times.astype(np.float64)) == pytest.approx(repeated)
    perfect = AveragePrecision(np.array([3.0, 2, 1]), np.array([True, True, False]))
    assert perfect() == 1
    nothing = AveragePrecision(np.array([1.0, 2]), np.array([True, False]))
    assert np.isnan(nothing(np.array([0.0, 1])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_measured_by_no_task(bad: float) -> None:
    scores = np.full((4, 2), bad)
    with pytest.raises(ValueError, match=r"no numbers.*--lr"):
        AveragePrecision(scores[:, 0], np.array([True, True, False, False]))
    with pytest.raises(ValueError, match="no numbers"):
        Answers(
            scores=scores,
            labels=np.zeros(4, np.int64),
            names=["cat", "dog"],
            groups=np.arange(4),
        )
    with pytest.raises(ValueError, match="no numbers"):
        ranked(iter([(np.arange(4), torch.tensor(scores))]), 4, exclusive=True)


def test_intervals_hold_the_mean_and_groups_count_once() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.5, 100)
    low, high = mean_interval(values, np.arange(100), seed=0)
    assert low < 1.0 < high
    assert 0.1 < high - low < 0.3
    copies = np.tile(values, 4)
    grouped = mean_interval(copies, np.tile(np.arange(100), 4), seed=0)
    alone = mean_interval(copies, np.arange(400), seed=0)
    assert grouped[1] - grouped[0] > 1.6 * (alone[1] - alone[0])
    # Of one group all resamples are the same, which is no certainty.
    assert isinstance(mean_interval(values, np.zeros(100), seed=0), OneGroup)
    # Resamples without what is asked about are left out.
    few = interval(
        lambda taken: float("nan") if taken[0] == 0 else 2.0, np.arange(3), seed=0
    )
    assert few == [2.0, 2.0]


def test_the_mean_over_classes_is_that_of_the_rows_that_were_taken() -> None:
    labels = np.array([0, 0, 0, 1, 2, -1])
    right = np.array([True, False, True, True, False, False])
    recall = MeanRecall(right, labels)
    assert recall(np.ones(6)) == pytest.approx((2 / 3 + 1 + 0) / 3)
    # Twice the first row, and none of class 2: as if it had no samples.
    assert recall(np.array([2.0, 1, 0, 1, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)
    assert np.isnan(recall(np.array([0.0, 0, 0, 0, 0, 1])))


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_result_is_written_as_numbers_and_as_a_page(tmp_path: Path) -> None:
    example = Example(
        images=[jpeg("red"), jpeg("blue")],
        texts=[HOSTILE, "a second text"],
        title=f"0.93 {HOSTILE}",
        note=HOSTILE,
    )
    result = Result(
        metrics={
            "pr_auc": Metric(0.75, [0.7, 0.8], 0.5, 40),
            "nothing": Metric(float("nan"), [float("nan")] * 2),
            "alone": Metric(0.25, OneGroup(), n=3),
        },
        details={"n_pairs": 40},
        examples={"Best": [example], "Worst": [], "Near the threshold": [example]},
    )
    facts = {"task": "matching", "seed": 3, "command": HOSTILE}
    path = write_result(tmp_path, "matching", result, facts=facts)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found == as_plain(result, facts=facts)
    assert found["metrics"]["pr_auc"] == {
        "value": 0.75,
        "ci95": [0.7, 0.8],
        "chance": 0.5,
        "n": 40,
    }
    assert found["metrics"]["nothing"]["value"] is None
    assert found["metrics"]["alone"]["ci95"] is None
    assert "one group" in found["metrics"]["alone"]["no_ci95"]
    assert found["command"] == HOSTILE
    page = Page((tmp_path / "matching.html").read_text())
    assert page.tags["img"] == 4
    assert page.tags["script"] == 0
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    said = " ".join(page.words)
    assert said.count(HOSTILE) >= 7
    assert "Best" in said
    assert "Worst" not in said
    assert not list(tmp_path.glob("tmp-*"))


def test_a_result_takes_no_others_name(tmp_path: Path) -> None:
    result = Result(metrics={"accuracy": Metric(0.5)}, kept={"right": np.ones(2)})
    write_result(tmp_path, "vqa", result, facts={"task": "vqa"})
    require_name(tmp_path, "vqa", task="vqa")
    require_name(tmp_path, "free", task="vqa")
    for name in ("origin", "answers", "torn"):
        (tmp_path / f"{name}.json").write_text(
            {"answers": "[1]", "torn": "{"}.get(name, "{}")
        )
    (tmp_path / "report.html").write_text("a page")
    for name in ("origin", "answers", "torn", "report"):
        with pytest.raises(ValueError, match=rf"{name}\..* is no result.*--name"):
            require_name(tmp_path, name, task="vqa")
    with pytest.raises(ValueError, match="no result of matching"):
        require_name(tmp_path, "vqa", task="matching")
    (tmp_path / "sent_predictions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sent_predictions\.json is no result of vqa"):
        require_name(tmp_path, "sent", task="vqa")
    told = Result(metrics=result.metrics, predictions=Predictions("csv", "a,True\n"))
    path = write_result(tmp_path, "told", told, facts={"task": "vqa"})
    assert json.loads(path.read_text())["predictions"] == "told_predictions.csv"
    assert (tmp_path / "told_predictions.csv").read_text() == "a,True\n"
    require_name(tmp_path, "told", task="vqa")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("config", "kept for a file that runs"),
        ("wandb", "kept for a file that runs"),
        ("tokenizer", "kept for a file that runs"),
        ("vqa", "what --task vqa writes"),
        ("probes", "what --task probes writes"),
        (".hidden", "no name of a file"),
        ("a/b", "no name of a file"),
        ("", "no name of a file"),
        ("n" * 300, "no name of a file"),
    ],
)
def test_a_name_that_others_will_want_is_refused_before_they_have_it(
    name: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        EvaluateConfig(run="run", task="retrieval", name=name)
    for free in ("retrieval", "retrieval-2", None):
        EvaluateConfig(run="run", task="retrieval", name=free)


def test_a_name_whose_writing_died_before_the_numbers_can_be_taken_again(
    tmp_path: Path,
) -> None:
    told = {"command": "<td>task</td><td>matching</td>"}
    result = Result(metrics={"accuracy": Metric(0.5)}, kept={"right": np.ones(2)})
    facts = {"task": "vqa", "seed": 0} | told
    write_result(tmp_path, "mine", result, facts=facts).unlink()
    require_name(tmp_path, "mine", task="vqa")
    with pytest.raises(ValueError, match=r"mine\.html is no result of matching"):
        require_name(tmp_path, "mine", task="matching")
    # The page comes first: an array without one is somebody else's.
    (tmp_path / "mine.html").unlink()
    with pytest.raises(ValueError, match=r"mine\.npz is no result of vqa"):
        require_name(tmp_path, "mine", task="vqa")
    write_result(tmp_path, "mine", result, facts=facts)
    require_name(tmp_path, "mine", task="vqa")


def test_examples_are_the_surest_and_the_least_sure() -> None:
    score = [4.0, -3.0, 0.1, -5.0, 2.0, -0.2]
    right = [True, True, False, False, False, True]
    assert extremes(score, right, 2) == {
        "Best": [0, 1],
        "Worst": [3, 4],
        "Near the threshold": [2, 5],
    }
