"""Model FLOPs of a training step, and what they say of the devices (MFU).

Owns the formula, for the step that was taken (`trainer.loop`) and for one that is
planned (`trainer.plan`). Does not own what devices could do at best (`trainer.gpus`).

Counted are multiplications and additions of the matrix products and convolutions that
the losses need, embedder, heads and decoder included, over real tokens, masked words
and images to reconstruct. Not counted are padding, and whatever is computed twice
(activation checkpointing): model FLOPs utilisation, not hardware FLOPs utilisation
(Chowdhery et al. 2022, PaLM, appendix B). Nor is what no loss reads and the model
leaves out, so it cannot flatter the utilisation: queries, output projection and
feed-forward of the last layer count at the rows that MLM and RECON read, keys and
values at all of them; the decoder counts only where there is a RECON loss. Norms,
GELU, softmax, gathers and the optimizer step are no products and count nothing.

A product of (m, k) and (k, n) is 2 m k n. The backward pass is two products for each of
the forward one, but for the first convolution, whose input is pixels and needs no
gradient.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.models.mlim import MlimConfig


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


def forward_flops(
    config: MlimConfig, work: Work, *, vocab_size: int, image_size: int
) -> dict[str, float]:
    """FLOPs of a forward pass by part: `transformer` (its linear layers), `attention`
    (scores and mixing), `embedder`, `mlm_head`, `decoder` and, where there is an ITM
    loss, `itm` (a second pass through the transformer, and the head).
    """
    width = config.width
    head = width**2 + width * vocab_size
    images = work.recon_images if config.recon_weight else 0
    n_image = (image_size // config.patch_size) ** 2
    scored = work.masked_words + images * n_image
    found = {
        "transformer": _linear_flops(config, work, scored),
        "attention": _attention_flops(config, work, work.scored_lengths),
        "embedder": sum(embedder_flops(config, image_size)) * work.pairs,
        "mlm_head": 2.0 * head * work.masked_words,
        "decoder": sum(decoder_flops(config, image_size)) * images,
    }
    if config.itm_weight:
        # Of each pair its [CLS] row is read, which attends to all its tokens.
        passed = _linear_flops(config, work, work.pairs)
        passed += _attention_flops(config, work, work.tokens)
        found["itm"] = passed + 2.0 * (width**2 + 2 * width) * work.pairs
    return found


def _linear_flops(config: MlimConfig, work: Work, scored: float) -> float:
    """Of all linear layers, where `scored` rows of the last one are read."""
    width, ffn = config.width, config.ffn_width
    whole = (config.layers - 1) * (4 * width**2 + 2 * width * ffn) * work.tokens
    keys = 2 * width**2 * work.tokens
    return 2.0 * (whole + keys + (2 * width**2 + 2 * width * ffn) * scored)


def _attention_flops(config: MlimConfig, work: Work, last: float) -> float:
    """Of scores and mixing in all layers, the last one over `last` pairs of rows."""
    over = (config.layers - 1) * work.squared_lengths + last
    return 2.0 * 2 * config.width * over


def step_flops(
    config: MlimConfig, work: Work, *, vocab_size: int, image_size: int
) -> float:
    """Model FLOPs of a training step, forward and backward, over all its pairs."""
    forward = forward_flops(config, work, vocab_size=vocab_size, image_size=image_size)
    from_pixels = embedder_flops(config, image_size)[0] * work.pairs
    return 3 * sum(forward.values()) - from_pixels


def utilisation(
    flops: float, *, seconds: float, devices: int, peak: float | None
) -> dict[str, float]:
    """`model_tflops`, TFLOP/s of each device; and `mfu`, their share of its `peak`
    FLOP/s, where that is known.
    """
    per_device = flops / seconds / devices
    found = {"model_tflops": per_device / 1e12}
    return found if peak is None else found | {"mfu": per_device / peak}


def embedder_flops(config: MlimConfig, image_size: int) -> list[float]:
    """FLOPs for one image of each convolution: 2x2 with stride 2, then two 1x1."""
    flops, side = [], image_size
    for before, after in itertools.pairwise((3, *config.embedder_widths)):
        side //= 2
        flops.append(2.0 * side**2 * 4 * before * after)
    for before, after in itertools.pairwise(
        (config.embedder_widths[-1], config.embedder_hidden, config.width)
    ):
        flops.append(2.0 * side**2 * before * after)
    return flops


def decoder_flops(config: MlimConfig, image_size: int) -> list[float]:
    """FLOPs for one image of each transposed convolution, 3x3 and 4x4 with stride 2 in
    turn: every input pixel meets every tap.
    """
    flops, side = [], image_size // config.patch_size
    widths = (config.width, *config.decoder_widths, 3)
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        kernel, stride = (4, 2) if number % 2 else (3, 1)
        flops.append(2.0 * side**2 * kernel**2 * before * after)
        side *= stride
    return flops
