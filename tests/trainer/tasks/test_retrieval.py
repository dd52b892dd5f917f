"""Retrieval ranks as a naive loop does, whatever the batch, however often it died."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tests.trainer.tasks.test_ranking import naive_rank
from tests.trainer.tiny import SMALL_MLIM, config
from trainer.build import build_model
from trainer.dataset import Dataset
from trainer.models.base import Sizes
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.mlim import MlimForPreTraining
from trainer.stream import Stream
from trainer.tasks import kept_states
from trainer.tasks.gallery import Gallery, first_and_which, read_gallery
from trainer.tasks.ranked_gallery import (
    BothWays,
    feature_scores,
    rank_by_pairs,
    rank_by_scores,
    states_of,
)
from trainer.tasks.retrieval import candidates_of
from trainer.tasks.retrieval_maskvlm import MaskVlmRetrieval, with_heads
from trainer.tasks.retrieval_mlim import MlimRetrieval
from trainer.tasks.retrievers import RetrievalModel, TextState, log_odds, retriever

IMAGES = 14
SPECIAL = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "unk": 4}
ONE_BLOCK = MaskVlmConfig(
    image_layers=1,
    text_layers=1,
    cross_layers=1,
    decoder_layers=1,
    width=32,
    heads=2,
    ffn_width=64,
    patch_size=8,
    projection_width=8,
)
OF_MLIM = dataclasses.replace(SMALL_MLIM, layers=1)


@pytest.fixture(scope="module")
def gallery(shards: Path) -> Gallery:
    """Some images with one to three captions each, of which one caption and one image
    occur twice.
    """
    dataset = Dataset(shards, "val")
    read = read_gallery(
        dataset,
        config(shards, shards),
        dataset.places()[: 2 * IMAGES],
        progress=tqdm(disable=True),
    )
    owner = np.repeat(np.arange(IMAGES), np.arange(IMAGES) % 3 + 1)
    texts = read.texts[: len(owner)]
    texts[7] = texts[2]
    pixels = read.pixels[:IMAGES].copy()
    pixels[9] = pixels[4]
    images, image_of = first_and_which([one.tobytes() for one in pixels])
    different, text_of = first_and_which([text.tobytes() for text in texts])
    return dataclasses.replace(
        read,
        places=read.places[:IMAGES],
        uids=read.uids[:IMAGES],
        pixels=pixels,
        texts=texts,
        owner=owner,
        image_of=image_of,
        text_of=text_of,
        images=images,
        different=different,
    )


@pytest.fixture(scope="module", params=["mlim", "maskvlm"])
def model(shards: Path, request: pytest.FixtureRequest) -> RetrievalModel:
    """A tiny model with heads that were never trained."""
    return tiny_model(request.param, shards)


def tiny_model(name: str, shards: Path) -> RetrievalModel:
    torch.manual_seed(3)
    tokenizer = Dataset(shards, "val").tokenizer
    found: RetrievalModel
    if name == "mlim":
        made = build_model(config(shards, shards), tokenizer)
        assert isinstance(made, MlimForPreTraining)
        found = MlimRetrieval(made, features=8)
    else:
        sizes = Sizes(tokenizer.vocab_size, tokenizer.special_ids, 48, 16)
        found = MaskVlmRetrieval(ONE_BLOCK.build(sizes), whole=True)
    # As they are drawn, all scores are next to equal.
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(4.0)
    return found.eval()


def features(
    model: RetrievalModel, gallery: Gallery, folder: Path, *, batch: int
) -> np.ndarray:
    return feature_scores(
        model,
        states_of(model, gallery, batch=batch, pairs=True),
        gallery,
        folder=folder,
        digest="",
        batch=batch,
        progress=tqdm(disable=True),
    )


def ranked(
    model: RetrievalModel,
    gallery: Gallery,
    folder: Path,
    *,
    k: int | None,
    batch: int = 16,
) -> BothWays:
    bar, states = tqdm(disable=True), states_of(model, gallery, batch=batch, pairs=True)
    scores = feature_scores(
        model, states, gallery, folder=folder, digest="", batch=batch, progress=bar
    )
    return rank_by_pairs(
        model,
        states,
        gallery,
        rank_by_scores(scores, gallery, listed=k) if k else None,
        folder=folder,
        digest="",
        batch=batch,
        progress=bar,
    )


def one_by_one(model: RetrievalModel, gallery: Gallery) -> np.ndarray:
    """Score (N, C) of every image with every caption, each in a pass of its own. What
    is the same scores the same, but for rounding between passes.
    """
    scores = np.empty((len(gallery.uids), len(gallery.texts)), dtype=np.float32)
    with torch.inference_mode():
        for image, pixels in enumerate(gallery.pixels):
            states = model.image_states(pixels[None])
            for text, ids in enumerate(gallery.texts):
                logits = model.matching_logits(
                    states, torch.tensor([0]), model.text_states([ids])
                )
                scores[image, text] = float(log_odds(logits))
    scores = scores[gallery.images[gallery.image_of]]
    return scores[:, gallery.different[gallery.text_of]]


def same(a: BothWays, b: BothWays) -> None:
    for one, other in ((a.images, b.images), (a.texts, b.texts)):
        assert np.array_equal(one.ranks, other.ranks)
        assert np.array_equal(one.found.target, other.found.target)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_the_whole_gallery_is_ranked_as_by_a_loop_over_single_pairs(
    model: RetrievalModel, gallery: Gallery, tmp_path: Path
) -> None:
    scores = one_by_one(model, gallery)
    both = ranked(model, gallery, tmp_path, k=None)
    for image in range(IMAGES):
        expected = naive_rank(scores[image], gallery.owner == image)
        assert both.images.ranks[image] == expected
    for text, own in enumerate(gallery.owner):
        expected = naive_rank(scores[:, text], np.arange(IMAGES) == own)
        assert both.texts.ranks[text] == expected
    # One caption of two images is right of one at most; an image that occurs twice is
    # nobody's first.
    assert both.texts.ranks[[2, 7]].max() > 0
    assert (both.texts.ranks[np.isin(gallery.owner, [4, 9])] > 0).all()


def test_reranking_orders_the_candidates_of_the_first_stage_by_pair_scores(
    model: RetrievalModel, gallery: Gallery, tmp_path: Path
) -> None:
    k, scores = 4, one_by_one(model, gallery)
    first = features(model, gallery, tmp_path / "first", batch=5)
    first = first[gallery.image_of[:, None], gallery.text_of]
    both = ranked(model, gallery, tmp_path, k=k)
    images = np.arange(IMAGES)
    ways = (
        (both.images, first, scores, images, gallery.owner),
        (both.texts, first.T, scores.T, gallery.owner, images),
    )
    for found, cheap, dear, owners, targets in ways:
        for query, own in enumerate(owners):
            listed = np.argsort(-cheap[query], kind="stable")[:k]
            right = targets[listed] == own
            expected = naive_rank(cheap[query], targets == own)
            if right.any():
                expected = naive_rank(dear[query][listed], right)
            assert found.ranks[query] == expected
            assert set(found.found.target[query]) == set(listed)
            assert found.scores[query] == pytest.approx(
                np.sort(dear[query][listed])[::-1], abs=1e-4
            )
        assert (found.ranks < k).any()
        assert (found.ranks >= k).any()


@pytest.mark.parametrize("k", [None, 5])
def test_the_size_of_a_batch_changes_nothing(
    model: RetrievalModel, gallery: Gallery, tmp_path: Path, k: int | None
) -> None:
    whole = ranked(model, gallery, tmp_path / "a", k=k, batch=64)
    same(ranked(model, gallery, tmp_path / "b", k=k, batch=3), whole)


class Counted:
    """Counts images and texts that go through encoders of their own."""

    def __init__(self, model: RetrievalModel, patch: pytest.MonkeyPatch) -> None:
        self.images, self.texts = 0, 0
        of: Any = model.pretrained
        whole, of_texts = model.image_states, getattr(of, "encode_texts", None)

        def images(pixels: np.ndarray) -> Tensor:
            self.images += len(pixels)
            return whole(pixels)

        def texts(stream: Stream, *rest: Any) -> Tensor:
            assert of_texts is not None
            self.texts += stream.pairs
            found: Tensor = of_texts(stream, *rest)
            return found

        patch.setattr(model, "image_states", images)
        if of_texts is not None:
            patch.setattr(of, "encode_texts", texts)


@pytest.mark.parametrize("k", [None, 5])
def test_each_image_and_text_is_encoded_once_for_its_features_and_all_its_pairs(
    model: RetrievalModel,
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    k: int | None,
) -> None:
    scores = one_by_one(model, gallery)
    with monkeypatch.context() as patch:
        count = Counted(model, patch)
        both = ranked(model, gallery, tmp_path, k=k, batch=4)
    assert count.images == len(gallery.images)
    # MLIM has no pass of a text alone that a pair could use.
    alone = 0 if isinstance(model, MlimRetrieval) else len(gallery.different)
    assert count.texts == alone
    expected = np.take_along_axis(scores, both.images.found.target, 1)
    assert both.images.scores == pytest.approx(expected, abs=1e-5)
    expected = np.take_along_axis(scores.T, both.texts.found.target, 1)
    assert both.texts.scores == pytest.approx(expected, abs=1e-5)


def test_states_beyond_what_is_kept_are_made_again_to_the_same_scores(
    gallery: Gallery, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("maskvlm", shards)
    whole = ranked(model, gallery, tmp_path / "a", k=None, batch=4)
    monkeypatch.setattr("trainer.tasks.kept_states.MOST_TEXT_BYTES", 3000)
    monkeypatch.setattr("trainer.tasks.kept_states.MOST_IMAGE_BYTES", 4000)
    count = Counted(model, monkeypatch)
    same(ranked(model, gallery, tmp_path / "b", k=None, batch=4), whole)
    assert count.texts > 3 * len(gallery.different)
    # Some are kept, and those are not encoded again.
    assert len(gallery.images) < count.images < 2 * len(gallery.images)


def test_a_batch_of_pairs_may_have_images_far_apart(
    model: RetrievalModel, gallery: Gallery, tmp_path: Path
) -> None:
    states = states_of(model, gallery, batch=2, pairs=True)
    with torch.inference_mode():
        every = states.of_images(np.arange(states.images))
        for wanted in ([0, 5], [1, 6, 7, 8], [0], [3, 4, 9]):
            found = states.of_images(np.array(wanted))
            assert torch.equal(found, every[wanted])


def test_all_texts_lie_on_the_host_also_when_just_as_many_fit_as_are_kept(
    gallery: Gallery, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States on two devices could not be put together."""
    model = tiny_model("maskvlm", shards)
    moved: list[int] = []
    whole = kept_states._on_host

    def counted(states: Sequence[TextState]) -> Sequence[TextState]:
        moved.append(len(states))
        return whole(states)

    with torch.inference_mode():
        texts = [gallery.texts[number] for number in gallery.different]
        fit = sum(state.nbytes for state in model.text_states(texts[:4]))
        monkeypatch.setattr(kept_states, "MOST_TEXT_BYTES", fit)
        monkeypatch.setattr(kept_states, "_on_host", counted)
        states = states_of(model, gallery, batch=4, pairs=True)
        for first in (0, 4, 8):
            states.of_texts(np.arange(first, first + 4))
    assert len(states._texts) == 4
    assert moved == [4, 4, 4]


