"""A pretrained model as what turns items into vectors, for the heads of tasks.

Owns what a body gives of items that have an image, a text, or both, and how items
become a micro-batch. Does not own which rows of a model stand for an item (the body
that its keys offer, `trainer.models.base.ModelConfig.item_body`), items
(`trainer.tasks.items`) or heads (each task).

Shapes: N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainer.models.base import Inputs, ModelConfig
from trainer.stream import pack
from trainer.tasks.items import Items

Pooling = Literal["cls", "mean"]


class Body(nn.Module):
    """What is common to all models. `model` is the pretrained one, as it is.

    Args:
        pooling: the state of [CLS], or the mean of the states of all tokens.
    """

    width: int
    """Of a vector."""

    def __init__(self, model: nn.Module, *, pooling: Pooling = "cls") -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def pooled(self, items: Items) -> Tensor:
        """A vector of each item (N, width). Items with both, with an image alone and
        with a text alone are three passes.
        """
        both = items.has_image & items.has_text
        wanted = {
            "both": both,
            "image": items.has_image & ~both,
            "text": items.has_text & ~both,
        }
        parts, order = [], []
        for show, which in wanted.items():
            rows = np.flatnonzero(which)
            if len(rows):
                parts.append(self.of(items.rows(rows), show))
                order.append(rows)
        back = np.argsort(np.concatenate(order), kind="stable")
        whole = torch.cat(parts)
        return whole[torch.from_numpy(back).to(whole.device)]

    def of(self, items: Items, show: str) -> Tensor:
        """The same of items that all show "both", "image" or "text"."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


def body_of(model: Any, *, pooling: Pooling = "cls") -> Body:
    """The body of a pretrained model: what its keys offer.

    Raises:
        ValueError: they offer none, or it cannot pool so.
    """
    config: ModelConfig = model.config
    return config.item_body(model, pooling=pooling)


def inputs_of(
    pixels: np.ndarray,
    texts: Sequence[np.ndarray],
    *,
    n_image: int,
    device: torch.device,
) -> Inputs:
    """A micro-batch in which nothing is masked.

    Args:
        n_image: rows of the stream that an image has.
    """
    lengths = np.array([len(text) for text in texts])
    stream, token_ids = pack(lengths, np.concatenate(texts), n_image)
    return Inputs(
        stream=stream.to(device),
        token_ids=token_ids.to(device),
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)).to(device),
        n_masked_words=0,
        n_recon_images=0,
    )
