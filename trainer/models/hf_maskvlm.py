"""MaskVLM under the conventions of Hugging Face `transformers`.

Owns the padded interface (`input_ids`, `attention_mask`, `pixel_values`) of a trained
model and its Auto classes: importing this module registers them, and so does
`trainer.models.hf`. Does not own the model (`trainer.models.maskvlm`), which training
uses as it is.

Shapes: B pairs, L padded text, P image positions, n = P + 1 rows of an image, D width,
E width of a projection, V vocabulary, H side in pixels.
"""

from __future__ import annotations

import math
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
from transformers.utils import ModelOutput

from trainer.mask_config import Mode
from trainer.masking import Masks
from trainer.models import maskvlm
from trainer.models.alignment import Temperature
from trainer.models.base import Inputs
from trainer.models.hf_padded import (
    RecipeConfig,
    padded_stream,
    padded_text,
    require_images,
    weighted,
)
from trainer.models.maskvlm_encoder import Encoded, MaskVlmEncoder, Passes

_CLEAN = Passes(clean_images=True, clean_texts=True)


class MaskVlmConfig(RecipeConfig):
    """The model keys of a recipe (`trainer.models.maskvlm.MaskVlmConfig`), flat, with
    those of text and image.
    """

    model_type = "maskvlm"
    recipe_class = maskvlm.MaskVlmConfig
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "text_layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_width",
        "max_position_embeddings": "max_text",
    }

    def __init__(self, **keys: Any) -> None:
        # A class without one of its own is given a dataclass's by `transformers`.
        super().__init__(**keys)


@dataclass
class MaskVlmModelOutput(ModelOutput):
    """What the encoders make of texts and images; None where nothing was given."""

    text_hidden_state: Tensor | None = None
    """(B, L, D) of texts alone, zero where padding."""
    image_hidden_state: Tensor | None = None
    """(B, n, D) of images alone, [CLS] first."""
    text_joint_state: Tensor | None = None
    """(B, L, D) of texts that have looked at their images."""
    image_joint_state: Tensor | None = None
    """(B, n, D) of images that have looked at their texts."""


@dataclass
class MaskVlmPreTrainingOutput(ModelOutput):
    """What is None was not asked for, or the model has no head for it."""

    loss: Tensor | None = None
    """Weighted sum of those below."""
    mlm_loss: Tensor | None = None
    """Mean over hidden words."""
    mim_loss: Tensor | None = None
    """Mean absolute error over hidden pixels and their channels, 0..1."""
    prediction_logits: Tensor | None = None
    """(B, L, V) of hidden texts that have looked at whole images."""
    reconstruction: Tensor | None = None
    """(B, 3, H, H), 0..1, of hidden images that have looked at whole texts."""
    itm_logits: Tensor | None = None
    """(B, 2), that whole text and whole image do not match, and that they do."""
    image_embeds: Tensor | None = None
    """(B, E), of length 1."""
    text_embeds: Tensor | None = None
    """(B, E), of length 1."""
    logits_per_image: Tensor | None = None
    """(B, B) similarity of every image and every text, over the temperature."""


