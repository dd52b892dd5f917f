"""Keys of the MaskVLM model, and what the trainer asks of them.

Owns names, defaults, checks and the answers that need no weights. Does not own the
model (`trainer.models.maskvlm`), its FLOPs (`trainer.models.maskvlm_flops`) or the
checkpoints that it may start from (`trainer.models.vit_roberta`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from trainer.dropout import Stack, require_dropout, stacks
from trainer.mask_config import MaskConfig
from trainer.models import maskvlm_flops
from trainer.models.base import Figure, ModelConfig, Sizes, Term

if TYPE_CHECKING:
    from trainer.flops import Work
    from trainer.masking import MaskCounts
    from trainer.models.alignment import Candidates
    from trainer.models.maskvlm import MaskVlmForPreTraining
    from trainer.tasks.bodies import Body, Pooling
    from trainer.tasks.retrieval import RetrievalTraining
    from trainer.tasks.retrievers import RetrievalModel

_MISMATCHED = 0.5
_COUNTED = (
    *("image_layers", "text_layers", "width", "heads", "ffn_width", "patch_size"),
    *("cross_layers", "decoder_layers", "projection_width"),
)
_WEIGHTS = ("itc_weight", "itm_weight", "mlm_weight", "mim_weight")


_PARTS = MappingProxyType(
    {
        "words": "word embeddings",
        "text_positions": "positions",
        "image_positions": "positions",
        "image_cls": "positions",
        "patches": "patch embedding",
        "embedding_norm": "text encoder",
        "text_blocks": "text encoder",
        "text_norm": "text encoder",
        "image_blocks": "image encoder",
        "image_norm": "image encoder",
        "mim_mask": "image encoder",
        **dict.fromkeys(("text_cross", "text_cross_norm"), "text looks at images"),
        **dict.fromkeys(("image_cross", "image_cross_norm"), "image looks at texts"),
        **dict.fromkeys(("mim_decoder", "mim_norm", "mim_pixels"), "image decoder"),
        **dict.fromkeys(("mlm_dense", "mlm_norm", "mlm_bias"), "MLM head"),
        **dict.fromkeys(("itc_image", "itc_text", "itc_temperature"), "ITC head"),
        "itm_head": "ITM head",
    }
)


@dataclass(frozen=True, kw_only=True)
class MaskVlmConfig(ModelConfig):
    """The MaskVLM model."""

    image_loss: ClassVar[str] = "mim"
    body_keys: ClassVar[tuple[str, ...]] = ("image_body", "text_body")
    unshaped: ClassVar[tuple[str, ...]] = (
        "heads",
        "text_norm",
        "image_norm_eps",
        "text_norm_eps",
    )
    optional: ClassVar[tuple[str, ...]] = (
        *("image_cross", "text_cross", "mim_", "mlm_", "itc_", "itm_"),
    )

    parts: ClassVar[Mapping[str, str]] = _PARTS

    name: Literal["maskvlm"] = "maskvlm"
    """Which model this is; the other keys are its own."""
    image_layers: int = 4
    """Layers of the image encoder, a ViT (the paper's: 12)."""
    text_layers: int = 4
    """Layers of the text encoder, in RoBERTa's shape (the paper's: 12)."""
    width: int = 128
    """Width of all streams (the paper's: 768)."""
    heads: int = 4
    """Attention heads; they divide the width."""
    ffn_width: int = 512
    """Width inside the feed-forward layers."""
    patch_size: int = 16
    """Pixels on a side of the square that an image token covers."""
    cross_layers: int = 3
    """Blocks of each modality's cross-modality encoder."""
    decoder_layers: int = 3
    """Cross-attention blocks of the image decoder."""
    text_norm: Literal["post", "pre"] = "post"
    """LayerNorm of the text encoder after each residual (RoBERTa) or before each
    branch, as in the image encoder and in all blocks across modalities."""
    image_norm_eps: float = 1e-12
    """Epsilon of LayerNorm in the image encoder, its blocks across modalities and the
    decoder (ViT's)."""
    text_norm_eps: float = 1e-5
    """The same of the text encoder and its blocks across modalities (RoBERTa's;
    BERT's is 1e-12)."""
    projection_width: int = 256
    """Width in which images and texts are compared."""
    itc_temperature: float = 0.07
    """Temperature of the contrastive loss at the beginning; it is learned, between 0.01
    and 1."""
    itc_weight: float = 1.0
    """Weight of the image-text contrastive loss over the global batch; 0: none, and
    negatives for matching are drawn evenly."""
    itm_weight: float = 1.0
    """Weight of the image-text matching loss; 0: none. A pair is passed through the
    cross-modality encoders three times for it."""
    mlm_weight: float = 1.0
    """Weight of masked language modelling; 0: it is not computed."""
    mim_weight: float = 1.0
    """Weight of masked image modelling, the mean absolute error of RGB values in 0..1
    over masked pixels; 0: it is not computed."""
    itm_group: int = 8
    """Pairs of a step that stand together: negatives for matching are drawn among them.
    Micro-batches hold whole groups."""
    dropout: float = 0.0
    """Share of the channels that are dropped in pretraining, as in BERT and ViLT (0.1
    there): of the embeddings (of texts after their LayerNorm), and of what attention
    and the MLP of each layer add to the residual. Attention's probabilities are not
    dropped: unpadded attention has none to drop from. What is dropped follows from
    seed, epoch and sample, like the masks. Nothing is in evaluation and in
    fine-tuning."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    image_body: str | None = None
    """ViT checkpoint of Hugging Face (a directory, or a hub name such as
    google/vit-base-patch16-224-in21k) that the image encoder starts from, its positions
    interpolated to `image.size`; null: from the seed. Not looked at when a run is
    resumed."""
    text_body: str | None = None
    """RoBERTa or BERT checkpoint of Hugging Face (a directory, or a hub name such as
    roberta-base) that the text encoder and the MLM head start from; null: from the
    seed. Not looked at when a run is resumed."""

    def __post_init__(self) -> None:
        for name in _COUNTED:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be 1 or more")
        for name in (*_WEIGHTS, "init_std", "image_norm_eps", "text_norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must not be negative")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(
                f"all of model.{', '.join(_WEIGHTS)} are 0: nothing would be learned"
            )
        if not 0.01 <= self.itc_temperature <= 1:
            raise ValueError(
                f"model.itc_temperature {self.itc_temperature} is not between 0.01 and "
                "1"
            )
        if self.itm_group < 2:
            raise ValueError(
                f"model.itm_group {self.itm_group} leaves a text no other image: give "
                "2 or more"
            )
        if self.width % self.heads:
            raise ValueError(
                f"model.heads {self.heads} does not divide model.width {self.width}"
            )
        if self.text_body and self.text_norm == "pre":
            raise ValueError(
                f"model.text_body {self.text_body} has to be a RoBERTa or BERT, which "
                "are post-norm: give --model.text_norm post, or --model.text_body null "
                "to start from the seed"
            )
        require_dropout(
            self.dropout,
            self.dropout_stacks.values(),
            cure="model.image_layers, text_layers, cross_layers or decoder_layers",
        )

    @property
    def group(self) -> int:
        """Consecutive pairs of a step that the model needs in one micro-batch."""
        return self.itm_group if self.itm_weight else 1

    @property
    def contrastive(self) -> bool:
        """There is a contrastive loss."""
        return self.itc_weight > 0

    @property
    def drops(self) -> bool:
        """There is dropout."""
        return self.dropout > 0

    @property
    def dropout_stacks(self) -> Mapping[str, Stack]:
        """Sites by what they are of. Both encoders see a pair clean and masked; those
        across modalities see it masked, and for ITM three times whole.
        """
        image, text = self.image_layers, self.text_layers
        across = (3 * self.cross_layers, 4 if self.itm_weight else 1)
        sizes = {
            "image": (1 + 2 * image, 2),
            "text": (1 + 2 * text, 2),
            "image_cross": across,
            "text_cross": across,
            "mim_decoder": (2 * self.decoder_layers, 1),
        }
        return dict(zip(sizes, stacks(sizes.values()), strict=True))

    @property
    def mismatched(self) -> float | None:
        """Half of the held-out texts are shown with another's image."""
        return _MISMATCHED if self.itm_weight else None

    @property
    def restores(self) -> tuple[str, ...]:
        """Words and pixels, as far as their losses have a weight and so a head."""
        weights = {self.word_loss: self.mlm_weight, self.image_loss: self.mim_weight}
        return tuple(name for name, weight in weights.items() if weight)

    @property
    def terms(self) -> tuple[Term, ...]:
        """`mlm`: negative log likelihood over masked words; `mim`: absolute error over
        masked pixels, the mean of their channels; both 0 where their weight is. And,
        where their weights are not 0, `itc`, of pairs, and `itm`, the mean over what a
        pair is shown with.
        """
        terms: tuple[Term, ...] = (
            Term("mlm", self.mlm_weight, "masked_words"),
            Term("mim", self.mim_weight, "recon_pixels"),
        )
        if self.itc_weight:
            terms += (Term("itc", self.itc_weight, "pairs"),)
        if self.itm_weight:
            terms += (Term("itm", self.itm_weight, "pairs"),)
        return terms

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Masked words whose most likely token is the true one; how often an image is
        most similar to its own text in the global batch, and the reverse, and the
        temperature; how often what is shown is rightly said to match or not.
        """
        figures: tuple[Figure, ...] = (Figure("mlm_accuracy", "masked_words"),)
        if self.itc_weight:
            names = ("image_to_text_r1", "text_to_image_r1", "temperature")
            figures += tuple(Figure(f"itc_{name}", "pairs") for name in names)
        if self.itm_weight:
            figures += (Figure("itm_accuracy", "pairs"),)
        return figures

    @classmethod
    def masks(cls) -> MaskConfig:
        """Of every pair 60 % of the image, in squares of 2 x 2 positions (32 pixels
        where a position has 16), and 30 % of the text; each restored with the other
        modality whole (Kwon et al., 2023).
        """
        return MaskConfig(
            mode_probabilities=(0.0, 0.0, 1.0),
            light_image_rate=0.6,
            light_text_rate=0.3,
            image_block=2,
        )

    def build(self, sizes: Sizes) -> MaskVlmForPreTraining:
        """The model."""
        from trainer.models.maskvlm import MaskVlmForPreTraining

        return MaskVlmForPreTraining(self, **sizes._asdict())

    def item_body(self, model: MaskVlmForPreTraining, *, pooling: Pooling) -> Body:
        """As `ModelConfig.item_body`."""
        from trainer.tasks.body_maskvlm import MaskVlmBody

        return MaskVlmBody(model, pooling=pooling)

    def ranker(
        self, model: MaskVlmForPreTraining, tuned: RetrievalTraining | None
    ) -> RetrievalModel:
        """As `ModelConfig.ranker`."""
        from trainer.tasks.retrieval_maskvlm import MaskVlmRetrieval

        matching = tuned is None or tuned.matching
        return MaskVlmRetrieval(model, whole=tuned is not None, matching=matching)

    def matching(
        self,
        *,
        seed: int,
        epochs: Tensor,
        uids: Tensor,
        images: Tensor,
        captions: Callable[[], Tensor],
    ) -> Candidates | None:
        """Who may be whose negative, and the bits to draw them with."""
        from trainer.models.alignment import Candidates, drawn_candidates

        if not self.itm_weight:
            return Candidates(images) if self.itc_weight else None
        return drawn_candidates(
            group=self.itm_group,
            seed=seed,
            epochs=epochs,
            uids=uids,
            images=images,
            captions=captions(),
        )

    def scored_positions(self, masked: MaskCounts, n_image: int) -> Tensor:
        """Masked words (B,), and all of an image that has a masked position, where
        there is a loss of them.
        """
        found = masked.text * bool(self.mlm_weight)
        return found + (masked.image > 0) * (n_image * bool(self.mim_weight))

    def recon_pixels(self, masked: Tensor, n_image: int) -> Tensor:
        """Pixels (B,) of `masked` (B,) positions."""
        return masked * self.patch_size**2

    def forward_flops(
        self, work: Work, *, vocab_size: int, image_size: int
    ) -> dict[str, float]:
        """FLOPs of a forward pass by part."""
        return maskvlm_flops.forward_flops(
            self, work, vocab_size=vocab_size, image_size=image_size
        )

    def pixel_flops(self, work: Work, *, image_size: int) -> float:
        """Those of the patches' embedding."""
        return maskvlm_flops.patch_flops(self, image_size) * work.pairs

    def require_bodies(self, sizes: Sizes, tokenizer_file: Path) -> None:
        """Raise ValueError unless `image_body` and `text_body`, if given, fit."""
        from trainer.models.vit_roberta import require_image_fit, require_text_fit

        if self.image_body:
            require_image_fit(self.image_body, self)
        if self.text_body:
            require_text_fit(self.text_body, self, sizes, tokenizer_file)

    def read_bodies(self, sizes: Sizes) -> dict[str, Tensor]:
        """Weights of `image_body` and `text_body`."""
        from trainer.models.vit_roberta import read_image_body, read_text_body

        weights: dict[str, Tensor] = {}
        if self.image_body:
            grid = sizes.image_size // self.patch_size
            weights |= read_image_body(self.image_body, grid=grid)
        if self.text_body:
            found = read_text_body(self.text_body, max_text=sizes.max_text)
            if not self.mlm_weight:
                found = {k: v for k, v in found.items() if not k.startswith("mlm_")}
            weights |= found
        return weights
