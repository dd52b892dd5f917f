"""MLIM's body: what stands for an item in its one stream.

Owns which rows of the stream are read. Does not own the model (`trainer.models.mlim`)
or what bodies have in common (`trainer.tasks.bodies`).

Shapes: N items, D width, T stream rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.models.mlim import MlimEncoder
from trainer.models.scored_rows import first_rows
from trainer.stream import Stream
from trainer.tasks.bodies import Body, Pooling, inputs_of
from trainer.tasks.items import Items


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


def _means(hidden_td: Tensor, stream: Stream) -> Tensor:
    """Mean state (N, D) of the tokens of each item, [CLS] and [SEP] among them."""
    bounds = stream.cu_seqlens[: stream.pairs + 1].long()
    lengths = bounds.diff()
    used = hidden_td[: int(bounds[-1])]
    item = torch.repeat_interleave(lengths)
    sums = torch.zeros_like(hidden_td[: stream.pairs]).index_add(0, item, used)
    return sums / lengths[:, None]
