"""Linear probe: what a linear classifier reads in the features of a frozen model.

Owns the keys of the task, its features and labels. Does not own the fit
(`trainer.tasks.logistic`), the features' model (`trainer.tasks.bodies`) or what is
counted (`trainer.tasks.classes`).

Features are computed once and stay on disk, so that the same command again only fits.
The penalty is chosen on a part of the training split, never on the split that is
measured; the classifier is then fitted to the whole of it.

Shapes: N samples, D width of features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from trainer.dataset import Dataset
from trainer.options import at_least
from trainer.philox import Use, permutation
from trainer.probes import drawn_places, read_pairs
from trainer.tasks.base import Context, EvaluatedOnly, Spec
from trainer.tasks.bodies import Body, Pooling, body_of
from trainer.tasks.classes import Answers, answer_examples, result_of
from trainer.tasks.gallery import classed, column_of
from trainer.tasks.items import Items
from trainer.tasks.logistic import choose_l2, fit
from trainer.tasks.pair_scores import fingerprint
from trainer.tasks.prompts import numbered
from trainer.tasks.results import Result
from trainer.tasks.retrievers import RetrievalModel, retriever
from trainer.tasks.row_table import RowTable

# Samples that are read, and written, at once.
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class LinearProbeEvaluation:
    """Keys of linear probes."""

    column: str
    """json key with the class of each sample; those where it is empty are left out, and
    counted."""
    show: Literal["image", "text", "both"] = "image"
    """What the model sees of a sample."""
    pooling: Pooling = "cls"
    """Features: the state of [CLS], or the mean over all tokens."""
    train_split: str = "train"
    """Split to fit on."""
    split: str = "val"
    """Split to measure on."""
    max_train: int | None = None
    """Fit on at most this many samples, drawn by the seed; null for all."""
    max_images: int | None = None
    """Measure on at most this many, drawn by the seed; null for all."""
    group: str | None = None
    """json key: samples with the same value are resampled together in the bootstrap,
    and held out together when the penalty is chosen."""
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """L2 penalties to choose from."""
    held_out: float = 0.2
    """Share of the training samples, or groups, that the penalty is chosen on."""
    batch: int = 64
    """Samples that go through the model at once."""
    examples: int = 6
    """Images in each part of the page."""

    def __post_init__(self) -> None:
        at_least("", self, max_train=4, max_images=2, batch=1, examples=0)
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out {self.held_out}: a share between 0 and 1, both excluded"
            )
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"penalties {list(self.penalties)}: give positive numbers")
        if self.train_split == self.split:
            raise ValueError(
                f"--train_split and --split are both {self.split!r}: a probe that is "
                "measured on what it was fitted to says nothing; give two splits"
            )


class LinearProbe(EvaluatedOnly):
    """The task on its data."""

    def __init__(self, context: Context) -> None:
        self._context, self._keys = context, context.keys
        keys = self._keys
        self._train = _Part(context, keys.train_split, keys, limit=keys.max_train)
        self._test = _Part(context, keys.split, keys, limit=keys.max_images)
        self._names = sorted(set(self._train.values))
        if len(self._names) < 2:
            raise ValueError(
                f"--column {keys.column} has the one class {self._names[0]!r} in split "
                f"{keys.train_split}: nothing to tell apart"
            )

    def model(self, model: nn.Module) -> nn.Module:
        """As `Task.model`."""
        if self._context.tuned is None:
            return model
        found: nn.Module = retriever(model, self._context.tuned)
        return found

    def evaluate(self, model: nn.Module) -> Result:
        """As `Task.evaluate`."""
        keys, train, test = self._keys, self._train, self._test
        if isinstance(model, RetrievalModel):
            model = model.pretrained
        body = body_of(model, pooling=keys.pooling)
        labels = numbered(train.values, self._names)
        features = train.features(body)
        held_out = _held_out(train.groups, share=keys.held_out, seed=self._context.seed)
        # Fitting takes gradients, which an evaluation has switched off.
        with torch.inference_mode(False), torch.enable_grad():
            l2, tried = choose_l2(
                features,
                labels,
                held_out,
                classes=len(self._names),
                penalties=keys.penalties,
            )
            found = fit(features, labels, classes=len(self._names), l2=l2)
            scores = found.logits(test.features(body))
        answers = Answers(
            scores=scores,
            labels=numbered(test.values, self._names),
            names=self._names,
            groups=test.groups,
        )
        pixels = read_pairs(
            test.dataset,
            self._context.pretraining,
            test.places,
            seed=self._context.seed,
        ).pixels
        return result_of(
            answers,
            majority=int(np.bincount(labels).argmax()),
            seed=self._context.seed,
            details={
                "split": keys.split,
                "train_split": keys.train_split,
                "data": test.dataset.name,
                "manifest_sha256": test.dataset.manifest_hash,
                "column": keys.column,
                "without_class": test.without_class,
                "train_without_class": train.without_class,
                "show": keys.show,
                "pooling": keys.pooling,
                "train_samples": len(labels),
                "l2": l2,
                "held_out_cross_entropy": {f"{k:g}": v for k, v in tried.items()},
            },
            examples=answer_examples(answers, pixels, count=keys.examples),
        )


class _Part:
    """Samples of a split, their classes and features."""

    def __init__(
        self, context: Context, split: str, keys: Any, *, limit: int | None
    ) -> None:
        self._context, self._keys, self._split = context, keys, split
        self.dataset: Dataset = context.dataset(split)
        places = drawn_places(self.dataset, seed=context.seed, limit=limit)
        found = classed(self.dataset, places, keys.column)
        self.places, self.values = found.places, found.values
        self.without_class = found.without_class
        self.groups = np.arange(len(self.places))
        if keys.group:
            named = column_of(self.dataset, self.places, keys.group, flag="--group")
            _, self.groups = np.unique(named, return_inverse=True)

    def features(self, body: Body) -> np.ndarray:
        """(N, D), from where an earlier call left them."""
        context, keys = self._context, self._keys
        digest = fingerprint(
            body,
            self.dataset.manifest_hash,
            self.places,
            f"{keys.show} {keys.pooling} {context.seed}",
        )
        table = RowTable(
            context.folder / "linear_probe" / f"features-{self._split}",
            fingerprint=digest,
            total=len(self.places),
            width=body.width,
        )
        with tqdm(
            total=table.total, initial=table.done, desc=self._split, disable=None
        ) as bar:
            while table.done < table.total:
                places = self.places[table.done : table.done + _BLOCK]
                table.append(self._of(body, places))
                bar.update(len(places))
        return table.rows()

    def _of(self, body: Body, places: np.ndarray) -> np.ndarray:
        pairs = read_pairs(
            self.dataset, self._context.pretraining, places, seed=self._context.seed
        )
        items = Items.of(pairs.pixels, pairs.texts, show=self._keys.show)
        found = []
        with torch.inference_mode():
            for first in range(0, len(items), self._keys.batch):
                rows = np.arange(first, min(first + self._keys.batch, len(items)))
                found.append(body.pooled(items.rows(rows)).float().cpu().numpy())
        return np.concatenate(found)


def _held_out(groups: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """(N,) bool: a share of the groups, drawn; at least one, and not all.

    Raises:
        ValueError: a single group.
    """
    different, group = np.unique(groups, return_inverse=True)
    if len(different) < 2:
        raise ValueError(
            "--group puts all training samples into one group: none is left to choose "
            "the penalty on"
        )
    order = permutation(len(different), seed=seed, use=Use.EVALUATION, epoch=2, place=0)
    count = min(max(round(share * len(different)), 1), len(different) - 1)
    held: np.ndarray = np.isin(group, order[:count])
    return held


SPEC = Spec(
    name="linear_probe",
    finetune=None,
    evaluate=LinearProbeEvaluation,
    zero_shot=True,
    accepts=("retrieval",),
    training=None,
    evaluation=LinearProbe,
)
