"""What a training step keeps in a device's memory, estimated before there is a device.

Owns the estimate, by ZeRO stage. Does not own how large a batch is
(`trainer.plan_data`) or how much a device has (`trainer.gpus`).

It follows what DeepSpeed 0.19 and autograd hold, tensor by tensor; what it leaves out
is the CUDA context, NCCL's buffers, workspaces of kernels and fragmentation, for which
`trainer.plan` leaves headroom.

Bytes. Shapes: B pairs, T stream rows, M masked words, R images to reconstruct, P
parameters, W ranks, e bytes of a number.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.models.mlim import MlimConfig

# DeepSpeed's defaults, in elements: gradients are reduced in a buffer of this size, and
# stage 3 keeps gathered weights that are used again within so many.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
_FP32 = 4
_ADAM = 8


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a micro-batch as the model sees it."""

    pairs: int
    """B."""
    rows: int
    """T, padding included."""
    table: int
    """Places that attention in fp32 has for its rows: on a GPU those of a padded table,
    on a CPU, which goes from segment to segment, T."""
    masked_words: int
    """M, a capacity."""
    recon_images: int
    """R, a capacity."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What one micro-batch keeps for its backward pass, and what that takes besides."""

    embedder: int
    """Of the convolutions on the images."""
    blocks: int
    """Of all transformer layers."""
    checkpointed: int
    """The same where each layer is computed again: its input, and one layer whole."""
    ends: int
    """MLM head and decoder at their worst moment, the logits' gradients included."""

    def total(self, *, checkpointing: bool) -> int:
        """At the worst moment of forward and backward."""
        blocks = self.checkpointed if checkpointing else self.blocks
        return self.embedder + blocks + self.ends


@dataclass(frozen=True, kw_only=True)
class States:
    """What a rank holds besides activations, while gradients are made."""

    weights: int
    gradients: int
    buckets: int
    """The buffer that gradients are reduced in, where it is there all the time."""
    master: int
    """fp32 weights beside those that the model computes with."""
    moments: int
    """The two of AdamW."""
    step: int
    """What reducing gradients or the optimizer step takes, whichever is more, when
    activations are gone."""

    @property
    def held(self) -> int:
        """All of it, but for what only the optimizer step takes."""
        return self.weights + self.gradients + self.buckets + self.master + self.moments

    def peak(self, activations: int) -> int:
        """The larger of the backward pass and of what comes after it."""
        return max(self.held + activations, self.held - self.buckets + self.step)


def states(
    parameters: int, *, stage: int, ranks: int, bf16: bool, lazy: bool = False
) -> States:
    """Weights, gradients and optimizer states of a rank.

    Args:
        parameters: P.
        stage: ZeRO stage.
        ranks: W.
        bf16: the model computes in bf16, else in fp32.
        lazy: memory counts once it is written to, as on a CPU, and not once there is a
            buffer for it.
    """
    size = 2 if bf16 else _FP32
    share = -(-parameters // ranks)
    reduced = min(parameters, REDUCE_BUCKET)
    # Gradients of bf16 are added up in fp32, in a copy of what is in the buffer.
    widened = _FP32 * reduced if bf16 and ranks > 1 else 0
    if stage == 0:
        # They are flattened for it once the backward pass has ended.
        flattened = size * reduced + widened if ranks > 1 else 0
        return States(
            weights=size * parameters,
            gradients=size * parameters,
            buckets=0,
            master=_FP32 * parameters if bf16 else 0,
            moments=_ADAM * parameters,
            step=max(flattened, _FP32 * parameters),
        )
    bucket = size * REDUCE_BUCKET
    gathered = size * min(parameters, LIVE_PARAMETERS) if stage == 3 else 0
    return States(
        weights=gathered + size * share if stage == 3 else size * parameters,
        gradients=size * (parameters if stage == 1 else share),
        buckets=0 if lazy else bucket,
        # In fp32 stage 3 steps on the weights themselves; 1 and 2 on a copy.
        master=_FP32 * share if bf16 or stage < 3 else 0,
        moments=_ADAM * share,
        # Its gradients flattened, in fp32, and the root of the second moment.
        step=max(
            (size * reduced if lazy else bucket) + widened,
            (size + _FP32 + _FP32) * share,
        ),
    )


def activations(
    config: MlimConfig, shapes: Shapes, *, vocab_size: int, image_size: int, bf16: bool
) -> Activations:
    """What autograd keeps of a micro-batch (`tests/trainer/test_plan_memory.py` counts
    it).
    """
    layer = _layer(config, shapes, bf16=bf16)
    size = 2 if bf16 else _FP32
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
    head = shapes.masked_words * (4 * width * e + _FP32 * vocab_size)
    maps = _decoder_maps(config, image_size)
    inner = 2 * sum(maps[1:-1]) + maps[0]
    # Sigmoid and the error that is squared, in fp32.
    decoder = shapes.recon_images * (inner * e + 2 * maps[-1] * _FP32)
    return head, decoder


def _layer(config: MlimConfig, shapes: Shapes, *, bf16: bool) -> int:
    """A transformer layer: inputs of both norms or their results, of the four linear
    layers and of GELU; queries, keys, values and mixed values of attention.
    """
    width, rows = config.width, shapes.rows
    outside = rows * (5 * width + 2 * config.ffn_width)
    statistics = 4 * rows * _FP32
    if bf16:
        # The mixed values are the input of the output layer.
        inside = rows * 3 * width * 2
        return outside * 2 + inside + rows * config.heads * _FP32 + statistics
    inside = shapes.table * (4 * width + config.heads) * _FP32
    return outside * _FP32 + inside + statistics


def _last_layer(config: MlimConfig, shapes: Shapes, kept: int, *, bf16: bool) -> int:
    """The last one, of which `kept` rows are read: keys and values of all rows."""
    width, rows, e = config.width, shapes.rows, 2 if bf16 else _FP32
    if kept == rows:
        return _layer(config, shapes, bf16=bf16)
    # Inputs of the norm before keys and values, where there is one, and of these.
    whole = rows * (2 if config.norm == "pre" else 1) * width
    # Inputs of queries, output layer, norms and feed-forward, which has none before it
    # in pre-norm; and the queries.
    of_each = kept * (5 if config.norm == "pre" else 6) * width
    of_each += kept * 2 * config.ffn_width
    statistics = 2 * (kept + (rows if config.norm == "pre" else kept)) * _FP32
    if bf16:
        inside = rows * 2 * width * e + kept * config.heads * _FP32
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
        head + decoder + logits * e + shapes.recon_images * maps[-1] * _FP32,
        # The decoder's backward pass: gradients of a layer's input and result.
        head + decoder + shapes.recon_images * largest * e,
        # The head's: gradients of log-softmax's result and input.
        head + 2 * logits * _FP32,
    )
    return max(moments)
