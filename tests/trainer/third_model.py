"""A model of a user's own: one file, as `trainer/models` has them; the tests put it
beside those of the package.

It guesses the mean colour of each image from its words, and its words not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.masking import MaskCounts, Masks
from trainer.models.base import Figure, Inputs, ModelConfig, Output, Sizes, Term
from trainer.tasks.bodies import Body, Pooling, inputs_of
from trainer.tasks.items import Items


@dataclass(frozen=True, kw_only=True)
class BagConfig(ModelConfig):
    """Words in any order."""

    name: Literal["bag"] = "bag"
    """Which model this is."""
    width: int = 8
    """Width of a word."""
    patch: int = 8
    """Pixels on a side of an image position."""

    @property
    def patch_size(self) -> int:
        """Pixels on a side of an image position."""
        return self.patch

    @property
    def terms(self) -> tuple[Term, ...]:
        """Squared error of the mean colour."""
        return (Term("colour", 1.0, "pairs"),)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """How often the error is small."""
        return (Figure("colour_near", "pairs"),)

    def build(self, sizes: Sizes) -> nn.Module:
        """The model."""
        return Bag(self, sizes)

    def scored_positions(self, masked: MaskCounts, n_image: int) -> Tensor:
        """None is masked."""
        return torch.zeros_like(masked.text)

    def recon_pixels(self, masked: Tensor, n_image: int) -> Tensor:
        """None."""
        return torch.zeros_like(masked)

    def forward_flops(
        self, work: Any, *, vocab_size: int, image_size: int
    ) -> dict[str, float]:
        """The head."""
        return {"head": 2.0 * 3 * self.width * work.pairs}

    def pixel_flops(self, work: Any, *, image_size: int) -> float:
        """Pixels are only looked at."""
        return 0.0

    def item_body(self, model: Bag, *, pooling: Pooling) -> Body:
        """Words and colour."""
        return BagBody(model, pooling=pooling)


CONFIG = BagConfig


class Bag(nn.Module):
    """Mean of the words' vectors, and a colour of it."""

    def __init__(self, config: BagConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.recompute = config, False
        self.words = nn.Embedding(sizes.vocab_size, config.width)
        self.head = nn.Linear(config.width, 3)

    def compile_layers(self, backend: str = "inductor") -> None:
        """There are none."""

    def means(self, inputs: Inputs) -> Tensor:
        """Mean vector of the words of each pair."""
        stream = inputs.stream
        used = stream.text_used
        words = self.words(inputs.token_ids[:used])
        summed = words.new_zeros(stream.pairs, words.shape[1])
        summed = summed.index_add(0, stream.text_pair[:used], words)
        return summed / (stream.n_words[:, None] + 2)

    def forward(self, inputs: Inputs, masks: Masks) -> Output:
        """Losses of a micro-batch."""
        guess = self.head(self.means(inputs))
        errors = (guess - colours(inputs, guess.dtype)).square().sum(1).float()
        return Output(
            losses={"colour": errors.sum()},
            figures={"colour_near": (errors < 0.05).sum().float()},
            by_mode=errors.new_zeros(4, 3),
        )


class BagBody(Body):
    """Mean of the words beside the mean colour; what an item does not show is zero."""

    model: Bag

    def __init__(self, model: Bag, *, pooling: Pooling) -> None:
        super().__init__(model, pooling=pooling)
        self.width = model.config.width + 3

    def of(self, items: Items, show: str) -> Tensor:
        """As `Body.of`."""
        inputs = inputs_of(items.pixels, items.texts, n_image=0, device=self.device)
        words = self.model.means(inputs) * (show != "image")
        return torch.cat([words, colours(inputs, words.dtype) * (show != "text")], 1)


def colours(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Mean colour of each image."""
    return inputs.pixels.to(dtype).mean((1, 2)) / 255
