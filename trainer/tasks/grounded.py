"""Texts about one or several images, to be told apart into classes.

Owns what VQA, NLVR2 and SNLI-VE share: their common keys, reading a batch, the head on
the model, and a pass over held-out examples. Does not own files, targets or scores
(each task).

The head is ViLT's (Kim et al. 2021): two linear layers with LayerNorm and GELU between
them, on the model's pooled features of each image with the text, side by side.

Shapes: N examples, V images of an example, W width of pooled features, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.manifest import file_sha256
from trainer.options import at_least
from trainer.tasks.base import Context
from trainer.tasks.bodies import Body, Pooling, body_of
from trainer.tasks.items import Items
from trainer.tasks.numbers import require_numbers
from trainer.tasks.pictures import Pictures, Unreadable, with_images
from trainer.tasks.results import Example
from trainer.tasks.texts import TextEncoder

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class ReadingKeys:
    """How examples are read, in fine-tuning and in evaluation."""

    unreadable: Unreadable = "refuse"
    """Images that are missing or damaged: refuse, or leave_out (and count) the examples
    that show them, for which every image is decoded once before the start."""
    decoders: int = 2
    """Threads that decode images."""
    held_out_batch: int = 64
    """Held-out examples that go through the model at once."""

    def __post_init__(self) -> None:
        at_least("", self, decoders=1, held_out_batch=1)


@dataclass(frozen=True, kw_only=True)
class LearningKeys(ReadingKeys):
    """What fine-tuning needs besides."""

    pooling: Pooling = "cls"
    """What stands for an image and its text: the state of [CLS], or the mean of all."""


@dataclass(frozen=True, kw_only=True)
class MeasuringKeys(ReadingKeys):
    """What an evaluation needs besides."""

    examples: int = 6
    """Examples shown in each part of the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, examples=0)


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """N texts and the images that each is about, V of them, as read from files."""

    texts: Sequence[np.ndarray]
    """[CLS] words [SEP], int64."""
    images: Sequence[Sequence[Path]]
    facts: Mapping[str, Any]
    """Where they come from, and how many were left out."""

    def __len__(self) -> int:
        return len(self.texts)


class Batch(NamedTuple):
    """Examples on the host."""

    views: list[Items]
    """V: of each image, with the text."""
    targets: np.ndarray
    """(N,) classes, or (N, C) what each class would score."""


class Classifier(nn.Module):
    """The head on a model's pooled features; gives logits (N, C), fp32.

    Args:
        views: V.
        classes: C.
    """

    def __init__(self, body: Body, *, views: int, classes: int) -> None:
        super().__init__()
        self.body = body
        width = body.width
        self.head = nn.Sequential(
            nn.Linear(views * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, classes),
        )

    def forward(self, views: Sequence[Items]) -> Tensor:
        """Logits of examples whose images are shown with their text."""
        pooled = self.body.pooled(Items.joined(views)).chunk(len(views))
        return self.head(torch.cat(pooled, 1)).float()


class Reader:
    """Examples of a task as the model takes them."""

    def __init__(self, context: Context) -> None:
        config, keys = context.pretraining, context.keys
        self._unreadable: Unreadable = keys.unreadable
        self._held_out_batch: int = keys.held_out_batch
        self._pictures = Pictures(
            image=config.image, key="unreadable", threads=keys.decoders
        )
        self._encoder = TextEncoder(
            context.tokenizer_file,
            context.special_ids,
            max_tokens=config.text.max_tokens,
        )

    def grounded(
        self,
        rows: Sequence[Row],
        *,
        text: Callable[[Row], str],
        images: Callable[[Row], Sequence[Path]],
        files: Sequence[str],
        counts: Mapping[str, int] | None = None,
    ) -> tuple[list[Row], Grounded]:
        """The rows of a task's files whose images can be read, and the same as the
        model takes them. Says on stderr how many those are.

        Args:
            text, images: of a row.
            files: that the rows were read from.
            counts: of lines that are no rows, by reason.

        Raises:
            ValueError: images are missing, and keys do not say to leave them out.
        """
        kept, left_out = with_images(rows, images, self._pictures, self._unreadable)
        ids, cut = self._encoder.encode([text(row) for row in kept])
        numbers = {**(counts or {}), **left_out, "used": len(kept), "cut_texts": cut}
        said = ", ".join(f"{name} {count:,}" for name, count in numbers.items())
        print(f"{files[0]}: {said}", file=sys.stderr)
        facts = {
            "files": {path: file_sha256(Path(path)) for path in files},
            "examples": numbers,
        }
        return kept, Grounded(
            texts=ids, images=[images(row) for row in kept], facts=facts
        )

    def views(self, examples: Grounded, numbers: np.ndarray) -> list[Items]:
        """Of each image, with the text, of some examples (n,).

        Raises:
            ValueError: an image that is missing or damaged, with its path.
        """
        texts = [examples.texts[number] for number in numbers.tolist()]
        shown = [examples.images[number] for number in numbers.tolist()]
        columns = list(zip(*shown, strict=True))
        # Together: an image that several examples show is decoded once.
        pixels = self._pictures.read([path for column in columns for path in column])
        return [Items.of(part, texts) for part in np.split(pixels, len(columns))]

    def logits(
        self, model: nn.Module, examples: Grounded, *, quiet: bool
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Numbers (n,) of examples and their logits (n, C) on the CPU, batch by batch.
        A vocabulary of thousands of answers is never held for all examples at once.

        Args:
            quiet: show no progress.
        """
        size = self._held_out_batch
        firsts = range(0, len(examples), size)
        for first in tqdm(firsts, unit="batch", disable=True if quiet else None):
            numbers = np.arange(first, min(first + size, len(examples)))
            yield numbers, model(self.views(examples, numbers)).cpu()

    def example(
        self, images: Sequence[Path], *, text: str, title: str, note: str
    ) -> Example:
        """For the page: images as the model sees them."""
        shown = [self._pictures.png(path) for path in images]
        return Example(images=shown, texts=[text], title=title, note=note)


class Ranked(NamedTuple):
    """What a model says of N examples."""

    first: np.ndarray
    """(N,) the class with the highest probability."""
    share: np.ndarray
    """(N,) that probability."""
    margin: np.ndarray
    """(N,) how far it is above the next one."""


def ranked(
    parts: Iterator[tuple[np.ndarray, Tensor]], count: int, *, exclusive: bool
) -> Ranked:
    """The most probable class of each of `count` examples.

    Args:
        exclusive: probabilities of the classes add up to 1.

    Raises:
        ValueError: a logit that is no number.
    """
    first = np.zeros(count, dtype=np.int64)
    share, margin = np.zeros(count), np.zeros(count)
    for numbers, logits in parts:
        require_numbers(logits.float().numpy())
        shares = logits.softmax(1) if exclusive else logits.sigmoid()
        values, classes = shares.topk(min(2, shares.shape[1]), dim=1)
        first[numbers] = classes[:, 0].numpy()
        share[numbers] = values[:, 0].numpy()
        margin[numbers] = (values[:, 0] - values[:, -1]).numpy()
    return Ranked(first, share, margin)


def classifier(model: nn.Module, context: Context, *, views: int, classes: int) -> Any:
    """The pretrained model with a head for `classes` on `views` images."""
    body = body_of(model, pooling=context.tuned.pooling)
    return Classifier(body, views=views, classes=classes)
