"""The task `snli_ve`: does an image entail a sentence, contradict it, or neither?

Owns its keys and what an evaluation says. Does not own the published files
(`trainer.tasks.snli_ve_files`) or fine-tuning (`trainer.tasks.labelled`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from trainer.tasks.base import Context, Spec
from trainer.tasks.bootstrap import mean_interval
from trainer.tasks.grounded import LearningKeys, MeasuringKeys, Reader
from trainer.tasks.labelled import Labelled, LabelledTask, most_frequent
from trainer.tasks.results import Metric, Result
from trainer.tasks.snli_ve_files import CLASSES, read_hypotheses


@dataclass(frozen=True, kw_only=True)
class SnliVeLearning(LearningKeys):
    """Keys of fine-tuning."""

    hypotheses: str
    """snli_ve_train.jsonl. Lines without a label (-) are left out and counted."""
    dev_hypotheses: str | None = None
    """snli_ve_dev.jsonl: the best checkpoint by its accuracy is kept."""
    images: str
    """Folder with Flickr30k's images, {id}.jpg."""


@dataclass(frozen=True, kw_only=True)
class SnliVeMeasuring(MeasuringKeys):
    """Keys of an evaluation."""

    hypotheses: str
    """snli_ve_dev.jsonl or snli_ve_test.jsonl."""
    images: str
    """Folder with Flickr30k's images, {id}.jpg."""


class SnliVe(LabelledTask):
    """Fine-tuning and evaluation."""

    def evaluate(self, model: nn.Module) -> Result:
        """Accuracy, overall and on the examples of each class; chance is always saying
        the most frequent one. Intervals are over images.
        """
        found, labels = self.ranked(model), self.held_out.labels
        assert labels is not None
        constant = most_frequent(labels)
        wanted = {"accuracy": np.ones(len(labels), bool)}
        for number, name in enumerate(CLASSES):
            wanted[f"accuracy {name}"] = labels == number
        metrics = {}
        for name, which in wanted.items():
            if which.any():
                right = (found.first == labels)[which].astype(float)
                groups = self.held_out.groups[which]
                metrics[name] = Metric(
                    value=float(right.mean()),
                    ci95=mean_interval(right, groups, seed=self.context.seed),
                    chance=float((labels[which] == constant).mean()),
                    n=len(right),
                )
        details = {**self.held_out.examples.facts, "always": CLASSES[constant]}
        return Result(
            metrics=metrics,
            details=details,
            examples=self.shown(found),
            kept=self.kept(found),
        )


def training(context: Context) -> SnliVe:
    """The task of fine-tuning."""
    keys, reader = context.keys, Reader(context)
    dev = keys.dev_hypotheses
    return SnliVe(
        context,
        reader,
        train=_read(reader, keys.hypotheses, keys.images),
        held_out=None if dev is None else _read(reader, dev, keys.images),
        views=1,
        classes=CLASSES,
    )


def evaluation(context: Context) -> SnliVe:
    """The task of an evaluation."""
    keys, reader = context.keys, Reader(context)
    held_out = _read(reader, keys.hypotheses, keys.images)
    return SnliVe(
        context, reader, train=None, held_out=held_out, views=1, classes=CLASSES
    )


def _read(reader: Reader, path: str, images: str) -> Labelled:
    found, undecided = read_hypotheses(path, images)
    kept, examples = reader.grounded(
        found,
        text=lambda one: one.text,
        images=lambda one: (one.image,),
        files=[path],
        counts={"undecided": undecided},
    )
    return Labelled(
        examples=examples,
        said=[one.text for one in kept],
        labels=np.array([one.label for one in kept]),
        groups=np.array([one.image.name for one in kept]),
    )


SPEC = Spec(
    name="snli_ve",
    finetune=SnliVeLearning,
    evaluate=SnliVeMeasuring,
    zero_shot=False,
    accepts=("snli_ve",),
    training=training,
    evaluation=evaluation,
    files=lambda task: task.files,
)
