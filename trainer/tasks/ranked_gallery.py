"""Ranking a gallery both ways by a model: cheap features, dear scores, or both.

Owns which pairs are scored and how scores become ranks and lists. Does not own counting
(`trainer.tasks.ranking`), the model (`trainer.tasks.pair_scores`) or what is reported
(`trainer.tasks.retrieval`).

A score is of an image and a text, so that of a pair serves both directions and is
computed once: for the union of the candidates that either direction asks for.

Shapes: N images, C captions, U different images, V different texts, M pairs, Q queries,
K candidates of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from trainer.tasks.gallery import Gallery
from trainer.tasks.kept_states import KeptStates
from trainer.tasks.pair_scores import kept_features, score_pairs
from trainer.tasks.ranking import (
    Candidates,
    candidates,
    image_ranks,
    reranked,
    text_ranks,
)
from trainer.tasks.retrievers import RetrievalModel
from trainer.tasks.row_table import RowTable

SHOWN = 10
"""Places of each list that are kept to be shown."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One direction."""

    ranks: np.ndarray
    """(Q,) from 0."""
    found: Candidates
    """(Q, K) the first targets, in their final order."""
    scores: np.ndarray
    """(Q, K) what they are ordered by."""

    @property
    def margins(self) -> np.ndarray:
        """(Q,) by how much the best right target is above the best wrong one; negative
        below it, -inf where none of the list is right, inf where all are.
        """
        right = np.where(self.found.right, self.scores, -np.inf).max(1)
        wrong = np.where(self.found.right, -np.inf, self.scores).max(1)
        return right - wrong


@dataclass(frozen=True, kw_only=True)
class BothWays:
    """Ranks of a gallery by one way of scoring."""

    images: Ranked
    """Q = N: each image asks for captions."""
    texts: Ranked
    """Q = C: each caption asks for its image."""


def rank_by_scores(scores_uv: np.ndarray, gallery: Gallery, *, listed: int) -> BothWays:
    """Ranks by scores (U, V) of all different images and texts.

    Args:
        listed: K, how many targets of each query are kept.
    """
    scores_nc = scores_uv[gallery.image_of[:, None], gallery.text_of]
    own = np.arange(len(gallery.uids))

    def ranked(scores: np.ndarray, ranks: np.ndarray, *owners: np.ndarray) -> Ranked:
        found = candidates(scores, *owners, k=listed)
        kept = np.take_along_axis(scores, found.target, 1)
        return Ranked(ranks=ranks, found=found, scores=kept)

    return BothWays(
        images=ranked(
            scores_nc, image_ranks(scores_nc, gallery.owner), own, gallery.owner
        ),
        texts=ranked(
            scores_nc.T, text_ranks(scores_nc, gallery.owner), gallery.owner, own
        ),
    )


def states_of(
    model: RetrievalModel, gallery: Gallery, *, batch: int, pairs: bool
) -> KeptStates:
    """Of all different images and texts, for both ways of scoring.

    Args:
        pairs: pairs will be scored, after features where the model has such.
    """
    return KeptStates(
        model,
        gallery.pixels,
        gallery.images,
        [gallery.texts[number] for number in gallery.different],
        batch=batch,
        keep_images=pairs and model.has_features,
        keep_texts=pairs,
    )


def feature_scores(
    model: RetrievalModel,
    states: KeptStates,
    gallery: Gallery,
    *,
    folder: Path,
    digest: str,
    batch: int,
    progress: tqdm[Any],
) -> np.ndarray:
    """Inner products (U, V) of the features of all different images and texts, each of
    which is computed once.

    Args:
        states: `states_of` the gallery.
        folder: where features are kept while they are computed.
        digest: of the model.
    """
    whole = _fingerprint(digest, gallery)

    def images(rows: np.ndarray) -> torch.Tensor:
        return model.image_features(states.of_images(rows))

    def texts(rows: np.ndarray) -> torch.Tensor:
        return model.text_features(states.of_texts(rows))

    def computed(
        name: str, count: int, one_batch: Callable[[np.ndarray], torch.Tensor]
    ) -> np.ndarray:
        table = RowTable(
            folder / name, fingerprint=whole, total=count, width=model.feature_width
        )
        return kept_features(one_batch, table=table, batch=batch, progress=progress)

    image = computed("image_features", states.images, images)
    text = computed("text_features", states.texts, texts)
    scores: np.ndarray = image @ text.T
    return scores


