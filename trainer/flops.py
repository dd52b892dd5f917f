"""Model FLOPs of a training step, and what they say of the devices (MFU).

Owns what counts, for the step that was taken (`trainer.loop`) and for one that is
planned (`trainer.plan`). Does not own the products of a model (`forward_flops` of its
keys) or what devices could do at best (`trainer.gpus`).

Counted are multiplications and additions of the matrix products and convolutions that
the losses need, embedder, heads and decoder included, over real tokens, masked words
and images to reconstruct. Not counted are padding, and whatever is computed twice
(activation checkpointing): model FLOPs utilisation, not hardware FLOPs utilisation
(Chowdhery et al. 2022, PaLM, appendix B). Nor is what no loss reads and the model
leaves out, so it cannot flatter the utilisation. Norms, GELU, softmax, gathers and the
optimizer step are no products and count nothing.

A product of (m, k) and (k, n) is 2 m k n. The backward pass is two products for each of
the forward one, but for the first convolution, whose input is pixels and needs no
gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.models.base import ModelConfig


class Work(Protocol):
    """What a step's FLOPs depend on besides the model: sums over its pairs, such as
    `trainer.loader.Counts`.
    """

    @property
    def pairs(self) -> float:
        """Pairs, an image each."""

    @property
    def tokens(self) -> float:
        """Tokens, text and image."""

    @property
    def squared_lengths(self) -> float:
        """Sum over pairs of the square of their tokens: attention is inside a pair."""

    @property
    def scored_lengths(self) -> float:
        """Sum over pairs of their tokens times the rows of them that MLM or RECON
        reads: what the last layer's attention is over.
        """

    @property
    def masked_words(self) -> float:
        """Words that the MLM head scores."""

    @property
    def recon_images(self) -> float:
        """Images that the decoder reconstructs."""


def step_flops(
    config: ModelConfig, work: Work, *, vocab_size: int, image_size: int
) -> float:
    """Model FLOPs of a training step, forward and backward, over all its pairs."""
    forward = config.forward_flops(work, vocab_size=vocab_size, image_size=image_size)
    return 3 * sum(forward.values()) - config.pixel_flops(work, image_size=image_size)


def utilisation(
    flops: float, *, seconds: float, devices: int, peak: float | None
) -> dict[str, float]:
    """`model_tflops`, TFLOP/s of each device; and `mfu`, their share of its `peak`
    FLOP/s, where that is known.
    """
    per_device = flops / seconds / devices
    found = {"model_tflops": per_device / 1e12}
    return found if peak is None else found | {"mfu": per_device / peak}
