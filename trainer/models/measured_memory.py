"""What any model keeps for its backward pass, measured on one without memory.

Owns the measurement: a forward pass on torch's meta device, where tensors have shapes
and no values, and the bytes of what autograd saves there. Does not own what a model
works out for itself (`activations` of its keys) or weights and optimizer states
(`trainer.plan_memory`).

A model must therefore read no value in its forward pass, which training asks of it
anyway: the host would wait for the device. Attention there is that of a padded table,
of pairs that are all as long as the mean one.

Bytes. Shapes: B pairs, L text positions, P image tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.dropout import Draws
from trainer.masking import Masks
from trainer.models.base import Contrast, Inputs, ModelConfig, Sizes
from trainer.models.layers import Block, CrossBlock
from trainer.plan_memory import FP32, Activations
from trainer.stream import lay_out

if TYPE_CHECKING:
    from trainer.plan_memory import Shapes

_SHORTEST = 3


def measured_activations(
    config: ModelConfig, shapes: Shapes, *, sizes: Sizes, bf16: bool
) -> Activations:
    """What a micro-batch keeps, all of it as `blocks`; `ends` are the gradients of the
    words' logits.

    Args:
        shapes: rows are those of B texts and B x P image tokens.
    """
    with torch.device("meta"):
        model: Any = config.build(sizes)
    model = model.to(torch.bfloat16) if bf16 else model
    words = _micro_batch(config, shapes, sizes)
    whole = kept_by_autograd(model, *words)
    model.recompute = True
    least = kept_by_autograd(model, *words)
    layers = sum(isinstance(part, Block | CrossBlock) for part in model.modules())
    return Activations(
        embedder=0,
        blocks=whole,
        checkpointed=least + (whole - least) // max(layers, 1),
        ends=2 * FP32 * shapes.masked_words * sizes.vocab_size,
    )


def kept_by_autograd(model: nn.Module, *words: Any) -> int:
    """Bytes of all tensors of floats that a forward pass saves, weights aside."""
    weights = {_storage(weight) for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and _storage(tensor) not in weights:
            # Held, or another tensor could get the same place.
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*words)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _micro_batch(
    config: ModelConfig, shapes: Shapes, sizes: Sizes
) -> tuple[Inputs, Masks]:
    """A micro-batch of these shapes without values, its texts all of one length."""
    pairs, side = shapes.pairs, sizes.image_size
    n_image = (side // config.patch_size) ** 2
    length = max((shapes.rows - pairs * n_image) // pairs, _SHORTEST)
    stream = lay_out(np.full(pairs, length), n_image).to(torch.device("meta"))
    with torch.device("meta"):
        number = torch.zeros(pairs, dtype=torch.int64)
        table = torch.zeros(pairs, sizes.max_text, dtype=torch.int64)
        inputs = Inputs(
            stream=stream,
            token_ids=torch.zeros_like(stream.text_pair),
            pixels=torch.zeros(pairs, side, side, 3, dtype=torch.uint8),
            n_masked_words=max(shapes.masked_words, 1),
            n_recon_images=max(shapes.recon_images, 1),
            matching=config.matching(
                seed=0,
                epochs=number,
                uids=number,
                images=number,
                captions=lambda: table,
            ),
            contrast=Contrast(torch.detach, 0) if config.contrastive else None,
            draws=Draws(0, number, number) if config.drops else None,
        )
        masks = Masks(
            mode=number,
            text=torch.zeros(pairs, length, dtype=torch.bool),
            image=torch.zeros(pairs, n_image, dtype=torch.bool),
        )
    return inputs, masks
