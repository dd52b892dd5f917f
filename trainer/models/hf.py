"""MLIM under the conventions of Hugging Face `transformers`.

Owns the padded interface (`input_ids`, `attention_mask`, `pixel_values`) of a trained
model, `save_pretrained` and `from_pretrained`, and the Auto classes: importing this
module registers them, and those of MaskVLM (`trainer.models.hf_maskvlm`). Does not own
the model (`trainer.models.mlim`), which training uses as it is, or what goes into an
export (`trainer.export`).

Shapes: B pairs, L padded text, P image tokens, D width, V vocabulary, H side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from trainer.masking import Masks
from trainer.models import hf_maskvlm, mlim
from trainer.models.base import Inputs
from trainer.models.hf_padded import (
    RecipeConfig,
    padded_stream,
    padded_text,
    require_images,
    weighted,
)
from trainer.models.maskvlm import MaskVlmForPreTraining as MaskVlm


class MlimConfig(RecipeConfig):
    """The model keys of a recipe (`trainer.models.mlim_config.MlimConfig`), flat, with
    those of text and image.
    """

    model_type = "mlim"
    recipe_class = mlim.MlimConfig
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_width",
        "max_position_embeddings": "max_text",
    }

    def __init__(self, **keys: Any) -> None:
        # A class without one of its own is given a dataclass's by `transformers`.
        super().__init__(**keys)


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
        pairs, images, device = (
            len(input_ids),
            pixel_values is not None,
            input_ids.device,
        )
        n_image = 0
        if pixel_values is not None:
            side = self.config.image_size
            require_images(pixel_values, side=side, texts=pairs)
            n_image = self.mlim.grid**2
        stream, token_ids = padded_stream(
            input_ids, attention_mask, n_image=n_image, max_text=self.config.max_text
        )
        if not images or bool_masked_pos is None:
            bool_masked_pos = torch.zeros(pairs, n_image, dtype=torch.bool)
        # Words are masked by the [MASK] in `input_ids`: its vector is the mask's.
        return Inputs(
            stream=stream,
            token_ids=token_ids,
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
            loss=weighted(
                [(self.config.mlm_weight, mlm), (self.config.recon_weight, recon)]
            ),
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


def from_trained(model: Any) -> PreTrainedModel:
    """The same model, with the same parameters in memory, as `transformers` has it.

    Raises:
        ValueError: a model that has no such classes.
    """
    if isinstance(model, MaskVlm):
        return hf_maskvlm.from_trained(model)
    if not isinstance(model, mlim.MlimForPreTraining):
        raise ValueError(
            f"{model.config.name} has no classes of transformers: export mlim and "
            "maskvlm runs, or write such classes beside trainer/models/hf.py"
        )
    with torch.device("meta"):
        wrapped = MlimForPreTraining(MlimConfig.of(model))
    wrapped.mlim = model
    return wrapped


def _padded(hidden_td: Tensor, inputs: Inputs, length: int) -> Tensor:
    """Stream (T, D) -> (B, L + P, D)."""
    stream = inputs.stream
    text = padded_text(hidden_td[stream.text_row], stream, length)
    return torch.cat([text, hidden_td[stream.image_row]], 1)


AutoConfig.register(MlimConfig.model_type, MlimConfig, exist_ok=True)
AutoModel.register(MlimConfig, MlimModel, exist_ok=True)
AutoModelForPreTraining.register(MlimConfig, MlimForPreTraining, exist_ok=True)