def rank_by_pairs(
    model: RetrievalModel,
    states: KeptStates,
    gallery: Gallery,
    first: BothWays | None,
    *,
    folder: Path,
    digest: str,
    batch: int,
    progress: tqdm[Any],
) -> BothWays:
    """Ranks by scores of pairs.

    Args:
        states: `states_of` the gallery.
        first: ranks whose lists are put into a new order; None: all pairs are scored.
        folder: where scores are kept while they are computed.
        digest: of the model.
    """
    shape = states.images, states.texts
    if first is None:
        pairs = np.indices(shape).reshape(2, -1).T
    else:
        pairs = _union(first, gallery)
    states.keep_no_more_images()
    table = RowTable(
        folder / "pair_scores",
        fingerprint=_fingerprint(digest, gallery, pairs),
        total=len(pairs),
    )
    progress.reset(total=len(pairs))
    scores = score_pairs(
        model,
        states,
        pairs,
        table=table,
        batch=batch,
        progress=progress,
    )
    if first is None:
        return rank_by_scores(scores.reshape(shape), gallery, listed=SHOWN)
    keys = pairs[:, 0] * shape[1] + pairs[:, 1]
    images = np.arange(len(gallery.uids))[:, None]
    texts = np.arange(len(gallery.texts))[:, None]
    of_images = _keys(images, first.images.found.target, gallery)
    of_texts = _keys(first.texts.found.target, texts, gallery)
    return BothWays(
        images=_reordered(first.images, scores[np.searchsorted(keys, of_images)]),
        texts=_reordered(first.texts, scores[np.searchsorted(keys, of_texts)]),
    )


def _reordered(first: Ranked, scores_qk: np.ndarray) -> Ranked:
    order = np.argsort(-scores_qk, axis=1, kind="stable")
    found = Candidates(
        target=np.take_along_axis(first.found.target, order, 1),
        right=np.take_along_axis(first.found.right, order, 1),
    )
    return Ranked(
        ranks=reranked(first.ranks, first.found, scores_qk),
        found=found,
        scores=np.take_along_axis(scores_qk, order, 1),
    )


def _union(first: BothWays, gallery: Gallery) -> np.ndarray:
    """Different pairs (M, 2) of (different image, different text), ordered."""
    images = np.arange(len(gallery.uids))[:, None]
    texts = np.arange(len(gallery.texts))[:, None]
    wanted = (
        _keys(images, first.images.found.target, gallery),
        _keys(first.texts.found.target, texts, gallery),
    )
    keys = np.unique(np.concatenate([keys.ravel() for keys in wanted]))
    return np.stack(np.divmod(keys, len(gallery.different)), axis=1)


def _keys(images: np.ndarray, texts: np.ndarray, gallery: Gallery) -> np.ndarray:
    """A number of each pair of (image, text), equal where both are the same."""
    width = len(gallery.different)
    keys: np.ndarray = gallery.image_of[images] * width + gallery.text_of[texts]
    return keys


def _fingerprint(digest: str, gallery: Gallery, *pairs: np.ndarray) -> str:
    whole = sha256(digest.encode())
    for part in (gallery.uids, np.array(gallery.pixels.shape), *pairs):
        whole.update(np.ascontiguousarray(part).tobytes())
    for number in gallery.different:
        whole.update(gallery.texts[number].tobytes())
    return whole.hexdigest()
