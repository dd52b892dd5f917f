"""The task `nlvr2`: is a sentence true of two images?

Owns its keys and what an evaluation says. Does not own the published files
(`trainer.tasks.nlvr2_files`) or fine-tuning (`trainer.tasks.labelled`).

The sentence goes through the model with each image; the head sees both, left first
("pair" of Chen et al. 2020, UNITER).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from trainer.tasks.base import Context, Spec
from trainer.tasks.bootstrap import mean_interval
from trainer.tasks.grounded import LearningKeys, MeasuringKeys, Reader
from trainer.tasks.labelled import Labelled, LabelledTask, most_frequent
from trainer.tasks.nlvr2_files import Sentence, consistency, read_sentences
from trainer.tasks.results import Metric, Predictions, Result

CLASSES = ("False", "True")


@dataclass(frozen=True, kw_only=True)
class Nlvr2Learning(LearningKeys):
    """Keys of fine-tuning."""

    sentences: str
    """train.json: JSON lines."""
    images: str
    """Folder with its images, *-img0.png and *-img1.png; folders train/ and NN/ in it
    are looked into too."""
    dev_sentences: str | None = None
    """dev.json: the best checkpoint by its accuracy is kept."""
    dev_images: str | None = None
    """Folder with the images of dev; null: that of the others."""


@dataclass(frozen=True, kw_only=True)
class Nlvr2Measuring(MeasuringKeys):
    """Keys of an evaluation."""

    sentences: str
    """dev.json or test1.json: JSON lines. Without labels predictions are written, and
    nothing is measured."""
    images: str
    """Folder with its images, *-img0.png and *-img1.png."""


class Nlvr2(LabelledTask):
    """Fine-tuning and evaluation.

    Args:
        sentences: to measure, as `held_out`.
        parts: as `LabelledTask` has them.
    """

    sentences: Sequence[Sentence] = ()

    def evaluate(self, model: nn.Module) -> Result:
        """Accuracy and consistency (the share of sentences that are judged rightly with
        all of their pairs of images); chance is always saying what is true more often.
        Intervals are over the sets of eight images that sentences were written about.
        Predictions are written for the official script.
        """
        found, labels = self.ranked(model), self.held_out.labels
        written = self._written(found.first)
        details = dict(self.held_out.examples.facts)
        if labels is None:
            n = len(self.sentences)
            metrics = {"predictions": Metric(n, n=n)}
            return Result(metrics=metrics, details=details, predictions=written)
        constant = most_frequent(labels)
        right, always = found.first == labels, labels == constant
        metrics = {
            "accuracy": self._metric(right, always, self.held_out.groups),
            "consistency": self._consistency(right, always),
        }
        details["always"] = CLASSES[constant]
        return Result(
            metrics=metrics,
            details=details,
            examples=self.shown(found),
            kept=self.kept(found),
            predictions=written,
        )

    def _consistency(self, right: np.ndarray, always: np.ndarray) -> Metric:
        whole = consistency(self.sentences, right)
        constant = consistency(self.sentences, always)
        sets = {one.written: one.group for one in self.sentences}
        return self._metric(
            np.array(list(whole.values())),
            np.array(list(constant.values())),
            np.array([sets[written] for written in whole]),
        )

    def _metric(
        self, right: np.ndarray, always: np.ndarray, groups: np.ndarray
    ) -> Metric:
        return Metric(
            value=float(right.mean()),
            ci95=mean_interval(right, groups, seed=self.context.seed),
            chance=float(always.mean()),
            n=len(right),
        )

    def _written(self, said: np.ndarray) -> Predictions:
        """As the official metrics.py reads them."""
        lines = [
            f"{sentence.identifier},{CLASSES[int(one)]}\n"
            for sentence, one in zip(self.sentences, said, strict=True)
        ]
        return Predictions("csv", "".join(lines))


def training(context: Context) -> Nlvr2:
    """The task of fine-tuning."""
    keys, reader = context.keys, Reader(context)
    train, held_out = _read(reader, keys.sentences, keys.images), None
    if keys.dev_sentences is not None:
        images = keys.dev_images or keys.images
        held_out = _read(reader, keys.dev_sentences, images)
    for part, path in ((train, keys.sentences), (held_out, keys.dev_sentences)):
        if part is not None and part[1].labels is None:
            raise ValueError(
                f"{path} has no labels to learn from or to compare with: give "
                "train.json and dev.json as they are published"
            )
    return Nlvr2(
        context,
        reader,
        train=train[1],
        held_out=None if held_out is None else held_out[1],
        views=2,
        classes=CLASSES,
    )


def evaluation(context: Context) -> Nlvr2:
    """The task of an evaluation."""
    keys, reader = context.keys, Reader(context)
    sentences, held_out = _read(reader, keys.sentences, keys.images)
    task = Nlvr2(
        context, reader, train=None, held_out=held_out, views=2, classes=CLASSES
    )
    task.sentences = sentences
    return task


def _read(reader: Reader, path: str, images: str) -> tuple[list[Sentence], Labelled]:
    found = read_sentences(path, images)
    unlabelled = [one.identifier for one in found if one.label is None]
    if unlabelled and len(unlabelled) != len(found):
        raise ValueError(
            f"{path}: {len(unlabelled):,} of {len(found):,} lines have no label, such "
            f"as {unlabelled[0]}; give a file in which all have one, or none"
        )
    kept, examples = reader.grounded(
        found,
        text=lambda one: one.text,
        images=lambda one: one.images,
        files=[path],
    )
    return kept, Labelled(
        examples=examples,
        said=[one.text for one in kept],
        labels=None
        if unlabelled
        else np.array([int(one.label is True) for one in kept]),
        groups=np.array([one.group for one in kept]),
    )


SPEC = Spec(
    name="nlvr2",
    finetune=Nlvr2Learning,
    evaluate=Nlvr2Measuring,
    zero_shot=False,
    accepts=("nlvr2",),
    training=training,
    evaluation=evaluation,
    files=lambda task: task.files,
)
