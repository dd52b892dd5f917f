"""Retrieval: which caption is this image's, and which image is this caption's.

Owns the keys of the task, its batches and its result. Does not own the models
(`trainer.tasks.retrievers`), how ranks are counted (`trainer.tasks.ranking`) or how a
gallery is ranked (`trainer.tasks.ranked_gallery`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer.options import at_least
from trainer.philox import signed_uids
from trainer.probes import drawn_places
from trainer.tasks.base import DATA, Context, Spec, Task
from trainer.tasks.bootstrap import mean_interval
from trainer.tasks.gallery import Gallery, column_of, first_and_which, read_gallery
from trainer.tasks.items import Items
from trainer.tasks.pair_scores import fingerprint
from trainer.tasks.ranked_gallery import (
    SHOWN,
    BothWays,
    feature_scores,
    rank_by_pairs,
    rank_by_scores,
    states_of,
)
from trainer.tasks.ranking import RECALL_AT, chance_recall
from trainer.tasks.results import Metric, Result
from trainer.tasks.retrieval_examples import examples, words_of
from trainer.tasks.retrievers import RetrievalModel, retriever
from trainer.tasks.samples import DRAWN, Samples

_CANDIDATES = 32


@dataclass(frozen=True, kw_only=True)
class RetrievalTraining:
    """What is learned, from which images."""

    split: str = "train"
    """Split to learn from; in each epoch an image shows one of its captions, drawn."""
    features: int = 128
    """Width of the projections of MLIM's first stage. MaskVLM has its own."""
    hard: float = 0.5
    """Share of the pairs that do not match which are drawn by the first stage's
    similarity; the others are any of the batch."""
    matching: bool = True
    """Learn to tell pairs too, and rank the best of the first stage anew by it; false:
    contrast alone."""

    def __post_init__(self) -> None:
        at_least("", self, features=1, hard=0)
        if self.hard > 1:
            raise ValueError(f"--hard {self.hard} is a share: at most 1")


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation:
    """What is ranked, and how."""

    split: str = "val"
    """Split whose images and captions are the gallery."""
    max_images: int | None = None
    """Take at most this many images, drawn by the seed; null for all. Recall is higher
    among fewer."""
    candidates: int | Literal["auto"] | None = "auto"
    """How many of each query's first targets, by features, get a score of their own
    that orders them anew. 0: none, features alone; null: every pair of the gallery is
    scored, which a model without features needs; auto: 32, or 0 for a model that
    scores no pairs."""
    group: str | None = None
    """json key: images with the same value are resampled together in the bootstrap."""
    batch: int = 128
    """Pairs that go through the model at once."""
    examples: int = 4
    """Queries of each kind on the page."""

    def __post_init__(self) -> None:
        at_least("", self, max_images=2, batch=1, examples=0)
        if isinstance(self.candidates, int):
            at_least("", self, candidates=0)


class _Batch(NamedTuple):
    items: Items
    uids: Tensor
    """(B,) int64."""
    images: Tensor
    """(B,) int64, equal where images are."""
    epochs: Tensor
    """(B,) int64."""


