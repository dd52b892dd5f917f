"""MLIM under the conventions of Hugging Face `transformers`.

Owns the padded interface (`input_ids`, `attention_mask`, `pixel_values`) of a trained
model, `save_pretrained` and `from_pretrained`, and the Auto classes: importing this
module registers them. Does not own the model (`trainer.models.mlim`), which training
uses as it is, or what goes into an export (`trainer.export`).

Shapes: B pairs, L padded text, P image tokens, D width, V vocabulary, H side in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from trainer.masking import Masks
from trainer.models import mlim
from trainer.models.base import Inputs
from trainer.stream import pack

_RECIPE_KEYS = {
    field.name: field.default
    for field in dataclasses.fields(mlim.MlimConfig)
    # Where weights came from is nothing that a model needs to know; its name is the
    # type of the model.
    if field.name not in ("body", "name")
}


class MlimConfig(PreTrainedConfig):
    """The model keys of a recipe, flat, with those of text and image.

    Args:
        vocab_size: V.
        max_text: longest text in tokens.
        image_size: H.
        special_ids: ids by name (`mask` is needed).
        keys: model keys (`trainer.models.mlim.MlimConfig`) and those that every
            configuration of `transformers` has.
    """

    model_type = "mlim"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_width",
        "max_position_embeddings": "max_text",
    }

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        max_text: int = 64,
        image_size: int = 64,
        special_ids: Mapping[str, int] | None = None,
        **keys: Any,
    ) -> None:
        for name, default in _RECIPE_KEYS.items():
            value = keys.pop(name, default)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.vocab_size, self.max_text = vocab_size, max_text
        self.image_size = image_size
        self.special_ids = dict(special_ids or {"mask": 103})
        super().__init__(**keys)

    @property
    def recipe(self) -> mlim.MlimConfig:
        """The model keys as training has them.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _RECIPE_KEYS}
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return mlim.MlimConfig(**values)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the model is made with besides."""
        names = ("vocab_size", "max_text", "image_size", "special_ids")
        return {name: getattr(self, name) for name in names}


@dataclass
class MlimPreTrainingOutput(ModelOutput):
    """Losses are None where nothing was asked for."""

    loss: Tensor | None = None
    """Weighted sum of those below."""
    mlm_loss: Tensor | None = None
    """Mean over the words that `labels` names."""
    recon_loss: Tensor | None = None
    """Mean over scored pixels of the squared error summed over channels, 0..1."""
    prediction_logits: Tensor | None = None
    """(B, L, V)."""
    reconstruction: Tensor | None = None
    """(B, 3, H, H), 0..1; None without images."""
    itm_logits: Tensor | None = None
    """(B, 2), that text and image do not match and that they do, from what the model
    is shown: hide nothing; None without images or an ITM head."""
    last_hidden_state: Tensor | None = None
    """(B, L + P, D)."""


class MlimPreTrainedModel(PreTrainedModel):
    """What both models share. `mlim` is the model as it was trained."""

    config_class = MlimConfig
    config: MlimConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    mlim: mlim.MlimEncoder

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint lacks (`transformers` skips what it has)."""
        self.mlim.initialise(module)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, mlim.MlimForPreTraining):
            nn.init.zeros_(module.mlm_bias)

    def _inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        bool_masked_pos: Tensor | None,
    ) -> tuple[Inputs, Masks]:
        """The stream of a padded batch. Its lengths are read on the host."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real, device = attention_mask.bool(), input_ids.device
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ValueError(
                "attention_mask has words after padding: pad on the right "
                "(padding_side='right')"
            )
        longest = int(real.sum(1).max())
        if longest > self.config.max_text:
            raise ValueError(
                f"a text has {longest} tokens and the model {self.config.max_text} "
                "positions: cut it with truncation=True, max_length="
                f"{self.config.max_text}"
            )
        pairs, images = len(input_ids), pixel_values is not None
        n_image = self.mlim.grid**2 if images else 0
        lengths, ids = real.sum(1).cpu().numpy(), input_ids[real].cpu().numpy()
        stream, token_ids = pack(lengths, ids, n_image)
        if not images or bool_masked_pos is None:
            bool_masked_pos = torch.zeros(pairs, n_image, dtype=torch.bool)
        # Words are masked by the [MASK] in `input_ids`: its vector is the mask's.
        return Inputs(
            stream=stream.to(device),
            token_ids=token_ids.to(device),
            pixels=pixel_values if pixel_values is not None else input_ids[:0],
            n_masked_words=0,
            n_recon_images=0,
        ), Masks(
            mode=torch.zeros(pairs, dtype=torch.int64, device=device),
            text=torch.zeros(pairs, 1, dtype=torch.bool, device=device),
            image=bool_masked_pos.bool().flatten(1).to(device),
        )


class MlimModel(MlimPreTrainedModel):
    """Embeddings and transformer."""

    _keys_to_ignore_on_load_unexpected = [r"mlim\.(mlm_|itm_|decoder\.)"]  # noqa: RUF012

    def __init__(self, config: MlimConfig) -> None:
        super().__init__(config)
        self.mlim = mlim.MlimEncoder(config.recipe, **config.sizes)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> BaseModelOutput:
        """Hidden states (B, L + P, D): text, zero where padding, then image.

        Args:
            input_ids: (B, L), [CLS] first; [MASK] hides a word.
            attention_mask: (B, L), 0 where padding, which is on the right.
            pixel_values: (B, 3, H, H), from -1 to 1; None for text alone (P = 0).
            bool_masked_pos: (B, P), image tokens to hide.
        """
        inputs, masks = self._inputs(
            input_ids, attention_mask, pixel_values, bool_masked_pos
        )
        hidden_td = self.mlim.encode(inputs, masks)
        length = input_ids.shape[1]
        return BaseModelOutput(last_hidden_state=_padded(hidden_td, inputs, length))


class MlimForPreTraining(MlimPreTrainedModel):
    """The model with its MLM head and image decoder."""

    mlim: mlim.MlimForPreTraining

    def __init__(self, config: MlimConfig) -> None:
        super().__init__(config)
        self.mlim = mlim.MlimForPreTraining(config.recipe, **config.sizes)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MlimPreTrainingOutput:
        """Words and pixels that the model expects, and its losses.

        Args:
            input_ids, attention_mask, pixel_values, bool_masked_pos: as `MlimModel`'s.
            labels: (B, L), -100 where no word is asked for.
        """
        inputs, masks = self._inputs(
            input_ids, attention_mask, pixel_values, bool_masked_pos
        )
        hidden_td = self.mlim.encode(inputs, masks)
        length = input_ids.shape[1]
        hidden = _padded(hidden_td, inputs, length)
        logits = self.mlim.word_logits(hidden[:, :length])
        images, mlm, recon, matches = None, None, None, None
        if labels is not None:
            nll = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
            )
            mlm = nll / (labels != -100).sum().clamp(min=1)
        if pixel_values is not None and self.mlim.itm_head is not None:
            matches = self.mlim.matching_logits(hidden_td, inputs.stream)
        if pixel_values is not None:
            every = torch.arange(len(input_ids), device=input_ids.device)
            images = self.mlim.decode_images(hidden_td, inputs, every)
            if bool_masked_pos is not None:
                recon = self._recon(images, (pixel_values.float() + 1) / 2, masks)
        return MlimPreTrainingOutput(
            loss=self._total(mlm, recon),
            mlm_loss=mlm,
            recon_loss=recon,
            prediction_logits=logits,
            reconstruction=images,
            itm_logits=matches,
            last_hidden_state=hidden,
        )

    def _recon(self, images: Tensor, targets: Tensor, masks: Masks) -> Tensor:
        squares = self.mlim.squares((images - targets).square().sum(1))
        scored = masks.image
        if self.mlim.config.recon_region == "whole":
            scored = masks.image.any(1, keepdim=True).expand_as(scored)
        pixels = scored.sum() * self.mlim.config.patch_size**2
        return (squares * scored).sum() / pixels.clamp(min=1)

    def _total(self, mlm: Tensor | None, recon: Tensor | None) -> Tensor | None:
        weights = (self.config.mlm_weight, self.config.recon_weight)
        parts = [
            weight * loss
            for weight, loss in zip(weights, (mlm, recon), strict=True)
            if loss is not None
        ]
        return torch.stack(parts).sum() if parts else None


def from_trained(model: mlim.MlimForPreTraining) -> MlimForPreTraining:
    """The same model, with the same parameters in memory, as `transformers` has it."""
    keys = {name: getattr(model.config, name) for name in _RECIPE_KEYS}
    with torch.device("meta"):
        config = MlimConfig(
            vocab_size=model.words.num_embeddings,
            max_text=model.text_positions.num_embeddings,
            image_size=model.grid * model.config.patch_size,
            special_ids=model.ids_by_name,
            dtype="float32",
            **keys,
        )
        wrapped = MlimForPreTraining(config)
    wrapped.mlim = model
    return wrapped


def _padded(hidden_td: Tensor, inputs: Inputs, length: int) -> Tensor:
    """Stream (T, D) -> (B, L + P, D)."""
    stream = inputs.stream
    used = stream.text_used
    shape = (stream.pairs, length, hidden_td.shape[1])
    text = hidden_td.new_zeros(shape).index_put(
        (stream.text_pair[:used], stream.text_position[:used]),
        hidden_td[stream.text_row[:used]],
    )
    return torch.cat([text, hidden_td[stream.image_row]], 1)


AutoConfig.register(MlimConfig.model_type, MlimConfig, exist_ok=True)
AutoModel.register(MlimConfig, MlimModel, exist_ok=True)
AutoModelForPreTraining.register(MlimConfig, MlimForPreTraining, exist_ok=True)
