"""FLOPs of MaskVLM's forward pass, counted as `trainer.flops` says.

Encoders count once for each pass that a loss needs: clean, and masked. Last blocks
across modalities count at the rows that a loss reads. The image decoder counts at all
positions of all images, though MIM reads masked ones alone: the model makes them all.
Texts that are drawn as negatives, and those with many masked words, are taken to be as
long as the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.flops import Work
    from trainer.models.maskvlm_config import MaskVlmConfig

_SHOWN = 3
"""What a pair is passed through the blocks as for ITM: itself and two negatives."""


class _Tokens(NamedTuple):
    """Sums over pairs of a modality."""

    rows: float
    """Tokens."""
    squares: float
    """Squares of their numbers in a pair."""


def forward_flops(
    config: MaskVlmConfig, work: Work, *, vocab_size: int, image_size: int
) -> dict[str, float]:
    """FLOPs of a forward pass by part: `patches`, `image_encoder`, `text_encoder`,
    `cross` (both cross-modality encoders, what they do for ITM included), `decoder`,
    `mlm_head` and `alignment` (projections and the matching head, not similarities).
    """
    width, pairs = config.width, work.pairs
    n_image = (image_size // config.patch_size) ** 2
    image = _Tokens(pairs * (n_image + 1), pairs * (n_image + 1) ** 2)
    words = work.tokens - n_image * pairs
    text = _Tokens(
        words,
        work.squared_lengths - 2 * n_image * work.tokens + n_image**2 * pairs,
    )
    mlm, mim, itm, itc = (
        bool(weight)
        for weight in (
            config.mlm_weight,
            config.mim_weight,
            config.itm_weight,
            config.itc_weight,
        )
    )
    cross = 0.0
    if mim or itm:
        read = mim * image.rows
        cross += _cross_encoder(config, image, text, pairs=pairs, masked=mim, read=read)
    if mlm or itm:
        read = mlm * work.masked_words
        cross += _cross_encoder(config, text, image, pairs=pairs, masked=mlm, read=read)
    decoded = pairs * n_image
    decoder = config.decoder_layers * (
        _across(config, decoded, words, words * n_image) + _ffn(config, decoded)
    )
    pixels = 2.0 * decoded * width * 3 * config.patch_size**2
    head = 2.0 * (width**2 + width * vocab_size) * work.masked_words
    aligned = itc * 2 * width * config.projection_width + itm * _SHOWN * 4 * width
    return {
        "patches": patch_flops(config, image_size) * pairs,
        "image_encoder": config.image_layers
        * ((mlm or itm or itc) + mim)
        * _layer(config, image),
        "text_encoder": config.text_layers
        * ((mim or itm or itc) + mlm)
        * _layer(config, text),
        "cross": cross,
        "decoder": mim * (decoder + pixels),
        "mlm_head": mlm * head,
        "alignment": 2.0 * aligned * pairs,
    }


def patch_flops(config: MaskVlmConfig, image_size: int) -> float:
    """Of the patches' embedding for one image, which masked and clean pass share."""
    return 2.0 * image_size**2 * 3 * config.width


def _layer(config: MaskVlmConfig, own: _Tokens) -> float:
    """A layer of an encoder."""
    width = config.width
    linear = 2.0 * 4 * width**2 * own.rows
    return linear + 4.0 * width * own.squares + _ffn(config, own.rows)


def _ffn(config: MaskVlmConfig, rows: float) -> float:
    return 4.0 * config.width * config.ffn_width * rows


def _across(config: MaskVlmConfig, rows: float, others: float, both: float) -> float:
    """Cross-attention of `rows` queries to `others` rows, whose keys and values are
    made once, over `both` pairs of them.
    """
    width = config.width
    return 2.0 * width**2 * (2 * rows + 2 * others) + 4.0 * width * both


def _cross_encoder(
    config: MaskVlmConfig,
    own: _Tokens,
    other: _Tokens,
    *,
    pairs: float,
    masked: bool,
    read: float,
) -> float:
    """Blocks of a modality, whose last one is read at `read` rows of masked pairs and
    at [CLS] of those that ITM asks about.
    """
    shown = _SHOWN if config.itm_weight else 0
    passes, read = masked + shown, read + shown * pairs
    mean_own, mean_other = own.rows / pairs, other.rows / pairs
    whole = passes * _layer(config, own)
    whole += _across(
        config, passes * own.rows, other.rows, passes * own.rows * mean_other
    )
    last = 2.0 * config.width**2 * (2 * passes * own.rows + 2 * read)
    last += 4.0 * config.width * read * mean_own + _ffn(config, read)
    last += _across(config, read, other.rows, read * mean_other)
    return (config.cross_layers - 1) * whole + last
