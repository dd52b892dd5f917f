"""MLIM for retrieval: its matching head on pairs, and a cheap first stage.

Owns the head and the projections that fine-tuning adds, and their loss. Does not own
the encoder (`trainer.models.mlim`) or what is ranked (`trainer.tasks.retrieval`).

MLIM has one stream, so a score of a pair takes a pass of both through the transformer.
For the first stage image and text go through it alone, and their [CLS] are projected:
the loss of that is contrastive, and it draws the hard ones of the pairs that the head
learns to refuse.

Shapes: B pairs, U images, P image tokens, D width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.mlim import MlimForPreTraining
from trainer.models.scored_rows import first_rows
from trainer.tasks.bodies import MlimBody
from trainer.tasks.contrast import contrastive_loss, drawn_negatives, strangers
from trainer.tasks.items import Items
from trainer.tasks.retrievers import RetrievalModel

_TEMPERATURE = 0.07
_MOST_SCALE = 100.0


class MlimRetrieval(RetrievalModel):
    """A pretrained MLIM that ranks.

    Args:
        encoder: the pretrained model.
        features: F; 0: as it was pretrained, by its ITM head alone.

    Raises:
        ValueError: 0 features and no ITM head.
    """

    def __init__(self, encoder: MlimForPreTraining, *, features: int) -> None:
        super().__init__()
        self.body = MlimBody(encoder)
        self.has_features, self.has_pair_scores = features > 0, True
        if not features:
            if encoder.itm_head is None:
                raise ValueError(
                    "this MLIM was pretrained without matching and cannot rank as it "
                    "is: fine-tune it (python -m trainer.finetune RUN --task "
                    "retrieval), or pretrain with --model.itm_weight 1"
                )
            return
        width = encoder.config.width
        self.image_projection = nn.Linear(width, features)
        self.text_projection = nn.Linear(width, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / _TEMPERATURE)))
        added = [self.image_projection, self.text_projection]
        if encoder.itm_head is None:
            encoder.itm_pooler = nn.Linear(width, width)
            encoder.itm_head = nn.Linear(width, 2)
            added += [encoder.itm_pooler, encoder.itm_head]
        for module in added:
            encoder.initialise(module)

    @property
    def pretrained(self) -> nn.Module:
        """As `RetrievalModel.pretrained`."""
        return self.encoder

    @property
    def encoder(self) -> MlimForPreTraining:
        """The pretrained model."""
        encoder = self.body.model
        assert isinstance(encoder, MlimForPreTraining)
        return encoder

    def image_features(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) -> (B, F), of length 1."""
        # [CLS] [SEP], which every caption begins and ends with, and no word.
        ids = self.encoder.ids_by_name
        nothing = [np.array([ids["cls"], ids["sep"]])] * len(pixels)
        cls_bd = self.body.of(Items.of(pixels, nothing, show="image"), "image")
        return F.normalize(self.image_projection(cls_bd).float(), dim=1)

    def text_features(self, texts: Sequence[np.ndarray]) -> Tensor:
        """B texts -> (B, F), of length 1."""
        items = Items.of(_no_pixels(len(texts)), texts, show="text")
        cls_bd = self.body.of(items, "text")
        return F.normalize(self.text_projection(cls_bd).float(), dim=1)

    def image_states(self, pixels: np.ndarray) -> Tensor:
        """uint8 (U, S, S, 3) -> image embeddings (U, P, D)."""
        moved = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.body.device)
        return self.encoder.embed_pixels(moved)

    def pair_scores(
        self, states: Tensor, image_of: Tensor, texts: Sequence[np.ndarray]
    ) -> Tensor:
        """(U, P, D), (B,) and B texts -> (B,), the log odds that they match."""
        logits_b2 = self.matching_logits(states.index_select(0, image_of), texts)
        return logits_b2[:, 1] - logits_b2[:, 0]

    def matching_logits(self, image_bpd: Tensor, texts: Sequence[np.ndarray]) -> Tensor:
        """(B, P, D) and B texts -> (B, 2) fp32: they do not match, they do."""
        inputs = self.body.inputs(_no_pixels(len(texts)), texts, images=True)
        rows = first_rows(inputs.stream)
        hidden_nd = self.encoder.encode(inputs, None, image_bpd, rows)
        stream = inputs.stream if rows is None else rows.of(inputs.stream)
        return self.encoder.matching_logits(hidden_nd, stream).float()

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
        """Contrastive and matching loss of B pairs that belong together; each matching
        pair stands beside one with another text and one with another image.

        Args:
            hard, seed, epochs, uids, images: as `RetrievalModel.losses` has them.
        """
        similarity_bb = (
            self.image_features(pixels) @ self.text_features(texts).T
        ) * self.log_scale.exp().clamp(max=_MOST_SCALE)
        captions = _caption_table(texts).to(uids.device)
        strange_bb = strangers(uids, images, captions)
        other_text, other_image = drawn_negatives(
            similarity_bb,
            strange_bb,
            hard=hard,
            seed=seed,
            epochs=epochs,
            uids=uids,
        )
        own = torch.arange(len(uids), device=uids.device)
        image_of = torch.cat([own, own, other_image])
        text_of = torch.cat([own, other_text, own])
        logits = self.matching_logits(
            self.image_states(pixels).index_select(0, image_of),
            [texts[number] for number in text_of.tolist()],
        )
        matched = image_of == text_of
        # A pair that has no stranger stands there three times, and counts once.
        counted = torch.cat(
            [torch.ones_like(matched[: len(own)]), ~matched[len(own) :]]
        )
        each = F.cross_entropy(logits, matched.long(), reduction="none")
        return {
            "contrastive": contrastive_loss(similarity_bb, strange_bb),
            "matching": (each * counted).sum() / counted.sum(),
        }


def _no_pixels(count: int) -> np.ndarray:
    """In place of images that are embedded already, or not shown."""
    return np.empty((count, 0, 0, 3), dtype=np.uint8)


def _caption_table(texts: Sequence[np.ndarray]) -> Tensor:
    """Token ids (B, L) of texts, -1 past the end of each."""
    longest = max(len(text) for text in texts)
    table = np.full((len(texts), longest), -1)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(table)
