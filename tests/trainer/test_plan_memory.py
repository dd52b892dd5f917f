"""The estimate of memory against what autograd keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.trainer import test_maskvlm as maskvlm
from tests.trainer.test_mlim import SIZE, TINY, batch, build, matching
from tests.trainer.test_mlim import V as VOCABULARY
from trainer.models.base import ModelConfig, Sizes
from trainer.models.measured_memory import measured_activations
from trainer.models.mlim_memory import activations, saved_ends
from trainer.plan_memory import (
    REDUCE_BUCKET,
    Shapes,
    states,
)

WIDE = dataclasses.replace(
    TINY, width=128, heads=4, ffn_width=512, decoder_widths=(64, 48, 32)
)


def kept_by_autograd(model: torch.nn.Module, *arguments: object) -> int:
    """Bytes of all tensors of floats that a forward pass saves, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*arguments)
    assert output.losses["mlm"].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("weights", [(1, 0), (1, 1), (0, 0)])
def test_activations_are_what_autograd_keeps(
    norm: str, layers: int, weights: tuple[float, float]
) -> None:
    recon_weight, itm_weight = weights
    chosen = {"recon_weight": recon_weight, "itm_weight": itm_weight}
    config = dataclasses.replace(WIDE, norm=norm, layers=layers, **chosen)
    inputs, masks = batch([12, 20, 7, 16, 9, 18, 20, 11] * 2)
    if itm_weight:
        inputs = inputs._replace(matching=matching(16))
    shapes = Shapes(
        pairs=inputs.stream.pairs,
        rows=len(inputs.stream.source),
        table=len(inputs.stream.source),
        masked_words=inputs.n_masked_words,
        recon_images=min(inputs.n_recon_images, 16) if recon_weight else 0,
    )
    sizes = {"vocab_size": VOCABULARY, "image_size": SIZE}
    found = activations(config, shapes, bf16=False, **sizes)
    ends = saved_ends(config, shapes, e=4, **sizes)
    estimated = found.embedder + found.blocks + sum(ends)
    # Left out are the attention mask and statistics of the norms around the layers.
    assert estimated == pytest.approx(
        kept_by_autograd(build(config), inputs, masks), rel=0.02
    )


def test_stages_share_what_they_are_there_to_share() -> None:
    sizes = {"ranks": 8, "bf16": True}
    one, two, three = (states(8_000_000, stage=n, **sizes) for n in (1, 2, 3))
    assert (one.weights, two.weights) == (16_000_000, 16_000_000)
    assert (one.gradients, two.gradients, three.gradients) == (16e6, 2e6, 2e6)
    for stage in (one, two, three):
        assert (stage.master, stage.moments) == (4_000_000, 8_000_000)
    # Stage 3 keeps gathered weights that are soon used again: all of a small model.
    assert three.weights == 18_000_000
    huge = states(4_000_000_000, stage=3, **sizes)
    assert huge.weights == 2 * 1_000_000_000 + 2 * 500_000_000


def test_the_reduce_buffer_counts_all_the_time_but_on_a_cpu() -> None:
    whole = states(1000, stage=2, ranks=2, bf16=False)
    touched = states(1000, stage=2, ranks=2, bf16=False, lazy=True)
    assert whole.buckets == 4 * REDUCE_BUCKET
    assert touched.buckets == 0
    # Beside weights, gradients, master weights and moments, of which half are shared.
    assert touched.peak(0) == 4000 + 2000 + 2000 + 4000 + 6000


@pytest.mark.parametrize("model", ["mlim", "maskvlm"])
def test_what_any_model_keeps_is_measured_without_memory(model: str) -> None:
    if model == "mlim":
        config: ModelConfig = dataclasses.replace(WIDE, itm_weight=1.0, itm_group=4)
        inputs, masks = batch([14] * 16)
        inputs = inputs._replace(matching=matching(16))
        fresh, sizes = build(config), Sizes(VOCABULARY, {"mask": 4}, 20, SIZE)
    else:
        config = maskvlm.TINY
        inputs, masks = maskvlm.Pairs([14] * 24).micro(config)
        inputs = inputs._replace(contrast=maskvlm.ALONE)
        fresh = maskvlm.build(config)
        sizes = Sizes(maskvlm.V, {"mask": maskvlm.MASK}, 20, maskvlm.SIZE)
    shapes = Shapes(
        pairs=inputs.stream.pairs,
        rows=len(inputs.stream.source),
        table=0,
        masked_words=inputs.n_masked_words,
        recon_images=min(inputs.n_recon_images, inputs.stream.pairs),
    )
    kept = kept_by_autograd(fresh, inputs, masks)
    found = measured_activations(config, shapes, sizes=sizes, bf16=False)
    # Attention without values is that of a padded table, a CPU's goes by segments.
    assert kept < found.blocks < 1.2 * kept
    assert found.checkpointed < found.blocks
    half = measured_activations(config, shapes, sizes=sizes, bf16=True)
    assert half.blocks < 0.8 * found.blocks
