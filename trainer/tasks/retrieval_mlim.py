"""MLIM for retrieval: its matching head on pairs, and a cheap first stage.

Owns the head and the projections that fine-tuning adds. Does not own the encoder
(`trainer.models.mlim`), the loss (`trainer.tasks.retrievers`) or what is ranked
(`trainer.tasks.retrieval`).

MLIM has one stream, so a score of a pair takes a pass of both through the transformer.
For the first stage image and text go through it alone, and their [CLS] are projected.

Shapes: B items or pairs, U images, P image tokens, D width, F features, N rows of a
stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.base import Inputs
from trainer.models.mlim import MlimForPreTraining
from trainer.models.scored_rows import first_rows
from trainer.stream import Stream, pack
from trainer.tasks.retrievers import RetrievalModel, TextState

_TEMPERATURE = 0.07
_MOST_SCALE = 100.0


class MlimRetrieval(RetrievalModel):
    """A pretrained MLIM that ranks.

    Args:
        encoder: the pretrained model.
        features: F; 0: as it was pretrained, by its ITM head alone.
        matching: false: by features alone; an ITM head is left alone.

    Raises:
        ValueError: 0 features and no ITM head.
    """

    def __init__(
        self, encoder: MlimForPreTraining, *, features: int, matching: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.has_features, self.has_pair_scores = features > 0, matching
        self.feature_width = features
        if not features:
            if encoder.itm_head is None:
                raise ValueError(
                    "this MLIM was pretrained without matching and cannot rank as it "
                    "is: fine-tune it (python -m trainer.finetune RUN --task "
                    "retrieval --output OUT), or pretrain with --model.itm_weight 1"
                )
            return
        width = encoder.config.width
        self.image_projection = nn.Linear(width, features)
        self.text_projection = nn.Linear(width, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / _TEMPERATURE)))
        added = [self.image_projection, self.text_projection]
        if matching and (encoder.itm_pooler is None or encoder.itm_head is None):
            encoder.itm_pooler = nn.Linear(width, width)
            encoder.itm_head = nn.Linear(width, 2)
            added += [encoder.itm_pooler, encoder.itm_head]
        for module in added:
            encoder.initialise(module)

    @property
    def pretrained(self) -> MlimForPreTraining:
        """As `RetrievalModel.pretrained`."""
        return self.encoder

    def image_states(self, pixels: np.ndarray) -> Tensor:
        """uint8 (U, S, S, 3) -> image embeddings (U, P, D)."""
        moved = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        return self.encoder.embed_pixels(moved)

    def image_features(self, states: Tensor) -> Tensor:
        """As `RetrievalModel.image_features`."""
        # [CLS] [SEP], which every caption begins and ends with, and no word.
        ids = self.encoder.ids_by_name
        nothing = np.array([ids["cls"], ids["sep"]], dtype=np.int64)
        cls_bd = self._cls([nothing] * len(states), states)
        return F.normalize(self.image_projection(cls_bd).float(), dim=1)

    def text_features(self, states: Sequence[TextState]) -> Tensor:
        """As `RetrievalModel.text_features`."""
        cls_bd = self._cls(states, None)
        return F.normalize(self.text_projection(cls_bd).float(), dim=1)

    def scale(self) -> Tensor:
        """As `RetrievalModel.scale`; bounded as CLIP's."""
        return self.log_scale.exp().clamp(max=_MOST_SCALE)

    def matching_logits(
        self, states: Tensor, image_of: Tensor, texts: Sequence[TextState]
    ) -> Tensor:
        """As `RetrievalModel.matching_logits`."""
        hidden_nd, stream = self._encode(texts, states.index_select(0, image_of))
        return self.encoder.matching_logits(hidden_nd, stream).float()

    def _cls(self, texts: Sequence[TextState], image_bpd: Tensor | None) -> Tensor:
        """Last hidden state (B, D) of each [CLS]."""
        hidden_nd, stream = self._encode(texts, image_bpd)
        # A pair's segment begins with [CLS].
        return hidden_nd.index_select(0, stream.cu_seqlens[: stream.pairs])

    def _encode(
        self, texts: Sequence[TextState], image_bpd: Tensor | None
    ) -> tuple[Tensor, Stream]:
        """Last hidden states (N, D) of rows with every [CLS] among them, and the stream
        that says where.
        """
        n_image = 0 if image_bpd is None else image_bpd.shape[1]
        lengths = np.array([len(text) for text in texts])
        ids = np.concatenate([np.asarray(text) for text in texts])
        stream, token_ids = pack(lengths, ids, n_image)
        inputs = Inputs(
            stream=stream.to(self.device),
            token_ids=token_ids.to(self.device),
            # Not looked at: embedded already, or none.
            pixels=token_ids,
            n_masked_words=0,
            n_recon_images=0,
        )
        rows = first_rows(inputs.stream)
        hidden_nd = self.encoder.encode(inputs, None, image_bpd, rows)
        return hidden_nd, inputs.stream if rows is None else rows.of(inputs.stream)
