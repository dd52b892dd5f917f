"""Matching of items (MLIM's CM): is this image and text the same product as that?

Owns keys, head, modality dropout and metrics. Does not own the pairs
(`trainer.tasks.pair_files`), what stands for an item (`trainer.tasks.bodies`) or the
loop (`trainer.tasks.training`).

Arici et al. 2021, section 5.2: in fine-tuning each item shows its text alone, its image
alone, or both (modality dropout), so that one model serves whatever there is of an
item. PR AUC is measured with each.

Shapes: B pairs, N pairs of a file, D width of a pooled item.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from trainer.options import at_least
from trainer.philox import Use, draw, edge
from trainer.tasks.average_precision import AveragePrecision
from trainer.tasks.base import DATA, Context, Spec
from trainer.tasks.bodies import Body, Pooling, body_of
from trainer.tasks.bootstrap import interval
from trainer.tasks.items import Items
from trainer.tasks.pair_files import Pairs, among, as_text, read_pairs
from trainer.tasks.results import Example, Metric, Result, extremes
from trainer.tasks.samples import Samples

MODES = ("text", "image", "both")
_LEARNED, _WHICH = "pairs.sha256", "pairs.learned"


@dataclass(frozen=True, kw_only=True)
class MatchingTraining:
    """Keys of matching in fine-tuning."""

    pairs: str
    """pairs.npy to learn from (pipeline.pairs makes it)."""
    dev_pairs: str | None = None
    """pairs.npy by whose PR AUC, with both modalities, the best checkpoint is kept."""
    text_only: float = 0.25
    """Modality dropout: share of items that show their text alone."""
    image_only: float = 0.25
    """Modality dropout: share of items that show their image alone; 0 for both shares
    is none."""
    pooling: Pooling = "cls"
    """What stands for an item: the state of [CLS], or the mean over its tokens."""

    def __post_init__(self) -> None:
        at_least("", self, text_only=0, image_only=0)
        if self.text_only + self.image_only > 1:
            raise ValueError(
                f"text_only {self.text_only} and image_only {self.image_only} are more "
                "than all items: lower one"
            )


@dataclass(frozen=True, kw_only=True)
class MatchingEvaluation:
    """Keys of matching in an evaluation."""

    pairs: str
    """pairs.npy to measure on."""
    modes: tuple[str, ...] = MODES
    """What items show: text, image, both."""
    batch: int = 64
    """Items that go through the model at once."""
    examples: int = 9
    """Pairs in each part of the page of examples."""

    def __post_init__(self) -> None:
        at_least("", self, batch=1, examples=0)
        wrong = [mode for mode in self.modes if mode not in MODES]
        if wrong or not self.modes:
            raise ValueError(f"modes {list(self.modes)}: take some of {list(MODES)}")


class MatchingModel(nn.Module):
    """A body and a head that does not care which item is left and which is right."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        width = body.width
        self.dense = nn.Linear(3 * width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, left: Items, right: Items) -> Tensor:
        """Log odds (B,) that two items match, fp32."""
        both = self.body.pooled(Items.joined([left, right]))
        u_bd, v_bd = both.chunk(2)
        return self.compare(u_bd, v_bd)

    def compare(self, u_bd: Tensor, v_bd: Tensor) -> Tensor:
        """The same of pooled items (B, D)."""
        u_bd, v_bd = u_bd.float(), v_bd.float()
        x = torch.cat([u_bd + v_bd, (u_bd - v_bd).abs(), u_bd * v_bd], dim=1)
        return self.score(F.gelu(self.dense(x))).squeeze(1)


class Batch(NamedTuple):
    """B pairs as they are shown."""

    left: Items
    right: Items
    labels: np.ndarray