class Retrieval:
    """The task on its data, in training or in an evaluation."""

    dev_metric: str | None = None

    def __init__(self, context: Context, *, training: bool) -> None:
        self._context, self._keys = context, context.keys
        self._dataset = context.dataset(self._keys.split)
        self.n_train = len(self._dataset) if training else 0
        if training:
            self._samples = Samples(
                [self._dataset], context.pretraining, seed=context.seed
            )

    @property
    def files(self) -> dict[str, str]:
        """What the model learns from, kept beside it: another dataset is another run,
        and has another schedule.
        """
        return {DATA: f"{self._dataset.manifest_hash}  {self._keys.split}\n"}

    def model(self, model: nn.Module) -> nn.Module:
        """As `Task.model`."""
        found: nn.Module = retriever(model, self._context.tuned)
        return found

    def batch(self, numbers: np.ndarray, *, epoch: int) -> _Batch:
        """As `Task.batch`."""
        items = self._samples.items(
            numbers, captions=np.full(len(numbers), DRAWN), epoch=epoch
        )
        uids = torch.from_numpy(signed_uids(self._samples.uids(numbers)))
        _, images = first_and_which([one.tobytes() for one in items.pixels])
        return _Batch(
            items, uids, torch.from_numpy(images), torch.full_like(uids, epoch)
        )

    def loss(self, model: nn.Module, batch: _Batch) -> Tensor:
        """As `Task.loss`: the sum of the model's losses."""
        assert isinstance(model, RetrievalModel)
        device = self._context.device
        losses = model.losses(
            batch.items.pixels,
            batch.items.texts,
            hard=self._keys.hard,
            seed=self._context.seed,
            epochs=batch.epochs.to(device),
            uids=batch.uids.to(device),
            images=batch.images.to(device),
        )
        return torch.stack(list(losses.values())).sum()

    def dev(self, model: nn.Module) -> dict[str, float]:
        """As `Task.dev`: the last checkpoint is taken, and nothing is chosen."""
        return {}

    def evaluate(self, model: nn.Module) -> Result:
        """As `Task.evaluate`."""
        assert isinstance(model, RetrievalModel)
        keys, context = self._keys, self._context
        candidates = candidates_of(model, keys.candidates)
        places = drawn_places(self._dataset, seed=context.seed, limit=keys.max_images)
        with tqdm(total=len(places), desc="images", disable=None) as bar:
            gallery = read_gallery(
                self._dataset, context.pretraining, places, progress=bar
            )
        groups = np.arange(len(places))
        if keys.group:
            values = column_of(self._dataset, places, keys.group, flag="--group")
            _, groups = np.unique(values, return_inverse=True)
        stages = self._ranked(model, gallery, candidates)
        metrics: dict[str, Metric] = {}
        for name, both in stages.items():
            metrics |= recall(both, gallery, groups, stage=name, seed=context.seed)
        last = next(iter(stages.values()))
        return Result(
            metrics=metrics,
            details={
                "split": keys.split,
                "data": self._dataset.name,
                "manifest_sha256": self._dataset.manifest_hash,
                "images": len(places),
                "captions": len(gallery.texts),
                "groups": len(np.unique(groups)),
                "candidates": candidates,
                "ties": "count against the model",
                "also_of_another": gallery.copies,
            },
            examples=examples(
                last,
                gallery,
                words=words_of(context.tokenizer_file),
                count=keys.examples,
            ),
            kept=ranks_of(stages)
            | {
                "image_to_text_groups": groups,
                "text_to_image_groups": groups[gallery.owner],
            },
        )

    def _ranked(
        self, model: RetrievalModel, gallery: Gallery, chosen: int | None
    ) -> dict[str, BothWays]:
        """Ranks by stage, the final one first."""
        keys, stages = self._keys, {}
        total = len(gallery.images) + len(gallery.different)
        digest = fingerprint(model, self._dataset.manifest_hash)
        folder, first = self._context.folder / "retrieval", None
        states = states_of(model, gallery, batch=keys.batch, pairs=chosen != 0)
        with tqdm(total=total, desc="features", disable=None) as bar:
            if model.has_features:
                scores = feature_scores(
                    model,
                    states,
                    gallery,
                    folder=folder,
                    digest=digest,
                    batch=keys.batch,
                    progress=bar,
                )
                listed = chosen or SHOWN
                first = rank_by_scores(scores, gallery, listed=listed)
        if chosen == 0:
            assert first is not None
            return {"": first}
        with tqdm(desc="pairs", unit="pair", disable=None) as bar:
            stages[""] = rank_by_pairs(
                model,
                states,
                gallery,
                None if chosen is None else first,
                folder=folder,
                digest=digest,
                batch=keys.batch,
                progress=bar,
            )
        if first is not None:
            stages["features_"] = first
        return stages


def recall(
    both: BothWays, gallery: Gallery, groups: np.ndarray, *, stage: str, seed: int
) -> dict[str, Metric]:
    """R@1, 5 and 10 both ways, with intervals over images (a caption is resampled with
    its image) and what chance would give.

    Args:
        groups: (N,) what is resampled together.
        stage: prefix of names.
    """
    n_images, n_texts = len(gallery.uids), len(gallery.texts)
    ways = {
        "image_to_text": (
            both.images.ranks,
            groups,
            np.bincount(gallery.owner, minlength=n_images),
            n_texts,
        ),
        "text_to_image": (
            both.texts.ranks,
            groups[gallery.owner],
            np.ones(n_texts, dtype=np.int64),
            n_images,
        ),
    }
    return {
        f"{stage}{way}_r{k}": Metric(
            value=float((ranks < k).mean()),
            ci95=mean_interval(ranks < k, of, seed=seed),
            chance=chance_recall(right, targets, k),
            n=len(ranks),
        )
        for way, (ranks, of, right, targets) in ways.items()
        for k in RECALL_AT
    }


def ranks_of(stages: dict[str, BothWays]) -> dict[str, np.ndarray]:
    """Rank of each query, from 0, both ways, by stage."""
    found = {}
    for stage, both in stages.items():
        found[f"{stage}image_to_text_ranks"] = both.images.ranks
        found[f"{stage}text_to_image_ranks"] = both.texts.ranks
    return found


def candidates_of(
    model: RetrievalModel, candidates: int | Literal["auto"] | None
) -> int | None:
    """How many targets of each query are ranked anew; None: all.

    Raises:
        ValueError: the model cannot rank in the way that is asked for.
    """
    if isinstance(candidates, str):
        candidates = _CANDIDATES if model.has_pair_scores else 0
    if candidates is not None and not model.has_features:
        raise ValueError(
            "this model has no features that could choose candidates: give "
            "--candidates null, which scores every pair of the gallery (--max_images "
            "makes it smaller), or fine-tune it (python -m trainer.finetune RUN --task "
            "retrieval)"
        )
    if candidates != 0 and not model.has_pair_scores:
        raise ValueError(
            "this model scores no pairs: give --candidates 0, which ranks by features "
            "alone, or fine-tune it with --matching true"
        )
    return candidates


def _training(context: Context) -> Task:
    return Retrieval(context, training=True)


def _evaluation(context: Context) -> Task:
    return Retrieval(context, training=False)


SPEC = Spec(
    name="retrieval",
    finetune=RetrievalTraining,
    evaluate=RetrievalEvaluation,
    zero_shot=True,
    accepts=("retrieval",),
    training=_training,
    evaluation=_evaluation,
    files=lambda task: task.files,
)
