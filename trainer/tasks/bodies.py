"""A pretrained model as what turns items into vectors, for the heads of tasks.

Owns what of a model stands for an item that has an image, a text, or both. Does not own
the models (`trainer.models`), items (`trainer.tasks.items`) or heads (each task).

Shapes: N items, D width, T stream rows, P image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainer.models.base import Inputs
from trainer.models.maskvlm_encoder import (
    Encoded,
    MaskVlmEncoder,
    Passes,
    Read,
    Shown,
)
from trainer.models.mlim import MlimEncoder
from trainer.models.scored_rows import first_rows
from trainer.stream import Stream, pack
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


class MlimBody(Body):
    """MLIM: the joint stream; text alone is the stream without image tokens, an image
    alone is [CLS] [SEP] and its tokens.
    """

    model: MlimEncoder

    def __init__(self, model: MlimEncoder, *, pooling: Pooling = "cls") -> None:
        super().__init__(model, pooling=pooling)
        self.width = model.config.width

    def of(self, items: Items, show: str) -> Tensor:
        """As `Body.of`."""
        texts = items.texts
        if show == "image":
            texts = [text[[0, -1]] for text in texts]
        n_image = 0 if show == "text" else self.model.grid**2
        inputs = inputs_of(items.pixels, texts, n_image=n_image, device=self.device)
        rows = first_rows(inputs.stream) if self.pooling == "cls" else None
        hidden_nd = self.model.encode(inputs, None, rows=rows)
        if self.pooling == "mean":
            return _means(hidden_nd, inputs.stream)
        # A pair's segment begins with [CLS].
        stream = inputs.stream if rows is None else rows.of(inputs.stream)
        return hidden_nd.index_select(0, stream.cu_seqlens[: stream.pairs])


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


def body_of(model: Any, *, pooling: Pooling = "cls") -> Body:
    """The body of a pretrained model.

    Raises:
        ValueError: there is none for such a model, or it cannot pool so.
    """
    if isinstance(model, MlimEncoder):
        return MlimBody(model, pooling=pooling)
    if isinstance(model, MaskVlmEncoder):
        return MaskVlmBody(model, pooling=pooling)
    raise ValueError(
        f"tasks do not know what stands for an item in a {type(model).__name__}: add a "
        "Body for it to trainer.tasks.bodies"
    )


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


def _means(hidden_td: Tensor, stream: Stream) -> Tensor:
    """Mean state (N, D) of the tokens of each item, [CLS] and [SEP] among them."""
    bounds = stream.cu_seqlens[: stream.pairs + 1].long()
    lengths = bounds.diff()
    used = hidden_td[: int(bounds[-1])]
    item = torch.repeat_interleave(lengths)
    sums = torch.zeros_like(hidden_td[: stream.pairs]).index_add(0, item, used)
    return sums / lengths[:, None]
