"""What the trainer knows of a model: the interface that each of them implements.

Owns what goes into a model and comes out of it, and the methods of a model's keys that
loader, loop, validation, plan and export call. Does not own any model: each is a file
of this package that defines `CONFIG`, the dataclass of its keys, and is found by its
name (`find`); a recipe takes it by `model.name`.

A model is an `nn.Module` with the attributes `config` and `recompute` and the method
`compile_layers(backend)`. `forward(inputs, masks)` gives an `Output`; without masks,
where its keys are `contrastive`, `Output.features` alone. For probes and pictures it is
`Restoring` what its keys say that it `restores`.

Shapes: B pairs of a micro-batch, G pairs of the global batch, F features of a pair, K
text capacity, S side of an image, L text positions.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from pipeline.config import nearest
from trainer.dropout import Draws
from trainer.mask_config import MaskConfig
from trainer.matching import Matching
from trainer.stream import Stream

if TYPE_CHECKING:
    from trainer.flops import Work
    from trainer.loader import Counts
    from trainer.masking import MaskCounts, Masks
    from trainer.models.mlim import WordScores
    from trainer.plan_memory import Activations, Shapes
    from trainer.tasks.bodies import Body, Pooling
    from trainer.tasks.retrieval import RetrievalTraining
    from trainer.tasks.retrievers import RetrievalModel

_DEFINES = re.compile(r"^CONFIG\b", re.MULTILINE)


@dataclass(frozen=True)
class Term:
    """A loss of a model."""

    name: str
    """As `Output.losses` has it; its metrics are `{name}_loss`, `val_{name}_loss`."""
    weight: float
    count: str
    """Field of `trainer.loader.Counts`, over the global batch, that its sum is divided
    by."""


@dataclass(frozen=True)
class Figure:
    """What else of a model is summed, for metrics alone."""

    name: str
    """As `Output.figures` and metrics have it."""
    count: str
    """As a `Term` has it."""


def means_of(
    summed: Sequence[Term | Figure], sums: Sequence[float], totals: Counts
) -> dict[str, float]:
    """The mean of each term or figure over a step, from their sums and its counts."""
    return {
        each.name: value / max(getattr(totals, each.count), 1)
        for each, value in zip(summed, sums, strict=True)
    }


class Contrast(NamedTuple):
    """What a micro-batch sees of the other pairs of its global batch."""

    gathered: Callable[[Tensor], Tensor]
    """Features (B, F) of the micro-batch -> those of all pairs (G, F), in the order of
    the step and without gradient."""
    first: int
    """Row, among the G, of the first pair of the micro-batch."""


class Inputs(NamedTuple):
    """A micro-batch on the model's device."""

    stream: Stream
    token_ids: Tensor
    """(K,) int64, 0 where padding."""
    pixels: Tensor
    """(B, S, S, 3) uint8."""
    n_masked_words: int
    """Capacity for masked words, counted by the loader."""
    n_recon_images: int
    """Capacity for images with a masked position."""
    matching: Any = None
    """In training what `ModelConfig.matching` drew, on held-out pairs a `Matching`
    whose `image_of` is every pair's own row; None: no ITM loss is wanted."""
    contrast: Contrast | None = None
    """None: no loss over the global batch is wanted."""
    draws: Draws | None = None
    """What dropout follows from; None: nothing is dropped. Only in training is
    anything."""


class Output(NamedTuple):
    """Sums over a micro-batch; the caller divides by the step's global counts."""

    losses: dict[str, Tensor]
    """fp32 sum of each of `ModelConfig.terms`, with a gradient; 0 where it is not
    computed."""
    figures: dict[str, Tensor]
    """Sum of each of `ModelConfig.figures`."""
    by_mode: Tensor
    """(4, 3) fp32, for metrics: loss of words, loss of images, masked words and scored
    image positions of each masking mode (`trainer.by_mode`)."""
    features: Tensor | None = None
    """(B, F) of whole pairs, where nothing else was asked for."""

    @property
    def total(self) -> Tensor:
        """The plain sum of all losses."""
        return torch.stack(list(self.losses.values())).sum()