def test_states_that_nobody_asks_for_again_are_not_kept(
    model: RetrievalModel, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features alone; and images of pairs, in a model without features."""
    states = states_of(model, gallery, batch=4, pairs=False)
    with torch.inference_mode():
        for first in range(0, 12, 4):
            states.of_images(np.arange(first, first + 4))
            states.of_texts(np.arange(first, first + 4))
    assert not states._images
    assert not states._texts
    monkeypatch.setattr(model, "has_features", False)
    states = states_of(model, gallery, batch=4, pairs=True)
    with torch.inference_mode():
        states.of_images(np.arange(4))
        states.of_texts(np.arange(4))
    assert not states._images
    assert len(states._texts) == 4


def test_features_that_are_known_are_not_computed_again(
    model: RetrievalModel,
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = features(model, gallery, tmp_path / "whole", batch=4)
    of_texts, calls = model.text_features, 0

    def dying(states: list[TextState]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return of_texts(states)

    monkeypatch.setattr(model, "text_features", dying)
    with pytest.raises(KeyboardInterrupt):
        features(model, gallery, tmp_path / "killed", batch=4)
    monkeypatch.setattr(model, "image_states", lambda _: pytest.fail("computed"))
    assert np.array_equal(features(model, gallery, tmp_path / "killed", batch=4), whole)
    assert calls == 1 + -(-len(gallery.different) // 4)


class Killed(nn.Module):
    """A model that is killed after some batches, and counts them."""

    def __init__(self, model: RetrievalModel, last: int) -> None:
        super().__init__()
        self.model, self.passes, self.last = model, 0, last

    def __getattr__(self, name: str) -> Any:
        own: Any = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["model"], name)

    def matching_logits(self, *given: Any) -> Tensor:
        if self.passes == self.last:
            raise KeyboardInterrupt
        self.passes += 1
        return self.model.matching_logits(*given)


def test_a_killed_evaluation_goes_on_to_the_same_result(
    model: RetrievalModel,
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.tasks.pair_scores._BLOCK", 32)
    whole = ranked(model, gallery, tmp_path / "whole", k=None, batch=8)
    dying: Any = Killed(model, 13)
    with pytest.raises(KeyboardInterrupt):
        ranked(dying, gallery, tmp_path / "killed", k=None, batch=8)
    dying.passes, dying.last = 0, -1
    same(ranked(dying, gallery, tmp_path / "killed", k=None, batch=8), whole)
    # 13 passes of 8 finished three blocks of 32, that is 12 passes.
    pairs = len(gallery.images) * len(gallery.different)
    assert dying.passes == -(-pairs // 8) - 12
    dying.passes = 0
    same(ranked(dying, gallery, tmp_path / "killed", k=None, batch=8), whole)
    assert dying.passes == 0


def test_a_maskvlm_without_heads_gets_them_and_learns_both_losses() -> None:
    torch.manual_seed(0)
    keys = dataclasses.replace(ONE_BLOCK, itc_weight=0.0, itm_weight=0.0)
    made = keys.build(Sizes(500, SPECIAL, 16, 16))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=r"pretrain with --model\.itc_weight 1"):
        retriever(made, None)
    model = retriever(made, SimpleNamespace(task="retrieval", matching=True))
    after = model.pretrained.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    values = learned(model, steps=40)
    assert values[-1]["contrastive"] < values[0]["contrastive"] / 2
    assert values[-1]["matching"] < values[0]["matching"]


def test_heads_are_added_whatever_sites_of_dropout_a_model_has() -> None:
    """Matching takes more passes than pretraining did, and nothing is dropped in it."""
    keys = dataclasses.replace(
        ONE_BLOCK,
        image_layers=12,
        text_layers=12,
        cross_layers=4,
        decoder_layers=8,
        itm_weight=0.0,
        dropout=0.1,
    )
    with pytest.raises(ValueError, match="sites"):
        dataclasses.replace(keys, itm_weight=1.0)
    made = keys.build(Sizes(500, SPECIAL, 16, 16))
    assert with_heads(made, matching=True).config.itm_weight == 1


def learned(model: RetrievalModel, *, steps: int) -> list[dict[str, float]]:
    """Losses of some steps on a dozen pairs."""
    drawn, ids = np.random.default_rng(0), torch.arange(12)
    pixels = drawn.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    texts = [np.array([1, 5 + number, 20 + number % 3, 2]) for number in range(12)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(steps):
        losses = model.losses(
            pixels,
            texts,
            hard=0.5,
            seed=0,
            epochs=torch.full_like(ids, step),
            uids=ids,
            images=ids,
        )
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        values.append({name: float(loss.detach()) for name, loss in losses.items()})
    return values


class Anew(Sequence[Any]):
    """States of texts that are encoded whenever they are asked for."""

    def __init__(self, model: RetrievalModel, texts: list[np.ndarray]) -> None:
        self._encode, self._texts = model.text_states, texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: Any) -> Any:
        return self._encode([self._texts[number]])[0]


def test_both_losses_learn_through_the_texts_that_they_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = retriever(ONE_BLOCK.build(Sizes(500, SPECIAL, 16, 16)), None)

    def gradients(loss: str) -> dict[str, Tensor]:
        ids, drawn = torch.arange(6), np.random.default_rng(0)
        losses = model.losses(
            drawn.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8),
            [np.array([1, 5 + number, 20 + number % 3, 2]) for number in range(6)],
            hard=0.5,
            seed=0,
            epochs=torch.zeros_like(ids),
            uids=ids,
            images=ids,
        )
        model.zero_grad()
        losses[loss].backward()
        named = model.pretrained.named_parameters()
        return {name: one.grad.clone() for name, one in named if one.grad is not None}

    shared = {loss: gradients(loss) for loss in ("contrastive", "matching")}
    monkeypatch.setattr(model, "text_states", partial(Anew, copy(model)))
    for loss, expected in shared.items():
        found = gradients(loss)
        assert found.keys() == expected.keys()
        assert found["words.weight"].abs().max() > 0
        for name, one in found.items():
            assert one.abs().max() > 0 or expected[name].abs().max() == 0
            torch.testing.assert_close(expected[name], one, rtol=1e-3, atol=1e-6)


HEADS = {
    "maskvlm": ONE_BLOCK,
    "maskvlm that cannot match": dataclasses.replace(ONE_BLOCK, itm_weight=0.0),
    "maskvlm that cannot contrast": dataclasses.replace(ONE_BLOCK, itc_weight=0.0),
    "mlim": OF_MLIM,
    "mlim that can match": dataclasses.replace(OF_MLIM, itm_weight=1.0),
}


@pytest.mark.parametrize("heads", HEADS)
def test_contrast_alone_trains_no_head_for_matching_and_ranks_by_features(
    heads: str,
) -> None:
    torch.manual_seed(0)
    made = HEADS[heads].build(Sizes(500, SPECIAL, 16, 16))
    heads_before = [name for name in made.state_dict() if "itm_" in name]
    model = retriever(
        made, SimpleNamespace(task="retrieval", matching=False, features=8)
    )
    before = {name: one.clone() for name, one in model.state_dict().items()}
    # Heads that it was pretrained with stay, and none is added.
    of_matching = [name for name in before if "itm_" in name]
    assert len(of_matching) == len(heads_before)
    values = learned(model, steps=40)
    assert values[0].keys() == {"contrastive"}
    assert values[-1]["contrastive"] < 0.85 * values[0]["contrastive"]
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in of_matching)
    assert candidates_of(model, "auto") == 0
    for wanted in (32, None):
        with pytest.raises(ValueError, match=r"--candidates 0.* --matching true"):
            candidates_of(model, wanted)
