"""Keys of the MLIM model, and what the trainer asks of them.

Owns names, defaults, checks and the answers that need no weights. Does not own the
model (`trainer.models.mlim`), its FLOPs (`trainer.models.mlim_flops`) or its memory
(`trainer.models.mlim_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from trainer.dropout import Stack, require_dropout, stacks
from trainer.matching import Matching, drawn_matching
from trainer.models import mlim_flops
from trainer.models.base import Figure, ModelConfig, Sizes, Term

if TYPE_CHECKING:
    from trainer.flops import Work
    from trainer.masking import MaskCounts
    from trainer.models.mlim import MlimForPreTraining
    from trainer.plan_memory import Activations, Shapes
    from trainer.tasks.bodies import Body, Pooling
    from trainer.tasks.retrieval import RetrievalTraining
    from trainer.tasks.retrievers import RetrievalModel


_PARTS = MappingProxyType(
    {
        "words": "word embeddings",
        "text_positions": "positions",
        "image_positions": "positions",
        "embedder": "image embedder",
        "blocks": "transformer",
        "embedding_norm": "norms around the transformer",
        "final_norm": "norms around the transformer",
        "mlm_dense": "MLM head",
        "mlm_norm": "MLM head",
        "mlm_bias": "MLM head",
        "decoder": "image decoder",
        "itm_pooler": "ITM head",
        "itm_head": "ITM head",
    }
)


@dataclass(frozen=True, kw_only=True)
class MlimConfig(ModelConfig):
    """The MLIM model."""

    patch_key: ClassVar[str] = "2 to the number of model.embedder_widths"
    body_keys: ClassVar[tuple[str, ...]] = ("body",)
    unshaped: ClassVar[tuple[str, ...]] = ("heads", "norm", "norm_eps")
    optional: ClassVar[tuple[str, ...]] = ("itm_",)
    parts: ClassVar[Mapping[str, str]] = _PARTS

    name: Literal["mlim"] = "mlim"
    """Which model this is; the other keys are its own."""
    layers: int = 4
    """Transformer layers."""
    width: int = 128
    """Width of the stream."""
    heads: int = 4
    """Attention heads; they divide the width."""
    ffn_width: int = 512
    """Width inside the feed-forward layers."""
    norm: Literal["post", "pre"] = "post"
    """LayerNorm after each residual (BERT, the paper's body) or before each branch."""
    norm_eps: float = 1e-12
    """Epsilon of LayerNorm (BERT's)."""
    embedder_widths: tuple[int, ...] = (24, 48, 64)
    """Channels of the 2x2 stride-2 convolutions: n of them give tokens of 2^n px."""
    embedder_hidden: int = 96
    """Channels of the first of the two 1x1 convolutions behind them."""
    decoder_widths: tuple[int, ...] = (64, 64, 48, 48, 32)
    """Channels between the decoder's layers, transposed 3x3/1 and 4x4/2 in turn."""
    recon_region: Literal["masked", "whole"] = "masked"
    """RECON over masked squares only, or over whole images that have one."""
    mlm_weight: float = 1.0
    """Weight of the MLM loss."""
    recon_weight: float = 1.0
    """Weight of the RECON loss; 0: it is not computed, and every RECON metric of
    training and validation is 0. Probes measure the decoder nevertheless."""
    itm_weight: float = 0.0
    """Weight of the image-text matching loss, which MLIM does without (the paper
    compares with it); 0: no ITM head. It takes a second pass through the transformer,
    on unmasked pairs, some of whose texts are shown with another pair's image."""
    itm_group: int = 8
    """Pairs of a step that stand together: a text that is not to match gets the image
    of another of them. Micro-batches hold whole groups."""
    itm_mismatched: float = 0.5
    """Share of texts that are shown with another pair's image."""
    dropout: float = 0.0
    """Share of the channels that are dropped in pretraining, as in BERT and ViLT (0.1
    there): of the embeddings after their LayerNorm, and of what attention and the MLP
    of each layer add to the residual. Attention's probabilities are not dropped:
    unpadded attention has none to drop from. What is dropped follows from seed, epoch
    and sample, like the masks. Nothing is in evaluation and in fine-tuning."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    body: str | None = None
    """BERT checkpoint of Hugging Face (a directory, or a hub name such as
    bert-base-uncased) that words, text positions, layers and the MLM head start from;
    null: from the seed. Not looked at when a run is resumed."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "ffn_width", "embedder_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be 1 or more")
        for name in ("embedder_widths", "decoder_widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"model.{name} must hold numbers of 1 or more")
        weights = ("mlm_weight", "recon_weight", "itm_weight")
        for name in (*weights, "init_std", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must not be negative")
        if self.itm_group < 2:
            raise ValueError(
                f"model.itm_group {self.itm_group} leaves a text no other image: give "
                "2 or more"
            )
        if not 0 < self.itm_mismatched < 1:
            raise ValueError(
                f"model.itm_mismatched {self.itm_mismatched} leaves nothing to tell "
                "apart: give a share between 0 and 1, both excluded"
            )
        if self.width % self.heads:
            raise ValueError(
                f"model.heads {self.heads} does not divide model.width {self.width}"
            )
        if self.body and self.norm == "pre":
            raise ValueError(
                f"model.body {self.body} is a BERT, which is post-norm: give "
                "--model.norm post, or --model.body null to start from the seed"
            )
        layers = 2 * len(self.embedder_widths)
        if len(self.decoder_widths) != layers - 1:
            raise ValueError(
                f"model.decoder_widths needs {layers - 1} numbers: two layers for each "
                f"of the {len(self.embedder_widths)} model.embedder_widths, less one"
            )
        require_dropout(self.dropout, [self.dropout_stack], cure="model.layers")

    @property
    def patch_size(self) -> int:
        """Pixels on a side of the square that an image token covers."""
        return 2 ** len(self.embedder_widths)

    @property
    def group(self) -> int:
        """Consecutive pairs of a step that the model needs in one micro-batch."""
        return self.itm_group if self.itm_weight else 1

    @property
    def mismatched(self) -> float | None:
        """Share of held-out texts shown with another's image; None without ITM."""
        return self.itm_mismatched if self.itm_weight else None

    @property
    def drops(self) -> bool:
        """There is dropout."""
        return self.dropout > 0

    @property
    def dropout_stack(self) -> Stack:
        """Sites of embeddings and layers: of masked pairs, and whole ones for ITM."""
        (found,) = stacks([(1 + 2 * self.layers, 1 + bool(self.itm_weight))])
        return found

    @property
    def terms(self) -> tuple[Term, ...]:
        """`mlm`: negative log likelihood over masked words; `recon`: squared error over
        scored pixels, summed over channels, 0 where its weight is; and, where its
        weight is not, `itm`: negative log likelihood that pairs match or do not.
        """
        itm = (Term("itm", self.itm_weight, "pairs"),)
        return (
            Term("mlm", self.mlm_weight, "masked_words"),
            Term("recon", self.recon_weight, "recon_pixels"),
            *(itm if self.itm_weight else ()),
        )

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Masked words whose most likely token is the true one; pairs that are rightly
        said to match or not.
        """
        itm = (Figure("itm_accuracy", "pairs"),)
        return (
            Figure("mlm_accuracy", "masked_words"),
            *(itm if self.itm_weight else ()),
        )

    def build(self, sizes: Sizes) -> MlimForPreTraining:
        """The model."""
        from trainer.models.mlim import MlimForPreTraining

        return MlimForPreTraining(self, **sizes._asdict())

    def item_body(self, model: MlimForPreTraining, *, pooling: Pooling) -> Body:
        """As `ModelConfig.item_body`."""
        from trainer.tasks.body_mlim import MlimBody

        return MlimBody(model, pooling=pooling)

    def ranker(
        self, model: MlimForPreTraining, tuned: RetrievalTraining | None
    ) -> RetrievalModel:
        """As `ModelConfig.ranker`."""
        from trainer.tasks.retrieval_mlim import MlimRetrieval

        if tuned is None:
            return MlimRetrieval(model, features=0)
        features, matching = tuned.features, tuned.matching
        return MlimRetrieval(model, features=features, matching=matching)

    def matching(
        self,
        *,
        seed: int,
        epochs: Tensor,
        uids: Tensor,
        images: Tensor,
        captions: Callable[[], Tensor],
    ) -> Matching | None:
        """Whose image each text is shown with."""
        if not self.itm_weight:
            return None
        return drawn_matching(
            mismatched=self.itm_mismatched,
            group=self.itm_group,
            seed=seed,
            epochs=epochs,
            uids=uids,
            images=images,
            captions=captions(),
        )

    def scored_positions(self, masked: MaskCounts, n_image: int) -> Tensor:
        """Masked words (B,), and all of an image that has a masked position."""
        if not self.recon_weight:
            return masked.text
        return masked.text + (masked.image > 0) * n_image

    def recon_pixels(self, masked: Tensor, n_image: int) -> Tensor:
        """Pixels (B,) that RECON scores, of `masked` (B,) of `n_image` positions."""
        side = self.patch_size**2
        if self.recon_region == "masked":
            return masked * side
        return (masked > 0) * n_image * side

    def forward_flops(
        self, work: Work, *, vocab_size: int, image_size: int
    ) -> dict[str, float]:
        """FLOPs of a forward pass by part."""
        return mlim_flops.forward_flops(
            self, work, vocab_size=vocab_size, image_size=image_size
        )

    def pixel_flops(self, work: Work, *, image_size: int) -> float:
        """Those of the first convolution."""
        return mlim_flops.embedder_flops(self, image_size)[0] * work.pairs

    def activations(self, shapes: Shapes, *, sizes: Sizes, bf16: bool) -> Activations:
        """What a micro-batch keeps for its backward pass."""
        from trainer.models.mlim_memory import activations

        return activations(
            self,
            shapes,
            vocab_size=sizes.vocab_size,
            image_size=sizes.image_size,
            bf16=bf16,
        )

    def require_bodies(self, sizes: Sizes, tokenizer_file: Path) -> None:
        """Raise ValueError unless `body`, if given, fits."""
        if self.body:
            from trainer.models.bert import require_body_fit

            require_body_fit(
                self.body,
                self,
                vocab_size=sizes.vocab_size,
                max_text=sizes.max_text,
                tokenizer_file=tokenizer_file,
            )

    def read_bodies(self, sizes: Sizes) -> dict[str, Tensor]:
        """Weights of `body`."""
        if not self.body:
            return {}
        from trainer.models.bert import read_body

        return read_body(self.body, max_text=sizes.max_text)
