"""The task `vqa`: answers to questions about images, from a vocabulary (VQA v2).

Owns its keys, targets, loss, scores and the file of predictions. Does not own the
published files (`trainer.tasks.vqa_files`), what an answer is worth
(`trainer.tasks.vqa_answers`) or the head (`trainer.tasks.grounded`).

As in Anderson et al. 2018 ("Bottom-up and top-down attention"): answers that are the
most frequent one of at least nine training questions are classes, the target of each is
what it would score, and the loss is a binary cross-entropy over all of them.

Shapes: N questions, B of a batch, C answers of the vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.options import at_least
from trainer.tasks.base import Context, Spec
from trainer.tasks.bootstrap import mean_interval
from trainer.tasks.grounded import (
    Batch,
    Grounded,
    LearningKeys,
    MeasuringKeys,
    Ranked,
    Reader,
    classifier,
    ranked,
)
from trainer.tasks.results import Example, Metric, Predictions, Result, extremes
from trainer.tasks.vqa_answers import accuracy, soft_targets, vocabulary
from trainer.tasks.vqa_files import Answered, Question, read_questions

ANSWERS, EXAMPLES = "answers.json", "examples.json"


@dataclass(frozen=True, kw_only=True)
class VqaLearning(LearningKeys):
    """Keys of fine-tuning."""

    questions: str
    """v2_OpenEnded_mscoco_train2014_questions.json."""
    annotations: str
    """v2_mscoco_train2014_annotations.json."""
    images: str
    """Folder with COCO_{split}_{id}.jpg, or with a folder of that split; or a template
    of paths, such as coco/{split}/COCO_{split}_{id:012d}.jpg."""
    dev_questions: str | None = None
    """Questions of val: the best checkpoint by its accuracy on them is kept."""
    dev_annotations: str | None = None
    """Their annotations."""
    dev_images: str | None = None
    """Where their images lie; null: where the others do."""
    min_questions: int = 9
    """An answer is in the vocabulary if it is the most frequent one of so many training
    questions; others are never given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, min_questions=1)
        if (self.dev_questions is None) != (self.dev_annotations is None):
            raise ValueError("dev_questions and dev_annotations belong together")


@dataclass(frozen=True, kw_only=True)
class VqaMeasuring(MeasuringKeys):
    """Keys of an evaluation."""

    questions: str
    """v2_OpenEnded_mscoco_{split}_questions.json."""
    annotations: str | None = None
    """v2_mscoco_{split}_annotations.json; null for a split whose answers are kept back:
    predictions are written, and nothing is measured."""
    images: str
    """Folder with COCO_{split}_{id}.jpg, or with a folder of that split; or a template
    of paths."""


