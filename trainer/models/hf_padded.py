"""What the trained models have in common under the conventions of `transformers`.

Owns a model's configuration as `transformers` stores it, and the way from a padded
batch to a stream and back. Does not own the classes of each model (`trainer.models.hf`,
`trainer.models.hf_maskvlm`).

Shapes: B pairs, L padded text, K text rows, P image tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from trainer.models.base import ModelConfig, Sizes
from trainer.stream import Stream, pack


class RecipeConfig(PreTrainedConfig):
    """The model keys of a recipe, flat, with those of text and image.

    Args:
        vocab_size: V.
        max_text: longest text in tokens.
        image_size: side of the square in pixels.
        special_ids: ids by name (`mask` is needed).
        keys: model keys (`recipe_class`) and those that every configuration of
            `transformers` has.
    """

    recipe_class: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        max_text: int = 64,
        image_size: int = 64,
        special_ids: Mapping[str, int] | None = None,
        **keys: Any,
    ) -> None:
        for name, default in self.recipe_keys().items():
            value = keys.pop(name, default)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.vocab_size, self.max_text = vocab_size, max_text
        self.image_size = image_size
        self.special_ids = dict(special_ids or {"mask": 103})
        super().__init__(**keys)

    @classmethod
    def recipe_keys(cls) -> dict[str, Any]:
        """Model keys and their defaults. Where weights came from is nothing that a
        model needs to know; its name is the type of the model.
        """
        return {
            field.name: field.default
            for field in dataclasses.fields(cls.recipe_class)
            if field.name not in (*cls.recipe_class.body_keys, "name")
        }

    @classmethod
    def of(cls, model: Any) -> Self:
        """The configuration of a model as it was trained."""
        keys = {name: getattr(model.config, name) for name in cls.recipe_keys()}
        return cls(
            vocab_size=model.words.num_embeddings,
            max_text=model.text_positions.num_embeddings,
            image_size=model.grid * model.config.patch_size,
            special_ids=model.ids_by_name,
            dtype="float32",
            **keys,
        )

    @property
    def recipe(self) -> Any:
        """The model keys as training has them.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        values: dict[str, Any] = {
            name: getattr(self, name) for name in self.recipe_keys()
        }
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return self.recipe_class(**values)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the model is made with besides."""
        return {name: getattr(self, name) for name in Sizes._fields}


def padded_stream(
    input_ids: Tensor, attention_mask: Tensor | None, *, n_image: int, max_text: int
) -> tuple[Stream, Tensor]:
    """The stream of a padded batch (B, L), and its token ids (K,), on the batch's
    device. Lengths are read on the host.

    Raises:
        ValueError: padding on the left, or a text that is too long.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    real, device = attention_mask.bool(), input_ids.device
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError(
            "attention_mask has words after padding: pad on the right "
            "(padding_side='right')"
        )
    longest = int(real.sum(1).max())
    if longest > max_text:
        raise ValueError(
            f"a text has {longest} tokens and the model {max_text} positions: cut it "
            f"with truncation=True, max_length={max_text}"
        )
    lengths, ids = real.sum(1).cpu().numpy(), input_ids[real].cpu().numpy()
    stream, token_ids = pack(lengths, ids, n_image)
    return stream.to(device), token_ids.to(device)


def require_images(images: Tensor, *, side: int, texts: int | None) -> None:
    """Raise ValueError unless `images` are (B, 3, side, side), as many as texts."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
        raise ValueError(
            f"pixel_values are {list(images.shape)}, and the model takes [images, 3, "
            f"{side}, {side}]: AutoImageProcessor.from_pretrained makes them"
        )
    if texts is not None and len(images) != texts:
        raise ValueError(
            f"{len(images)} images and {texts} texts: the first image goes with the "
            "first text, and so on; encode each side by itself, or repeat one"
        )


def weighted(parts: Iterable[tuple[float, Tensor | None]]) -> Tensor | None:
    """Sum of the losses that there are, each by its weight; None without any."""
    found = [weight * loss for weight, loss in parts if loss is not None]
    return torch.stack(found).sum() if found else None


def padded_text(hidden_kd: Tensor, stream: Stream, length: int) -> Tensor:
    """Text rows (K, D), or the first that hold a token, as (B, L, D): zero where
    padding.
    """
    used = stream.text_used
    shape = (stream.pairs, length, hidden_kd.shape[1])
    rows = stream.text_pair[:used], stream.text_position[:used]
    return hidden_kd.new_zeros(shape).index_put(rows, hidden_kd[:used])
