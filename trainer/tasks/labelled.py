"""Tasks whose examples have one class each: NLVR2 and SNLI-VE.

Owns their fine-tuning (a batch, the loss, the dev metric) and the examples that a page
shows. Does not own the head (`trainer.tasks.grounded`), files or what an evaluation
says (each task).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.tasks.base import Context
from trainer.tasks.grounded import Batch, Grounded, Ranked, Reader, classifier, ranked
from trainer.tasks.results import Example, Result, extremes

EXAMPLES = "examples.json"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """N examples of classes that have names."""

    examples: Grounded
    said: Sequence[str]
    """The text of each, for people."""
    labels: np.ndarray | None
    """(N,) int64; None where they are kept back."""
    groups: np.ndarray
    """(N,) what the bootstrap resamples together."""

    def __len__(self) -> int:
        return len(self.examples)


class LabelledTask:
    """Fine-tuning and evaluation on labelled examples.

    Args:
        train: examples to learn; None in an evaluation.
        held_out: examples of dev in fine-tuning, to measure in an evaluation.
        views: images of an example.
        classes: their names.
    """

    def __init__(
        self,
        context: Context,
        reader: Reader,
        *,
        train: Labelled | None,
        held_out: Labelled | None,
        views: int,
        classes: Sequence[str],
    ) -> None:
        self.context, self.reader, self.classes = context, reader, classes
        self._train, self._held_out, self._views = train, held_out, views
        for part in (train, held_out):
            self._require_classes(part)
        self.n_train = 0 if train is None else len(train)
        self.dev_metric = None if held_out is None else "accuracy"

    def _require_classes(self, part: Labelled | None) -> None:
        if part is None or part.labels is None or len(np.unique(part.labels)) > 1:
            return
        files = ", ".join(part.examples.facts["files"])
        raise ValueError(
            f"{files}: all {len(part):,} examples are "
            f"{self.classes[int(part.labels[0])]!r}, so that there is nothing to tell "
            f"apart; give a file with several of {', '.join(self.classes)}"
        )

    @property
    def files(self) -> Mapping[str, str]:
        """What fine-tuning keeps beside its checkpoints: which examples it saw."""
        seen = {"train": self._train, "dev": self._held_out}
        facts = {name: part.examples.facts for name, part in seen.items() if part}
        return {EXAMPLES: json.dumps(facts, indent=1) + "\n"}

    def model(self, model: nn.Module) -> nn.Module:
        """As `trainer.tasks.base.Task.model`."""
        return classifier(
            model, self.context, views=self._views, classes=len(self.classes)
        )

    def batch(self, numbers: np.ndarray, *, epoch: int) -> Batch:
        """Examples (B,), the same in every epoch."""
        assert self._train is not None
        assert self._train.labels is not None
        views = self.reader.views(self._train.examples, numbers)
        return Batch(views, self._train.labels[numbers])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        logits = model(batch.views)
        labels = torch.from_numpy(batch.targets).to(logits.device)
        return F.cross_entropy(logits, labels)

    def dev(self, model: nn.Module) -> dict[str, float]:
        """Accuracy."""
        if self._held_out is None or self._held_out.labels is None:
            return {}
        found = self.ranked(model, quiet=True)
        right = found.first == self._held_out.labels
        return {"accuracy": float(right.mean())}

    def evaluate(self, model: nn.Module) -> Result:
        """Each task's own."""
        raise NotImplementedError

    @property
    def held_out(self) -> Labelled:
        """Examples to measure."""
        assert self._held_out is not None
        return self._held_out

    def ranked(self, model: nn.Module, *, quiet: bool = False) -> Ranked:
        """What a model says of the held-out examples."""
        examples = self.held_out.examples
        logits = self.reader.logits(model, examples, quiet=quiet)
        return ranked(logits, len(examples), exclusive=True)

    def kept(self, found: Ranked) -> dict[str, np.ndarray]:
        """What was found of each example, to compare two models by."""
        labels = self.held_out.labels
        assert labels is not None
        groups = self.held_out.groups
        return {"said": found.first, "labels": labels, "groups": groups}

    def shown(self, found: Ranked) -> dict[str, list[Example]]:
        """Examples for the page, by title; none without labels."""
        labels = self.held_out.labels
        if labels is None:
            return {}
        right = (found.first == labels).tolist()
        parts = extremes(found.margin.tolist(), right, self.context.keys.examples)
        return {
            title: [self._example(number, found, labels) for number in numbers]
            for title, numbers in parts.items()
        }

    def _example(self, number: int, found: Ranked, labels: np.ndarray) -> Example:
        said, true = (self.classes[int(one[number])] for one in (found.first, labels))
        return self.reader.example(
            self.held_out.examples.images[number],
            text=self.held_out.said[number],
            title=f"{found.share[number]:.2f}: {said}",
            note=f"true: {true}",
        )


def most_frequent(labels: np.ndarray) -> int:
    """The class that most labels (N,) are; of equally many the first."""
    return int(np.bincount(labels).argmax())