class Sizes(NamedTuple):
    """What a model is made with besides its keys."""

    vocab_size: int
    special_ids: Mapping[str, int]
    """Ids by name; `mask` is needed."""
    max_text: int
    """Longest text in tokens."""
    image_size: int
    """S."""


class Restoring(Protocol):
    """A model as probes and pictures use it: what it says of masked words and pixels of
    each pair.
    """

    config: Any

    def encode(self, inputs: Inputs, masks: Masks) -> Any:
        """What the other methods need of pairs that are masked."""

    def score_words(self, hidden: Any, inputs: Inputs, masks: Masks) -> WordScores:
        """Loss of every masked word."""

    def score_images(
        self, hidden: Any, inputs: Inputs, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """Pair (R,) and summed loss (R,) of every image with a masked position."""

    def decode_images(self, hidden: Any, inputs: Inputs, image: Tensor) -> Tensor:
        """Reconstructions (R, 3, S, S), 0..1, of the pairs numbered `image` (R,)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Keys of a model. A subclass declares them, `name` first, and what is asked of
    them here.
    """

    name: str
    """Which model this is: the name of its module."""
    patch_key: ClassVar[str] = "model.patch_size"
    """The key that decides `patch_size`, for messages."""
    image_loss: ClassVar[str] = "recon"
    """The term that is of pixels."""
    parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What parameters belong to, by the first part of their name; the name itself
    where there is nothing."""
    word_loss: ClassVar[str] = "mlm"
    """The term that is of words."""
    body_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that name a checkpoint to start from; not looked at when a run is resumed.
    Their names end in `body`."""
    unshaped: ClassVar[tuple[str, ...]] = ()
    """Keys that decide what weights mean and show in no shape."""
    optional: ClassVar[tuple[str, ...]] = ()
    """How names of weights begin that may be in a model or in the weights that it
    starts from alone: they are drawn, or left."""

    @property
    def patch_size(self) -> int:
        """Pixels on a side of the square that an image position covers."""
        raise NotImplementedError

    @property
    def group(self) -> int:
        """Consecutive pairs of a step that the model needs in one micro-batch."""
        return 1

    @property
    def contrastive(self) -> bool:
        """A loss is over the global batch: the model is given a `Contrast`."""
        return False

    @property
    def drops(self) -> bool:
        """Something is dropped in training: the model is given `Draws`."""
        return False

    @property
    def scores_images(self) -> bool:
        """There is a loss of images."""
        return any(term.name == self.image_loss and term.weight for term in self.terms)

    @property
    def mismatched(self) -> float | None:
        """Share of held-out texts that are shown with another pair's image, where the
        model has a loss of matching, `itm`; None where it has none.
        """
        return None

    @property
    def restores(self) -> tuple[str, ...]:
        """`word_loss` and `image_loss`, of which a model has heads for both, trained or
        not; or those of them that it has one for.
        """
        return (self.word_loss, self.image_loss)

    @classmethod
    def masks(cls) -> MaskConfig:
        """Masks of a run whose recipe and flags do not say: those of the model's
        paper.
        """
        return MaskConfig()

    @property
    def terms(self) -> tuple[Term, ...]:
        """Losses, in the order that they are shown in."""
        raise NotImplementedError

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What else is shown."""
        raise NotImplementedError

    def build(self, sizes: Sizes) -> nn.Module:
        """The model, its weights drawn by torch's generator."""
        raise NotImplementedError

    def matching(
        self,
        *,
        seed: int,
        epochs: Tensor,
        uids: Tensor,
        images: Tensor,
        captions: Callable[[], Tensor],
    ) -> Any:
        """What an ITM loss of a micro-batch needs that is drawn by law 1; tensors on
        the device of those given. None without such a loss.

        Args:
            epochs: (B,) int64.
            uids: (B,) int64, the bits of the uint64 uids.
            images: (B,) int64, equal where image files are.
            captions: gives (B, L), equal where captions are.
        """
        return None

    def scored_positions(self, masked: MaskCounts, n_image: int) -> Tensor:
        """Positions (B,) of each pair whose hidden states a loss reads, of `n_image`
        and its words.
        """
        raise NotImplementedError

    def recon_pixels(self, masked: Tensor, n_image: int) -> Tensor:
        """Pixels (B,) that the loss of images is a mean over, of pairs with `masked`
        (B,) of `n_image` positions masked.
        """
        raise NotImplementedError

    def forward_flops(
        self, work: Work, *, vocab_size: int, image_size: int
    ) -> dict[str, float]:
        """FLOPs of a forward pass by part, counted as `trainer.flops` says."""
        raise NotImplementedError

    def pixel_flops(self, work: Work, *, image_size: int) -> float:
        """Those of the first layer on pixels, whose input needs no gradient."""
        raise NotImplementedError

    def activations(self, shapes: Shapes, *, sizes: Sizes, bf16: bool) -> Activations:
        """What a micro-batch keeps for its backward pass: measured on the meta device,
        where a model does not work it out.
        """
        from trainer.models.measured_memory import measured_activations

        return measured_activations(self, shapes, sizes=sizes, bf16=bf16)

    def item_body(self, model: Any, *, pooling: Pooling) -> Body:
        """What turns items into vectors for tasks with a head: matching, VQA, NLVR2,
        SNLI-VE, linear probes.

        Args:
            model: of `build`.

        Raises:
            ValueError: there is none, or it cannot pool so.
        """
        needed = "trainer.tasks.bodies.Body"
        raise self._lacks("item_body", "what stands for an item", needed)

    def ranker(self, model: Any, tuned: RetrievalTraining | None) -> RetrievalModel:
        """What ranks images and texts: retrieval, zero-shot classification.

        Args:
            model: of `build`; it may be changed.
            tuned: keys of the fine-tuning; None: it is as it was pretrained.

        Raises:
            ValueError: it cannot rank. The message has the cure.
        """
        needed = "trainer.tasks.retrievers.RetrievalModel"
        raise self._lacks("ranker", "how images and texts are ranked", needed)

    def _lacks(self, method: str, what: str, needed: str) -> ValueError:
        name = type(self).__name__
        return ValueError(
            f"the model {self.name} does not say {what}: give {name}, in its file "
            f"{self.name}.py, a method `{method}` that makes a {needed}, as "
            "trainer.models.base.ModelConfig describes it"
        )

    @property
    def bodies(self) -> dict[str, str]:
        """Checkpoints to start from, by key."""
        given = {key: getattr(self, key) for key in self.body_keys}
        return {key: value for key, value in given.items() if value}

    def with_bodies(self, bodies: Mapping[str, str | None]) -> Self:
        """The same keys with other checkpoints to start from."""
        changed: dict[str, Any] = dict(bodies)
        return replace(self, **changed)

    def require_bodies(self, sizes: Sizes, tokenizer_file: Path) -> None:
        """Raise ValueError, with the keys to change, unless `bodies` fit the keys, the
        sizes and the words of the dataset's tokenizer. Reads no weights.
        """

    def read_bodies(self, sizes: Sizes) -> dict[str, Tensor]:
        """fp32 weights by name that `bodies` have.

        Raises:
            ValueError: they lack some.
        """
        return {}


def names() -> list[str]:
    """Models that there are."""
    import trainer.models as package

    found = []
    for module in pkgutil.iter_modules(package.__path__):
        spec = module.module_finder.find_spec(module.name, None)
        if spec and spec.origin and _DEFINES.search(Path(spec.origin).read_text()):
            found.append(module.name)
    return found


def find(name: str) -> type[ModelConfig]:
    """The dataclass of a model's keys.

    Raises:
        ValueError: there is no such model.
    """
    known = names()
    if name not in known:
        raise ValueError(
            f"model.name {name!r} is none of {', '.join(known)}.{nearest(name, known)}"
        )
    module = importlib.import_module(f"trainer.models.{name}")
    found: type[ModelConfig] = module.CONFIG
    return found


def as_matched(rows: int, matched: Tensor) -> Matching:
    """A `Matching` of pairs that are shown with the image at their own row."""
    return Matching(torch.arange(rows, device=matched.device), matched)
