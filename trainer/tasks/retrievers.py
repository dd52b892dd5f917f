"""Pretrained models as rankers of images and texts.

Owns which ranker a model gets. Does not own them (`trainer.tasks.retrieval_mlim`) or
what is asked of them (`trainer.tasks.pair_scores`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from trainer.models.mlim import MlimForPreTraining


class RetrievalModel(nn.Module):
    """A model as retrieval sees it: cheap scores by features, or dear ones of pairs, or
    both.

    Shapes: B items or pairs, U different images, S side of an image, F features.
    """

    has_features: bool
    """Images and texts have features whose inner product is a score."""
    has_pair_scores: bool
    """Pairs have scores that need a pass through the model each."""

    @property
    @abstractmethod
    def pretrained(self) -> nn.Module:
        """The model under what retrieval adds."""

    @abstractmethod
    def image_features(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) -> (B, F), of length 1."""

    @abstractmethod
    def text_features(self, texts: Sequence[np.ndarray]) -> Tensor:
        """B texts, [CLS] words [SEP] -> (B, F), of length 1."""

    @abstractmethod
    def image_states(self, pixels: np.ndarray) -> Tensor:
        """uint8 (U, S, S, 3) -> (U, ...): what scores of pairs need of an image."""

    @abstractmethod
    def pair_scores(
        self, states: Tensor, image_of: Tensor, texts: Sequence[np.ndarray]
    ) -> Tensor:
        """States (U, ...) and which of them (B,) stands with each text -> (B,) fp32,
        the log odds that they match.
        """

    @abstractmethod
    def losses(
        self,
        pixels: np.ndarray,
        texts: Sequence[np.ndarray],
        *,
        hard: float,
        seed: int,
        epochs: Tensor,
        uids: Tensor,
        images: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of fine-tuning, means over B pairs that belong together.

        Args:
            hard: share of negatives that are drawn by similarity.
            epochs: (B,) int64.
            uids: (B,) int64.
            images: (B,) int64, equal where images are.
        """


def retriever(model: nn.Module, tuned: Any) -> RetrievalModel:
    """The ranker that a pretrained model is, or that one which was fine-tuned with the
    keys `tuned` has its weights in.

    Raises:
        ValueError: it cannot rank. The message has the cure.
    """
    learned = tuned is not None and tuned.task == "retrieval"
    if isinstance(model, MlimForPreTraining):
        from trainer.tasks.retrieval_mlim import MlimRetrieval

        return MlimRetrieval(model, features=tuned.features if learned else 0)
    raise ValueError(f"tasks do not know how a {type(model).__name__} ranks")
