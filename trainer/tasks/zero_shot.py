"""Zero-shot classification: which class name fits an image best.

Owns the keys of the task, prompts of classes, and their scores. Does not own the models
(`trainer.tasks.retrievers`) or what is counted (`trainer.tasks.classes`).

A class is its name in one or several templates. By features (Radford et al. 2021,
section 3.1.4) a class is the mean of the features of its sentences, of length 1 again,
and its score the inner product with those of the image. By pairs it is the mean of the
log odds that a sentence and the image match.

Shapes: N images, K classes, R templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn
from tqdm import tqdm

from trainer.options import at_least
from trainer.probes import Pairs, drawn_places, read_pairs
from trainer.tasks.base import Context, EvaluatedOnly, Spec
from trainer.tasks.classes import Answers, answer_examples, result_of
from trainer.tasks.gallery import classed
from trainer.tasks.kept_states import KeptStates
from trainer.tasks.pair_scores import features_of, fingerprint, score_pairs
from trainer.tasks.prompts import numbered, read_names, sentences
from trainer.tasks.results import Result
from trainer.tasks.retrievers import RetrievalModel, retriever
from trainer.tasks.row_table import RowTable
from trainer.tasks.texts import TextEncoder


@dataclass(frozen=True, kw_only=True)
class ZeroShotEvaluation:
    """Keys of zero-shot classification."""

    column: str
    """json key with the class name of each sample; those where it is empty are left
    out, and counted."""
    classes: str | None = None
    """Text file with the names to choose among, one a line; null: all that occur in
    the split."""
    templates: tuple[str, ...] = ("{}",)
    """Sentences that a name is put into, such as '["a photo of a {}"]'; the quotes are
    needed."""
    by: Literal["auto", "features", "pairs"] = "auto"
    """features: inner products (MaskVLM's ITC, the first stage of a fine-tuned MLIM);
    pairs: a pass through the model for each image and sentence (ITM); auto: features,
    where the model has them."""
    split: str = "val"
    """Split to measure on."""
    max_images: int | None = None
    """Take at most this many images, drawn by the seed; null for all."""
    group: str | None = None
    """json key: images with the same value are resampled together in the bootstrap."""
    batch: int = 128
    """Images, or pairs, that go through the model at once."""
    examples: int = 6
    """Images in each part of the page."""

    def __post_init__(self) -> None:
        at_least("", self, max_images=2, batch=1, examples=0)
        sentences(["name"], self.templates)


class ZeroShot(EvaluatedOnly):
    """The task on its data."""

    def __init__(self, context: Context) -> None:
        self._context, self._keys = context, context.keys
        keys = self._keys
        self._dataset = context.dataset(keys.split)
        places = drawn_places(self._dataset, seed=context.seed, limit=keys.max_images)
        self._samples = classed(self._dataset, places, keys.column)
        values = set(self._samples.values)
        self._names = read_names(Path(keys.classes)) if keys.classes else sorted(values)
        if len(self._names) < 2:
            raise ValueError(
                f"--column {keys.column} has the one class {self._names[0]!r} in split "
                f"{keys.split}: nothing to tell apart"
            )
        if not values.intersection(self._names):
            raise ValueError(
                f"none of the classes in {keys.classes} is a value of --column "
                f"{keys.column}, which has {min(values)!r}, for example"
            )

    def model(self, model: nn.Module) -> nn.Module:
        """As `Task.model`."""
        found: nn.Module = retriever(model, self._context.tuned)
        return found

    def evaluate(self, model: nn.Module) -> Result:
        """As `Task.evaluate`."""
        assert isinstance(model, RetrievalModel)
        keys, context = self._keys, self._context
        by = way_of(model, keys.by)
        pairs = read_pairs(
            self._dataset,
            context.pretraining,
            self._samples.places,
            seed=context.seed,
            group=keys.group,
        )
        encoder = TextEncoder(
            context.tokenizer_file,
            self._dataset.tokenizer.special_ids,
            max_tokens=context.pretraining.text.max_tokens,
        )
        prompts, cut = encoder.encode(sentences(self._names, keys.templates))
        score = self._by_features if by == "features" else self._by_pairs
        answers = Answers(
            scores=score(model, pairs, prompts),
            labels=numbered(self._samples.values, self._names),
            names=self._names,
            groups=pairs.groups,
        )
        return result_of(
            answers,
            # Nothing was learned of classes: the largest one is known of the answers.
            majority=int(np.bincount(answers.labels[answers.labels >= 0]).argmax()),
            seed=context.seed,
            details={
                "split": keys.split,
                "data": self._dataset.name,
                "manifest_sha256": self._dataset.manifest_hash,
                "column": keys.column,
                "without_class": self._samples.without_class,
                "by": by,
                "templates": list(keys.templates),
                "prompts_cut": cut,
            },
            examples=answer_examples(answers, pairs.pixels, count=keys.examples),
        )

    def _by_features(
        self, model: RetrievalModel, pairs: Pairs, prompts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Inner products (N, K)."""
        total, batch = len(pairs) + len(prompts), self._keys.batch
        with tqdm(total=total, desc="features", disable=None) as bar:
            text = features_of(
                len(prompts),
                lambda rows: model.text_features(
                    model.text_states([prompts[row] for row in rows])
                ),
                batch=batch,
                progress=bar,
            )
            image = features_of(
                len(pairs),
                lambda rows: model.image_features(
                    model.image_states(pairs.pixels[rows])
                ),
                batch=batch,
                progress=bar,
            )
        mean = text.reshape(len(self._names), -1, text.shape[1]).mean(1)
        mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        scores: np.ndarray = image @ mean.T
        return scores

    def _by_pairs(
        self, model: RetrievalModel, pairs: Pairs, prompts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Mean log odds (N, K)."""
        shape, batch = (len(pairs), len(prompts)), self._keys.batch
        wanted = np.indices(shape).reshape(2, -1).T
        digest = fingerprint(
            model,
            self._dataset.manifest_hash,
            pairs.uids,
            *(prompt.tobytes() for prompt in prompts),
        )
        table = RowTable(
            self._context.folder / "zero_shot" / "pair_scores",
            fingerprint=digest,
            total=len(wanted),
        )
        states = KeptStates(
            model,
            pairs.pixels,
            np.arange(len(pairs)),
            prompts,
            batch=batch,
            keep_images=False,
            keep_texts=True,
        )
        with tqdm(total=len(wanted), desc="pairs", unit="pair", disable=None) as bar:
            scores = score_pairs(
                model,
                states,
                wanted,
                table=table,
                batch=batch,
                progress=bar,
            )
        found: np.ndarray = scores.reshape(shape[0], len(self._names), -1).mean(2)
        return found


def way_of(model: RetrievalModel, by: str) -> str:
    """By what classes are scored.

    Raises:
        ValueError: the model has no such scores.
    """
    if by == "auto":
        return "features" if model.has_features else "pairs"
    if by == "features" and not model.has_features:
        raise ValueError(
            "this model has no features of images and texts: give --by pairs, or "
            "fine-tune it on retrieval"
        )
    if by == "pairs" and not model.has_pair_scores:
        raise ValueError("this model scores no pairs: give --by features")
    return by


SPEC = Spec(
    name="zero_shot",
    finetune=None,
    evaluate=ZeroShotEvaluation,
    zero_shot=True,
    accepts=("retrieval",),
    training=None,
    evaluation=ZeroShot,
)
