"""What a training step of MLIM keeps in memory, estimated before there is a device.

Owns the estimate, tensor by tensor, of what autograd keeps. Does not own weights and
optimizer states (`trainer.plan_memory`).

Bytes. Shapes: T stream rows, M masked words, R images to reconstruct, e bytes of a
number.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from trainer.plan_memory import FP32, Activations, Shapes

if TYPE_CHECKING:
    from trainer.models.mlim_config import MlimConfig


def activations(
    config: MlimConfig, shapes: Shapes, *, vocab_size: int, image_size: int, bf16: bool
) -> Activations:
    """What autograd keeps of a micro-batch (`tests/trainer/test_plan_memory.py` counts
    it).
    """
    layer = _layer(config, shapes, bf16=bf16)
    size = 2 if bf16 else FP32
    stream = size * shapes.rows * config.width
    n_image = (image_size // config.patch_size) ** 2
    # Rows of the last layer, of masked pairs and of whole ones for ITM.
    kept = [shapes.masked_words + shapes.recon_images * n_image]
    kept += [shapes.pairs] if config.itm_weight else []
    kept = [min(rows, shapes.rows) for rows in kept]
    last = sum(_last_layer(config, shapes, rows, bf16=bf16) for rows in kept)
    # The norm before the first layer keeps its input, and so does pre-norm's last one.
    around = stream * len(kept)
    if config.norm == "pre":
        around += size * config.width * sum(kept)
    whole, inputs = (len(kept) * n for n in (config.layers - 1, config.layers))
    return Activations(
        embedder=_embedder(config, image_size, size) * shapes.pairs,
        blocks=whole * layer + last + around,
        checkpointed=inputs * stream + around + layer,
        ends=_ends(
            config, shapes, vocab_size=vocab_size, image_size=image_size, e=size
        ),
    )


def saved_ends(
    config: MlimConfig, shapes: Shapes, *, vocab_size: int, image_size: int, e: int
) -> tuple[int, int]:
    """What MLM head and decoder keep for their backward passes."""
    width = config.width
    # Hidden states, dense layer, its GELU and norm; log-softmax always in fp32.
    head = shapes.masked_words * (4 * width * e + FP32 * vocab_size)
    maps = _decoder_maps(config, image_size)
    inner = 2 * sum(maps[1:-1]) + maps[0]
    # Sigmoid and the error that is squared, in fp32.
    decoder = shapes.recon_images * (inner * e + 2 * maps[-1] * FP32)
    return head, decoder


def _layer(config: MlimConfig, shapes: Shapes, *, bf16: bool) -> int:
    """A transformer layer: inputs of both norms or their results, of the four linear
    layers and of GELU; queries, keys, values and mixed values of attention.
    """
    width, rows = config.width, shapes.rows
    outside = rows * (5 * width + 2 * config.ffn_width)
    statistics = 4 * rows * FP32
    if bf16:
        # The mixed values are the input of the output layer.
        inside = rows * 3 * width * 2
        return outside * 2 + inside + rows * config.heads * FP32 + statistics
    inside = shapes.table * (4 * width + config.heads) * FP32
    return outside * FP32 + inside + statistics


def _last_layer(config: MlimConfig, shapes: Shapes, kept: int, *, bf16: bool) -> int:
    """The last one, of which `kept` rows are read: keys and values of all rows."""
    width, rows, e = config.width, shapes.rows, 2 if bf16 else FP32
    if kept == rows:
        return _layer(config, shapes, bf16=bf16)
    # Inputs of the norm before keys and values, where there is one, and of these.
    whole = rows * (2 if config.norm == "pre" else 1) * width
    # Inputs of queries, output layer, norms and feed-forward, which has none before it
    # in pre-norm; and the queries.
    of_each = kept * (5 if config.norm == "pre" else 6) * width
    of_each += kept * 2 * config.ffn_width
    statistics = 2 * (kept + (rows if config.norm == "pre" else kept)) * FP32
    if bf16:
        inside = rows * 2 * width * e + kept * config.heads * FP32
    else:
        inside = rows * 2 * width * e + kept * (width + config.heads) * e
        # On a table there are all rows again.
        inside += (shapes.table - rows) * (4 * width + config.heads) * e
    return (whole + of_each) * e + inside + statistics


def _embedder(config: MlimConfig, image_size: int, size: int) -> int:
    """An image's pixels, and each convolution's result before and after its GELU."""
    kept, side = 3 * image_size**2, image_size
    for width in config.embedder_widths:
        side //= 2
        kept += 2 * width * side**2
    return size * (kept + 2 * config.embedder_hidden * side**2)


def _decoder_maps(config: MlimConfig, image_size: int) -> list[int]:
    """Numbers in the decoder's input and in each layer's result, for one image."""
    side = image_size // config.patch_size
    found = [config.width * side**2]
    for number, width in enumerate((*config.decoder_widths, 3)):
        side *= 2 if number % 2 else 1
        found.append(width * side**2)
    return found


def _ends(
    config: MlimConfig, shapes: Shapes, *, vocab_size: int, image_size: int, e: int
) -> int:
    """MLM head and decoder at the worst of three moments."""
    head, decoder = saved_ends(
        config, shapes, vocab_size=vocab_size, image_size=image_size, e=e
    )
    logits = shapes.masked_words * vocab_size
    maps = _decoder_maps(config, image_size)
    largest = max(a + b for a, b in itertools.pairwise(maps))
    moments = (
        # The forward pass ends: the logits are still there, and the target's pixels.
        head + decoder + logits * e + shapes.recon_images * maps[-1] * FP32,
        # The decoder's backward pass: gradients of a layer's input and result.
        head + decoder + shapes.recon_images * largest * e,
        # The head's: gradients of log-softmax's result and input.
        head + 2 * logits * FP32,
    )
    return max(moments)