class Vqa:
    """Fine-tuning and evaluation.

    Args:
        answers: the vocabulary, its most frequent answer first.
        train: questions to learn; None in an evaluation.
        held_out: questions of dev in fine-tuning, to measure in an evaluation.
    """

    def __init__(
        self,
        context: Context,
        reader: Reader,
        *,
        answers: Sequence[str],
        train: tuple[Sequence[Question], Grounded] | None,
        held_out: tuple[Sequence[Question], Grounded] | None,
    ) -> None:
        self._context, self._reader, self._answers = context, reader, answers
        self._train, self._held_out = train, held_out
        self.n_train = 0 if train is None else len(train[0])
        self.dev_metric = None if held_out is None else "accuracy"
        numbers = {answer: number for number, answer in enumerate(answers)}
        self._targets = [
            soft_targets(_said(question), numbers)
            for question in (train[0] if train else ())
        ]

    @property
    def files(self) -> Mapping[str, str]:
        """What fine-tuning keeps beside its checkpoints: the vocabulary, which
        examples it saw, and of how many no answer is in the vocabulary.
        """
        seen = {"train": self._train, "dev": self._held_out}
        facts: dict[str, Any] = {n: dict(p[1].facts) for n, p in seen.items() if p}
        unknown = sum(not target for target in self._targets)
        facts["train"]["without_known_answer"] = unknown
        return {
            ANSWERS: json.dumps(self._answers, indent=0) + "\n",
            EXAMPLES: json.dumps(facts, indent=1) + "\n",
        }

    def model(self, model: nn.Module) -> nn.Module:
        """As `trainer.tasks.base.Task.model`."""
        return classifier(model, self._context, views=1, classes=len(self._answers))

    def batch(self, numbers: np.ndarray, *, epoch: int) -> Batch:
        """Questions (B,) with what each answer (B, C) would score, the same in every
        epoch.
        """
        assert self._train is not None
        targets = np.zeros((len(numbers), len(self._answers)), dtype=np.float32)
        for row, number in enumerate(numbers.tolist()):
            for answer, score in self._targets[number].items():
                targets[row, answer] = score
        return Batch(self._reader.views(self._train[1], numbers), targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Binary cross-entropy, summed over the answers."""
        logits = model(batch.views)
        targets = torch.from_numpy(batch.targets).to(logits.device)
        whole = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return whole / len(targets)

    def dev(self, model: nn.Module) -> dict[str, float]:
        """The official accuracy."""
        if self._held_out is None:
            return {}
        said = self._predictions(self._ranked(model, quiet=True))
        return {"accuracy": float(_scores(self._held_out[0], said).mean())}

    def evaluate(self, model: nn.Module) -> Result:
        """The official accuracy, overall and on each type of answer; chance is always
        giving the most frequent answer of training. Intervals are over images. The
        predictions are written in the form that the test server takes.
        """
        assert self._held_out is not None
        questions, examples = self._held_out
        found = self._ranked(model)
        said = self._predictions(found)
        written = _written(questions, said)
        details = {
            **examples.facts,
            "vocabulary": len(self._answers),
            "always": self._answers[0],
        }
        if questions[0].answered is None:
            metrics = {"predictions": Metric(len(questions), n=len(questions))}
            return Result(metrics=metrics, details=details, predictions=written)
        scores = _scores(questions, said)
        always = _scores(questions, [self._answers[0]] * len(questions))
        numbers = {answer: number for number, answer in enumerate(self._answers)}
        best = [
            max(soft_targets(_said(one), numbers).values(), default=0.0)
            for one in questions
        ]
        details["best_that_the_vocabulary_allows"] = float(np.mean(best))
        details["question_types"] = _by_question_type(questions, scores)
        return Result(
            metrics=self._metrics(questions, scores, always),
            details=details,
            examples=self._shown(questions, examples, found, scores),
            kept={"accuracy": scores, "groups": _images(questions)},
            predictions=written,
        )

    def _metrics(
        self, questions: Sequence[Question], scores: np.ndarray, always: np.ndarray
    ) -> dict[str, Metric]:
        images = _images(questions)
        types = np.array([_answered(question).answer_type for question in questions])
        wanted = {"accuracy": np.ones(len(questions), bool)}
        wanted |= {f"accuracy {name}": types == name for name in np.unique(types)}
        return {
            name: Metric(
                value=float(scores[which].mean()),
                ci95=mean_interval(
                    scores[which], images[which], seed=self._context.seed
                ),
                chance=float(always[which].mean()),
                n=int(which.sum()),
            )
            for name, which in wanted.items()
        }

    def _ranked(self, model: nn.Module, *, quiet: bool = False) -> Ranked:
        assert self._held_out is not None
        examples = self._held_out[1]
        logits = self._reader.logits(model, examples, quiet=quiet)
        return ranked(logits, len(examples), exclusive=False)

    def _predictions(self, found: Ranked) -> list[str]:
        return [self._answers[number] for number in found.first.tolist()]

    def _shown(
        self,
        questions: Sequence[Question],
        examples: Grounded,
        found: Ranked,
        scores: np.ndarray,
    ) -> dict[str, list[Example]]:
        """Examples for the page. Right is what at least half of the people said it
        is.
        """
        right = (scores >= 0.5).tolist()
        parts = extremes(found.margin.tolist(), right, self._context.keys.examples)
        return {
            title: [
                self._reader.example(
                    examples.images[number],
                    text=questions[number].text,
                    title=f"{found.share[number]:.2f}: "
                    f"{self._answers[int(found.first[number])]}",
                    note=f"accuracy {scores[number]:.2f}; people: "
                    f"{_counted(_said(questions[number]))}",
                )
                for number in numbers
            ]
            for title, numbers in parts.items()
        }


def _training(context: Context) -> Vqa:
    keys, reader = context.keys, Reader(context)
    train = _read(reader, keys.questions, keys.annotations, keys.images)
    held_out = None
    if keys.dev_questions is not None:
        images = keys.dev_images or keys.images
        held_out = _read(reader, keys.dev_questions, keys.dev_annotations, images)
    answers = vocabulary(
        (_answered(question).most_frequent for question in train[0]),
        at_least=keys.min_questions,
    )
    if len(answers) < 2:
        raise ValueError(
            f"{keys.annotations}: {len(answers)} answers are the most frequent one of "
            f"{keys.min_questions} questions or more, and two are needed: lower "
            "--min_questions, or give more questions"
        )
    return Vqa(context, reader, answers=answers, train=train, held_out=held_out)


def _evaluation(context: Context) -> Vqa:
    keys, reader = context.keys, Reader(context)
    answers = tuple(json.loads((context.folder / ANSWERS).read_text(encoding="utf-8")))
    held_out = _read(reader, keys.questions, keys.annotations, keys.images)
    return Vqa(context, reader, answers=answers, train=None, held_out=held_out)


def _read(
    reader: Reader, questions: str, annotations: str | None, images: str
) -> tuple[list[Question], Grounded]:
    return reader.grounded(
        read_questions(questions, annotations, images),
        text=lambda question: question.text,
        images=lambda question: (question.image,),
        files=[path for path in (questions, annotations) if path is not None],
    )


def _answered(question: Question) -> Answered:
    assert question.answered is not None
    return question.answered


def _said(question: Question) -> tuple[str, ...]:
    """What people said."""
    return _answered(question).answers


def _written(questions: Sequence[Question], said: Sequence[str]) -> Predictions:
    rows = [
        {"question_id": question.number, "answer": answer}
        for question, answer in zip(questions, said, strict=True)
    ]
    return Predictions("json", json.dumps(rows) + "\n")


def _images(questions: Sequence[Question]) -> np.ndarray:
    """(N,) equal where images are."""
    return np.array([str(question.image) for question in questions])


def _scores(questions: Sequence[Question], said: Sequence[str]) -> np.ndarray:
    """The official accuracy (N,) of an answer to each question."""
    pairs = zip(questions, said, strict=True)
    return np.array([accuracy(answer, _said(question)) for question, answer in pairs])


def _by_question_type(
    questions: Sequence[Question], scores: np.ndarray
) -> dict[str, dict[str, float]]:
    """Accuracy and number of the questions that begin in the same way."""
    types = np.array([_answered(question).question_type for question in questions])
    return {
        str(name): {
            "accuracy": float(scores[types == name].mean()),
            "n": int((types == name).sum()),
        }
        for name in np.unique(types)
    }


def _counted(answers: Sequence[str]) -> str:
    return ", ".join(
        f"{answer} ({count})" for answer, count in Counter(answers).most_common(4)
    )


SPEC = Spec(
    name="vqa",
    finetune=VqaLearning,
    evaluate=VqaMeasuring,
    zero_shot=False,
    accepts=("vqa",),
    training=_training,
    evaluation=_evaluation,
    files=lambda task: task.files,
)