class Matching:
    """The task on its pairs.

    Args:
        learned: in an evaluation, which of its pairs (N,) bool the model learned.
    """

    dev_metric: str | None = None

    def __init__(
        self,
        samples: Samples,
        tuning: MatchingTraining,
        *,
        pairs: Pairs,
        dev_pairs: Pairs | None,
        evaluation: MatchingEvaluation | None,
        learned: np.ndarray | None = None,
        seed: int,
    ) -> None:
        self._samples, self._tuning = samples, tuning
        self._pairs, self._dev, self._keys = pairs, dev_pairs, evaluation
        self._seed, self._learned = seed, learned
        self.n_train = 0 if evaluation else len(pairs)
        if dev_pairs is not None:
            self.dev_metric = "pr_auc_both"

    def model(self, model: nn.Module) -> MatchingModel:
        """As `Task.model`."""
        return MatchingModel(body_of(model, pooling=self._tuning.pooling))

    def batch(self, numbers: np.ndarray, *, epoch: int) -> Batch:
        """As `Task.batch`."""
        pairs = self._pairs
        image, text = shown(
            pairs.uids[numbers],
            text_only=self._tuning.text_only,
            image_only=self._tuning.image_only,
            seed=self._seed,
            epoch=epoch,
        )
        sides = [
            self._samples.items(
                pairs.rows[numbers, side],
                captions=pairs.captions[numbers, side],
                epoch=epoch,
                images=image[:, side],
            ).shown(image[:, side], text[:, side])
            for side in (0, 1)
        ]
        return Batch(left=sides[0], right=sides[1], labels=pairs.labels[numbers])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Task.loss`: mean binary cross-entropy."""
        logits_b = model(batch.left, batch.right)
        target = torch.from_numpy(batch.labels).to(logits_b)
        return F.binary_cross_entropy_with_logits(logits_b, target)

    def dev(self, model: nn.Module) -> dict[str, float]:
        """As `Task.dev`."""
        if self._dev is None:
            return {}
        scores = self.scores(model, self._dev, "both", batch=64, quiet=True)
        return {"pr_auc_both": AveragePrecision(scores, self._dev.labels)()}

    def evaluate(self, model: nn.Module) -> Result:
        """As `Task.evaluate`: PR AUC in each mode."""
        keys, pairs = self._keys, self._pairs
        assert keys is not None
        assert self._learned is not None
        seen = int(self._learned.sum())
        if seen:
            print(
                f"{seen:,} of {len(pairs):,} pairs of {pairs.name} are among the very "
                "pairs that the model learned: this says how well it remembers them, "
                "not how well it matches",
                file=sys.stderr,
            )
        scores = {
            mode: self.scores(model, pairs, mode, batch=keys.batch)
            for mode in keys.modes
        }
        last = scores[keys.modes[-1]]
        return Result(
            metrics={
                f"pr_auc_{mode}": _metric(scores[mode], pairs, self._seed)
                for mode in reversed(keys.modes)
            },
            details={
                "data": self._samples.name,
                "manifest_sha256": self._samples.manifest_hash,
                "pairs": pairs.name,
                "pairs_sha256": pairs.sha256,
                "trained_on_these_pairs": seen > 0,
                "n_pairs_trained_on": seen,
                "n_pairs": len(pairs),
                "n_groups": len(np.unique(pairs.groups)),
                "positive_share": float(pairs.labels.mean()),
                "modality_dropout": {
                    "text_only": self._tuning.text_only,
                    "image_only": self._tuning.image_only,
                },
            },
            examples=self._examples(last, keys.examples),
            kept={
                **{f"scores_{mode}": scores[mode] for mode in keys.modes},
                "labels": pairs.labels,
                "groups": pairs.groups,
            },
        )

    @property
    def files(self) -> dict[str, str]:
        """What the model learns from, kept beside it: other pairs, or others' images
        and texts under their numbers, are another run.
        """
        own = {
            DATA: f"{self._samples.manifest_hash}\n",
            _WHICH: f"{as_text(self._pairs)}\n",
        }
        return own | {
            name: f"{pairs.sha256}  {pairs.name}\n"
            for name, pairs in (
                (_LEARNED, self._pairs),
                ("dev_pairs.sha256", self._dev),
            )
            if pairs is not None
        }

    def scores(
        self,
        model: nn.Module,
        pairs: Pairs,
        mode: str,
        *,
        batch: int,
        quiet: bool = False,
    ) -> np.ndarray:
        """Log odds (N,) that pairs match; each item goes through the model once."""
        assert isinstance(model, MatchingModel)
        captions = np.stack(
            [
                self._samples.chosen(
                    pairs.rows[:, side], pairs.captions[:, side], epoch=0
                )
                for side in (0, 1)
            ],
            axis=1,
        )
        sides = np.stack([pairs.rows, captions], axis=2).reshape(-1, 2)
        items, item = np.unique(sides, axis=0, return_inverse=True)
        pooled = []
        starts = range(0, len(items), batch)
        for start in tqdm(
            starts, desc=f"{mode} items", disable=True if quiet else None
        ):
            part = items[start : start + batch]
            images = np.full(len(part), mode != "text")
            texts = np.full(len(part), mode != "image")
            read = self._samples.items(part[:, 0], captions=part[:, 1], images=images)
            pooled.append(model.body.pooled(read.shown(images, texts)))
        vectors, item = torch.cat(pooled), item.reshape(-1, 2)
        logits = []
        for start in range(0, len(pairs), 4096):
            both = torch.from_numpy(item[start : start + 4096]).to(vectors.device)
            logits.append(model.compare(vectors[both[:, 0]], vectors[both[:, 1]]))
        found: np.ndarray = torch.cat(logits).float().cpu().numpy()
        return found

    def _examples(self, scores: np.ndarray, count: int) -> dict[str, Sequence[Example]]:
        right = (scores > 0) == self._pairs.labels
        return {
            title: [self._example(row, float(scores[row])) for row in rows]
            for title, rows in extremes(scores.tolist(), right.tolist(), count).items()
        }

    def _example(self, row: int, score: float) -> Example:
        sides = self._pairs.rows[row]
        captions = self._samples.chosen(sides, self._pairs.captions[row], epoch=0)
        texts = []
        for side, caption in zip(sides, captions, strict=True):
            known = self._samples.json(int(side))
            texts.append(str(known["captions"][int(caption)]))
        chance = 1 / (1 + np.exp(-score))
        said = "match" if score > 0 else "no match"
        return Example(
            images=[self._samples.jpeg(int(side)) for side in sides],
            texts=texts,
            title=f"{said} ({chance:.3f})",
            note="They match." if self._pairs.labels[row] else "They do not match.",
        )


def shown(
    uids: np.ndarray, *, text_only: float, image_only: float, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Modality dropout: which of the sides (B, 2) of each pair show their image, and
    which their text; each side is drawn by itself, anew in each epoch.

    Args:
        uids: (B,) int64, of the pairs.
    """
    word = draw(
        seed=seed,
        use=Use.MODALITY_DROPOUT,
        epoch=epoch,
        uid=uids[:, None],
        index=np.arange(2),
    )[0]
    image = word >= edge(text_only)
    text = (word < edge(text_only)) | (word >= edge(text_only + image_only))
    return image, text


def _metric(scores: np.ndarray, pairs: Pairs, seed: int) -> Metric:
    measure = AveragePrecision(scores, pairs.labels)
    return Metric(
        value=measure(),
        ci95=interval(measure, pairs.groups, seed=seed),
        # Of scores that say nothing.
        chance=float(pairs.labels.mean()),
        n=len(pairs),
    )


def _training(context: Context) -> Matching:
    keys, samples = context.keys, _samples(context)
    pairs = read_pairs(keys.pairs, samples)
    dev = read_pairs(keys.dev_pairs, samples) if keys.dev_pairs else None
    both = 0 if dev is None else int(among(dev, as_text(pairs)).sum())
    if dev is not None and both:
        print(
            f"{both:,} of {len(dev):,} pairs of {dev.name} are in {pairs.name} too: "
            "the best checkpoint is chosen by how well it remembers them; make both "
            "files with one call of pipeline.pairs --dev",
            file=sys.stderr,
        )
    return Matching(
        samples,
        keys,
        pairs=pairs,
        dev_pairs=dev,
        evaluation=None,
        seed=context.seed,
    )


def _evaluation(context: Context) -> Matching:
    samples = _samples(context)
    pairs = read_pairs(context.keys.pairs, samples)
    return Matching(
        samples,
        context.tuned,
        pairs=pairs,
        dev_pairs=None,
        evaluation=context.keys,
        learned=_learned(context.folder, pairs),
        seed=context.seed,
    )


def _learned(folder: Path, pairs: Pairs) -> np.ndarray:
    if (folder / _WHICH).is_file():
        return among(pairs, (folder / _WHICH).read_text(encoding="utf-8"))
    # Before it was written down which pairs those are, only the file can tell.
    learned = (folder / _LEARNED).read_text(encoding="utf-8").split()[0]
    return np.full(len(pairs), learned == pairs.sha256)


def _samples(context: Context) -> Samples:
    return Samples(context.splits(), context.pretraining, seed=context.seed)


SPEC = Spec(
    name="matching",
    finetune=MatchingTraining,
    evaluate=MatchingEvaluation,
    zero_shot=False,
    accepts=("matching",),
    training=_training,
    evaluation=_evaluation,
    files=lambda task: task.files,
)
