"""FLOPs of MLIM's forward pass, counted as `trainer.flops` says.

Queries, output projection and feed-forward of the last layer count at the rows that MLM
and RECON read, keys and values at all of them; the decoder counts only where there is a
RECON loss.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.flops import Work
    from trainer.models.mlim_config import MlimConfig


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
