"""MaskVLM for retrieval: contrast ranks, matching orders the first ones anew.

Owns how its heads are used on images and texts that are not pairs, and the heads that
fine-tuning adds to a model that was pretrained without them. Does not own the model
(`trainer.models.maskvlm`), the loss (`trainer.tasks.retrievers`) or what is ranked
(`trainer.tasks.retrieval`).

Shapes: B items or pairs, U images, n rows of an image, D width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.maskvlm import MaskVlmForPreTraining
from trainer.models.maskvlm_encoder import Encoded, Passes
from trainer.models.segments import of_texts
from trainer.stream import lay_out, pack
from trainer.tasks.retrievers import RetrievalModel, TextState


class MaskVlmRetrieval(RetrievalModel):
    """A pretrained MaskVLM that ranks, by what it was pretrained with.

    Args:
        model: the pretrained model.
        whole: it is to have both heads, drawn where it has none.
        matching: false: without the head for matching, which is left alone where the
            model has one.

    Raises:
        ValueError: it has neither, and is not to.
    """

    def __init__(
        self, model: MaskVlmForPreTraining, *, whole: bool, matching: bool = True
    ) -> None:
        super().__init__()
        if whole:
            model = with_heads(model, matching=matching)
        self.model = model
        self.has_features = bool(model.config.itc_weight)
        self.feature_width = self.has_features * model.config.projection_width
        self.has_pair_scores = bool(model.config.itm_weight) and matching
        if not (self.has_features or self.has_pair_scores):
            raise ValueError(
                "this MaskVLM was pretrained without contrast and matching and cannot "
                "rank as it is: fine-tune it (python -m trainer.finetune RUN --task "
                "retrieval --output OUT), or pretrain with --model.itc_weight 1 or "
                "--model.itm_weight 1"
            )

    @property
    def pretrained(self) -> MaskVlmForPreTraining:
        """As `RetrievalModel.pretrained`."""
        return self.model

    def image_states(self, pixels: np.ndarray) -> Tensor:
        """uint8 (U, S, S, 3) -> rows (U, n, D) after the image encoder."""
        moved = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        return self.model.encode_images(moved)

    def image_features(self, states: Tensor) -> Tensor:
        """As `RetrievalModel.image_features`."""
        return F.normalize(self.model.itc_image(states[:, 0]).float(), dim=1)

    def text_states(self, texts: Sequence[np.ndarray]) -> list[Tensor]:
        """Rows (length, D) of each text after the text encoder."""
        lengths = np.array([len(text) for text in texts])
        stream, token_ids = pack(lengths, np.concatenate(texts), 0)
        stream = stream.to(self.device)
        ids = [token_ids.to(self.device)]
        text_td = self.model.encode_texts(stream, ids, of_texts(stream))
        return list(text_td[: stream.text_used].split(lengths.tolist()))

    def text_features(self, states: Sequence[TextState]) -> Tensor:
        """As `RetrievalModel.text_features`: of the first row, [CLS]."""
        cls_bd = torch.stack([torch.as_tensor(state)[0] for state in states])
        return F.normalize(self.model.itc_text(cls_bd.to(self.device)).float(), dim=1)

    def scale(self) -> Tensor:
        """As `RetrievalModel.scale`: one over the temperature."""
        return self.model.itc_temperature()

    def matching_logits(
        self, states: Tensor, image_of: Tensor, texts: Sequence[TextState]
    ) -> Tensor:
        """As `RetrievalModel.matching_logits`: the cross-modality encoders and the head
        alone.
        """
        stream = lay_out(np.array([len(text) for text in texts]), 0)
        text_td = torch.cat([torch.as_tensor(text) for text in texts])
        padding = len(stream.text_pair) - len(text_td)
        text_td = F.pad(text_td, (0, 0, 0, padding)).to(self.device)
        stream = stream.to(self.device)
        passes = Passes(clean_images=True, clean_texts=True)
        encoded = Encoded(states, text_td, of_texts(stream), stream, passes)
        every = torch.arange(stream.pairs, device=image_of.device)
        return self.model.matching_logits(encoded, image_of, every).float()


def with_heads(
    model: MaskVlmForPreTraining, *, matching: bool
) -> MaskVlmForPreTraining:
    """The same model with a head for contrast and, where asked for, one for matching
    and blocks across; where it had none, drawn.
    """
    config = model.config
    itm_weight = config.itm_weight or float(matching)
    if config.itc_weight and itm_weight == config.itm_weight:
        return model
    made = MaskVlmForPreTraining(
        # Nothing is dropped here, and dropout's sites may not suffice for more passes.
        replace(
            config,
            itc_weight=config.itc_weight or 1.0,
            itm_weight=itm_weight,
            dropout=0.0,
        ),
        vocab_size=model.words.num_embeddings,
        special_ids=model.ids_by_name,
        max_text=model.text_positions.num_embeddings,
        image_size=model.grid * config.patch_size,
    )
    made.load_state_dict(model.state_dict(), strict=False)
    return made
