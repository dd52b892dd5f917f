"""Pretrained models as rankers of images and texts.

Owns what retrieval and zero-shot classification ask of a model and the loss of
fine-tuning it for them. Does not own the rankers (what a model's keys offer,
`trainer.models.base.ModelConfig.ranker`) or the parts of the loss
(`trainer.tasks.contrast`).

Shapes: B items or pairs, U different images, S side of an image, F features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.base import ModelConfig
from trainer.tasks.contrast import contrastive_loss, drawn_negatives, strangers

# A text as far as it is computed alone: its rows (length, ...).
TextState = np.ndarray | Tensor


class RetrievalModel(nn.Module):
    """A model with cheap scores by features, or dear ones of pairs, or both."""

    has_features: bool
    """Images and texts have features whose inner product is a score."""
    feature_width: int
    """F; 0 where there are none."""
    has_pair_scores: bool
    """Pairs have scores that need a pass through the model each."""

    @property
    @abstractmethod
    def pretrained(self) -> nn.Module:
        """The model under what retrieval adds."""

    @abstractmethod
    def image_states(self, pixels: np.ndarray) -> Tensor:
        """uint8 (U, S, S, 3) -> (U, ...): images as far as they are computed alone."""

    @abstractmethod
    def image_features(self, states: Tensor) -> Tensor:
        """(B, ...) -> (B, F), of length 1."""

    @abstractmethod
    def text_features(self, states: Sequence[TextState]) -> Tensor:
        """States of B texts, wherever they lie -> (B, F), of length 1."""

    @abstractmethod
    def scale(self) -> Tensor:
        """What inner products are multiplied by in the loss, a learnable number."""

    @abstractmethod
    def matching_logits(
        self, states: Tensor, image_of: Tensor, texts: Sequence[TextState]
    ) -> Tensor:
        """States (U, ...) of images, U at most B, which of them (B,) stands with each
        text, and B states of texts, wherever they lie -> (B, 2) fp32: they do not
        match, they do.
        """

    def text_states(self, texts: Sequence[np.ndarray]) -> Sequence[TextState]:
        """[CLS] words [SEP] of each -> texts as far as they are computed alone. Of a
        model that reads both modalities in one stream, their token ids.
        """
        return texts

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

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
        """Contrastive loss and, of a model with scores of pairs, matching loss, means
        over B pairs that belong together. For matching each pair stands beside one with
        another text and one with another image.

        Args:
            hard: share of these that are drawn by similarity.
            epochs: (B,) int64.
            uids: (B,) int64.
            images: (B,) int64, equal where images are.
        """
        states, text_states = self.image_states(pixels), self.text_states(texts)
        similarity_bb = self.image_features(states) @ self.text_features(text_states).T
        similarity_bb = similarity_bb * self.scale()
        captions = _caption_table(texts).to(uids.device)
        strange_bb = strangers(uids, images, captions)
        contrastive = contrastive_loss(similarity_bb, strange_bb)
        if not self.has_pair_scores:
            return {"contrastive": contrastive}
        other_text, other_image = drawn_negatives(
            similarity_bb, strange_bb, hard=hard, seed=seed, epochs=epochs, uids=uids
        )
        own = torch.arange(len(uids), device=uids.device)
        image_of = torch.cat([own, own, other_image])
        text_of = torch.cat([own, other_text, own])
        logits = self.matching_logits(
            states, image_of, [text_states[number] for number in text_of.tolist()]
        )
        matched = image_of == text_of
        # A pair that has no stranger stands there three times, and counts once.
        counts = ~matched
        counts[: len(own)] = True
        each = F.cross_entropy(logits, matched.long(), reduction="none")
        return {
            "contrastive": contrastive,
            "matching": (each * counts).sum() / counts.sum(),
        }


def retriever(model: Any, tuned: Any) -> RetrievalModel:
    """The ranker that a pretrained model is, or that which fine-tuning with the keys
    `tuned` made of it.

    Raises:
        ValueError: it cannot rank. The message has the cure.
    """
    config: ModelConfig = model.config
    learned = tuned is not None and tuned.task == "retrieval"
    return config.ranker(model, tuned if learned else None)


def log_odds(logits_b2: Tensor) -> Tensor:
    """Of logits (B, 2) that something is not so, and that it is: (B,)."""
    return logits_b2[:, 1] - logits_b2[:, 0]


def _caption_table(texts: Sequence[np.ndarray]) -> Tensor:
    """Token ids (B, L) of texts, -1 past the end of each."""
    table = np.full((len(texts), max(map(len, texts))), -1)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(table)
