"""Losses of fine-tuning for retrieval that look at all pairs of a batch.

Owns which pairs may stand against each other, the contrastive loss, and the draw of
pairs that do not match. Does not own the models that use them
(`trainer.tasks.retrieval_mlim`).

Two pairs of a batch that share the sample, the image file or the caption are no
negatives of each other: neither in the contrastive loss nor in the draw.

Shapes: B pairs, L text positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.philox import Use, draw, edge

# Draws of retrieval by number; 0 is that of pretraining.
_OTHER_TEXT, _OTHER_IMAGE = 1, 2


def strangers(uids: Tensor, images: Tensor, captions: Tensor) -> Tensor:
    """(B, B) bool: two pairs share nothing.

    Args:
        uids: (B,) of the samples.
        images: (B,) equal where image files are.
        captions: (B, L) equal where captions are.
    """
    same = (uids[:, None] == uids) | (images[:, None] == images)
    return ~(same | (captions[:, None] == captions).all(-1))


def contrastive_loss(similarity_bb: Tensor, strange_bb: Tensor) -> Tensor:
    """Mean over pairs of the two cross-entropies (which text is this image's, which
    image is this text's), each among the pairs that are strangers and its own.

    Args:
        similarity_bb: images by texts, divided by the temperature.
    """
    own = torch.eye(len(similarity_bb), dtype=torch.bool, device=similarity_bb.device)
    logits = similarity_bb.float().masked_fill(~(strange_bb | own), float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    to_text, to_image = (
        F.cross_entropy(logits, target),
        F.cross_entropy(logits.T, target),
    )
    return (to_text + to_image) / 2


def drawn_negatives(
    similarity_bb: Tensor,
    strange_bb: Tensor,
    *,
    hard: float,
    seed: int,
    epochs: Tensor,
    uids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Another text for each image and another image for each text, (B,) and (B,), among
    strangers: a share `hard` of them by the softmax of the similarity, the others each
    as likely as any. A pair without strangers gets itself.

    Args:
        similarity_bb: images by texts, divided by the temperature.
        epochs: (B,) int64.
        uids: (B,) int64.
    """
    similarity_bb = similarity_bb.detach()
    found = []
    for number, scores in (
        (_OTHER_TEXT, similarity_bb),
        (_OTHER_IMAGE, similarity_bb.T),
    ):
        index = torch.full_like(uids, number)
        kind, where, *_ = draw(
            seed=seed, use=Use.ITM, epoch=epochs, uid=uids, index=index
        )
        wanted = kind < edge(hard)
        flat = torch.where(wanted[:, None], scores.double(), 0.0)
        weights = flat.masked_fill(~strange_bb, float("-inf")).softmax(1)
        # Rows without strangers are nan, and keep themselves.
        bounds = weights.nan_to_num().cumsum(1)
        at = where.double()[:, None] / (1 << 32) * bounds[:, -1:]
        place = torch.searchsorted(bounds, at, right=True)[:, 0]
        own = torch.arange(len(uids), device=uids.device)
        place = torch.where(strange_bb.any(1), place.clamp(max=len(uids) - 1), own)
        found.append(place)
    return found[0], found[1]
