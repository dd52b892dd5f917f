"""MaskVLM's body: both [CLS] stand for an item.

Owns which of its encoders an item goes through. Does not own the model
(`trainer.models.maskvlm_encoder`) or what bodies have in common
(`trainer.tasks.bodies`).

Shapes: N items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.models.maskvlm_encoder import (
    Encoded,
    MaskVlmEncoder,
    Passes,
    Read,
    Shown,
)
from trainer.tasks.bodies import Body, Pooling, inputs_of
from trainer.tasks.items import Items


class MaskVlmBody(Body):
    """MaskVLM: the [CLS] of the image and that of the text, side by side. Of an item
    with both they have looked at the other modality; of an item with one alone the
    other half is zero.

    Raises:
        ValueError: another pooling than "cls".
    """

    model: MaskVlmEncoder

    def __init__(self, model: MaskVlmEncoder, *, pooling: Pooling = "cls") -> None:
        super().__init__(model, pooling=pooling)
        self.width = 2 * model.config.width
        if pooling != "cls":
            raise ValueError(
                f"pooling {pooling} is not for MaskVLM, whose encoders each train a "
                "[CLS]: give --pooling cls"
            )

    def of(self, items: Items, show: str) -> Tensor:
        """As `Body.of`."""
        inputs = inputs_of(items.pixels, items.texts, n_image=0, device=self.device)
        encoded = self.model.encode_pairs(
            inputs,
            None,
            Passes(clean_images=show != "text", clean_texts=show != "image"),
        )
        own = torch.arange(len(items), device=self.device)
        if show == "image":
            image_nd = encoded.image_bnd[:, 0]
            return torch.cat([image_nd, torch.zeros_like(image_nd)], 1)
        if show == "text":
            text_nd = encoded.text_td.index_select(0, encoded.text.starts[own])
            return torch.cat([torch.zeros_like(text_nd), text_nd], 1)
        return self._across(encoded, own)

    def _across(self, encoded: Encoded, own: Tensor) -> Tensor:
        """Both [CLS] (N, 2 D) after the cross-modality encoders; where a model has none
        of a modality, before them.
        """
        none = torch.zeros(0, dtype=torch.bool, device=self.device)
        shown, read = Shown(own, own), Read(none, 0, len(own))
        image_nd = encoded.image_bnd[:, 0]
        if self.model.image_cross is not None:
            image_nd = self.model.images_across(encoded, shown, read).cls(len(own))
        text_nd = encoded.text_td.index_select(0, encoded.text.starts[own])
        if self.model.text_cross is not None:
            text_nd = self.model.texts_across(encoded, shown, read).cls(len(own))
        return torch.cat([image_nd, text_nd], 1)