class MaskVlmPreTrainedModel(PreTrainedModel):
    """What both models share. `maskvlm` is the model as it was trained."""

    config_class = MaskVlmConfig
    config: MaskVlmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    maskvlm: MaskVlmEncoder

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint lacks (`transformers` skips what it has)."""
        self.maskvlm.initialise(module)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Temperature):
            start = -math.log(self.config.recipe.itc_temperature)
            nn.init.constant_(module.log_factor, start)
        if isinstance(module, maskvlm.MaskVlmForPreTraining) and self.config.mlm_weight:
            nn.init.zeros_(module.mlm_bias)

    def _inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Tensor | None
    ) -> Inputs:
        """The stream of a padded batch. Its lengths are read on the host."""
        if images is not None:
            side = self.config.image_size
            require_images(images, side=side, texts=len(input_ids))
        stream, token_ids = padded_stream(
            input_ids,
            attention_mask,
            n_image=0 if images is None else self.maskvlm.grid**2,
            max_text=self.config.max_text,
        )
        return Inputs(
            stream=stream,
            token_ids=token_ids,
            pixels=torch.zeros(0, device=input_ids.device)
            if images is None
            else images,
            n_masked_words=0,
            n_recon_images=0,
        )

    def _alone(self, images: Tensor) -> Tensor:
        """Hidden states of images without texts."""
        require_images(images, side=self.config.image_size, texts=None)
        return self.maskvlm.encode_images(images)


class MaskVlmModel(MaskVlmPreTrainedModel):
    """The encoders, and the blocks across them that the model was trained with."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"maskvlm\.(mlm_|mim_decoder|mim_norm|mim_pixels|itc_|itm_)"
    ]

    def __init__(self, config: MaskVlmConfig) -> None:
        super().__init__(config)
        self.maskvlm = MaskVlmEncoder(config.recipe, **config.sizes)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> MaskVlmModelOutput:
        """Hidden states of texts, of images, or of both and of each with the other.

        Args:
            input_ids: (B, L), [CLS] first; None for images alone.
            attention_mask: (B, L), 0 where padding, which is on the right.
            pixel_values: (B, 3, H, H), from -1 to 1; None for texts alone.
        """
        if input_ids is None:
            if pixel_values is None:
                raise ValueError("give input_ids, pixel_values or both")
            return MaskVlmModelOutput(image_hidden_state=self._alone(pixel_values))
        inputs = self._inputs(input_ids, attention_mask, pixel_values)
        length, stream = input_ids.shape[1], inputs.stream
        both = pixel_values is not None
        encoded = self.maskvlm.encode_pairs(
            inputs, None, _CLEAN._replace(clean_images=both)
        )
        found = MaskVlmModelOutput(
            text_hidden_state=padded_text(encoded.text_td, stream, length)
        )
        if both:
            found.image_hidden_state = encoded.image_bnd
            images, texts = self.maskvlm.look(encoded)
            if images is not None:
                found.image_joint_state = images.view_as(encoded.image_bnd)
            if texts is not None:
                found.text_joint_state = padded_text(texts, stream, length)
        return found


class MaskVlmForPreTraining(MaskVlmPreTrainedModel):
    """The model with the heads of the losses that it was trained with."""

    maskvlm: maskvlm.MaskVlmForPreTraining

    def __init__(self, config: MaskVlmConfig) -> None:
        super().__init__(config)
        self.maskvlm = maskvlm.MaskVlmForPreTraining(config.recipe, **config.sizes)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        text_masked_pos: Tensor | None = None,
    ) -> MaskVlmPreTrainingOutput:
        """What the heads say of pairs, and the losses of what is hidden of them. Images
        or texts alone have their embeddings.

        Args:
            input_ids: (B, L), whole texts, [CLS] first; None for images alone.
            attention_mask: (B, L), 0 where padding, which is on the right.
            pixel_values: (B, 3, H, H), whole images from -1 to 1; None for texts alone.
            bool_masked_pos: (B, P), image positions to hide; asks for MIM.
            text_masked_pos: (B, L), words to hide; asks for MLM.
        """
        model, found = self.maskvlm, MaskVlmPreTrainingOutput()
        if input_ids is None:
            if pixel_values is None:
                raise ValueError("give input_ids, pixel_values or both")
            if bool_masked_pos is not None or text_masked_pos is not None:
                raise ValueError(
                    "what is hidden is restored from the other side: give input_ids too"
                )
            if model.config.itc_weight:
                image = model.itc_image(self._alone(pixel_values)[:, 0])
                found.image_embeds = F.normalize(image.float(), dim=1)
            return found
        inputs = self._inputs(input_ids, attention_mask, pixel_values)
        both = pixel_values is not None
        clean = model.encode_pairs(inputs, None, _CLEAN._replace(clean_images=both))
        self._align(found, clean, both=both)
        if pixel_values is None:
            return found
        n_image, pairs = model.grid**2, len(input_ids)
        none = torch.zeros(pairs, n_image, dtype=torch.bool, device=input_ids.device)
        if text_masked_pos is not None and model.config.mlm_weight:
            # Position 0 of a mask is the first token after [CLS].
            masks = _masks(text_masked_pos[:, 1:], none)
            self._words(found, inputs, masks, input_ids)
        if bool_masked_pos is not None and model.config.mim_weight:
            masks = _masks(none[:, :1], bool_masked_pos.flatten(1))
            self._images(found, inputs, masks, pixel_values)
        keys = model.config
        found.loss = weighted(
            [(keys.mlm_weight, found.mlm_loss), (keys.mim_weight, found.mim_loss)]
        )
        return found

    def _align(
        self, found: MaskVlmPreTrainingOutput, clean: Encoded, *, both: bool
    ) -> None:
        """Embeddings, similarities and matching of whole pairs."""
        model = self.maskvlm
        pairs = clean.stream.pairs
        if model.config.itc_weight:
            text = clean.text_td.index_select(0, clean.text.starts[:pairs])
            found.text_embeds = F.normalize(model.itc_text(text).float(), dim=1)
        if both and model.config.itc_weight:
            image, _ = model.project(clean)
            found.image_embeds = F.normalize(image.float(), dim=1)
            assert found.text_embeds is not None
            similarity = found.image_embeds @ found.text_embeds.T
            found.logits_per_image = model.itc_temperature() * similarity
        if both and model.config.itm_weight:
            own = torch.arange(pairs, device=clean.text_td.device)
            found.itm_logits = model.matching_logits(clean, own, own)

    def _words(
        self,
        found: MaskVlmPreTrainingOutput,
        inputs: Inputs,
        masks: Masks,
        input_ids: Tensor,
    ) -> None:
        """MLM."""
        model, stream = self.maskvlm, inputs.stream
        joint = model.encode(inputs, masks)
        assert joint.text is not None
        every = torch.arange(stream.text_used, device=input_ids.device)
        logits_kv = model.word_logits(joint.text.at(every))
        hidden_k = maskvlm.masked_words(stream, masks)[: stream.text_used]
        nll_k = F.cross_entropy(
            logits_kv.float(), inputs.token_ids[: stream.text_used], reduction="none"
        )
        found.mlm_loss = (nll_k * hidden_k).sum() / hidden_k.sum().clamp(min=1)
        found.prediction_logits = padded_text(logits_kv, stream, input_ids.shape[1])

    def _images(
        self,
        found: MaskVlmPreTrainingOutput,
        inputs: Inputs,
        masks: Masks,
        pixel_values: Tensor,
    ) -> None:
        """MIM."""
        model = self.maskvlm
        joint = model.encode(inputs, masks)
        every = torch.arange(inputs.stream.pairs, device=pixel_values.device)
        images = model.decode_images(joint, inputs, every)
        error = (images - (pixel_values.float() + 1) / 2).abs().mean(1)
        squares = model.squares(error) * masks.image
        pixels = masks.image.sum() * model.config.patch_size**2
        found.mim_loss = squares.sum() / pixels.clamp(min=1)
        found.reconstruction = images


def _masks(text: Tensor, image: Tensor) -> Masks:
    mode = torch.full((len(text),), int(Mode.LIGHT), device=text.device)
    return Masks(mode=mode, text=text.bool(), image=image.bool())


def from_trained(model: maskvlm.MaskVlmForPreTraining) -> MaskVlmForPreTraining:
    """The same model, with the same parameters in memory, as `transformers` has it."""
    with torch.device("meta"):
        wrapped = MaskVlmForPreTraining(MaskVlmConfig.of(model))
    wrapped.maskvlm = model
    return wrapped


AutoConfig.register(MaskVlmConfig.model_type, MaskVlmConfig, exist_ok=True)
AutoModel.register(MaskVlmConfig, MaskVlmModel, exist_ok=True)
AutoModelForPreTraining.register(MaskVlmConfig, MaskVlmForPreTraining, exist_ok=True)
