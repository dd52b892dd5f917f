from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.trainer.test_mlim import GRID, LENGTHS, TINY, batch, build, matching
from trainer.masking import Masks
from trainer.models.base import Inputs
from trainer.models.layers import _by_segment, _padded
from trainer.models.mlim import MlimConfig, MlimForPreTraining, masked_words
from trainer.models.scored_rows import Rows, first_rows, keep, scored_rows
from trainer.stream import Stream

Gradients = dict[str, Tensor]


def rows_of(inputs: Inputs, masks: Masks) -> Rows:
    found = scored_rows(
        inputs.stream,
        words_k=masked_words(inputs.stream, masks),
        n_words=inputs.n_masked_words,
        images_b=masks.image.any(1),
        n_images=inputs.n_recon_images,
    )
    assert found is not None
    return found


def gradients(model: MlimForPreTraining, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def whole(
    config: MlimConfig, inputs: Inputs, masks: Masks
) -> tuple[list[float], Gradients]:
    """Losses and gradients of a model that computes every row of its last layer."""
    model = build(config)
    hidden = model.encode(inputs, masks)
    mlm = model.score_words(hidden, inputs, masks).nll.sum()
    recon = model.score_images(hidden, inputs, masks)[1].sum()
    itm = mlm.new_zeros(())
    if inputs.matching:
        image_of, matched = inputs.matching
        images = model.embed_pixels(inputs.pixels)[image_of]
        logits = model.matching_logits(
            model.encode(inputs, None, images), inputs.stream
        )
        itm = torch.nn.functional.cross_entropy(
            logits, matched.to(torch.int64), reduction="sum"
        )
    losses = [float(part.detach()) for part in (mlm, recon, itm)]
    return losses, gradients(model, mlm + recon + itm)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("itm_weight", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_losses_and_gradients_are_those_of_all_rows(
    norm: str, itm_weight: float, recompute: bool
) -> None:
    config = dataclasses.replace(TINY, norm=norm, itm_weight=itm_weight)
    inputs, masks = batch(LENGTHS)
    if itm_weight:
        inputs = inputs._replace(matching=matching(len(LENGTHS)))
    expected, expected_gradients = whole(config, inputs, masks)
    model = build(config)
    model.recompute = recompute
    output = model(inputs, masks)
    sums = [float(loss.detach()) for loss in output.losses.values()]
    assert sums == pytest.approx(expected[: len(sums)], rel=1e-5)
    assert len(sums) == 2 + (itm_weight > 0)
    found = gradients(model, output.total)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1)
        )


def test_the_last_layer_computes_only_rows_that_are_read() -> None:
    model = build(dataclasses.replace(TINY, itm_weight=1))
    inputs, masks = batch(LENGTHS)
    inputs = inputs._replace(matching=matching(len(LENGTHS)))
    seen: list[list[int]] = [[] for _ in model.blocks]
    for number, block in enumerate(model.blocks):
        block.up.register_forward_hook(
            lambda _, args, __, number=number: seen[number].append(len(args[0]))
        )
    model(inputs, masks)
    total = len(inputs.stream.source)
    images = min(inputs.n_recon_images, len(LENGTHS))
    kept = inputs.n_masked_words + images * GRID**2
    assert kept < total
    assert seen == [[total, total], [kept, len(LENGTHS)]]


def test_without_recon_the_decoder_and_its_rows_are_left_out() -> None:
    inputs, masks = batch(LENGTHS)
    both = build()(inputs, masks)
    model = build(dataclasses.replace(TINY, recon_weight=0))
    model.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder ran"))
    seen: list[int] = []
    model.blocks[-1].up.register_forward_hook(
        lambda _, args, __: seen.append(len(args[0]))
    )
    output = model(inputs, masks)
    assert seen == [inputs.n_masked_words]
    torch.testing.assert_close(output.losses["mlm"], both.losses["mlm"])
    torch.testing.assert_close(output.by_mode[[0, 2]], both.by_mode[[0, 2]])
    assert float(output.losses["recon"].detach()) == 0
    assert not output.by_mode[[1, 3]].any()
    output.losses["mlm"].backward()
    assert all(p.grad is None for p in model.decoder.parameters())


def check(rows: Rows, needed: Tensor, stream: Stream) -> None:
    """Assert what `Rows` promise."""
    row = rows.row.tolist()
    assert row == sorted(set(row))
    assert set(needed.nonzero().flatten().tolist()) <= set(row)
    assert torch.equal(rows.place[rows.row], torch.arange(len(row)))
    assert rows.place.min() >= 0
    assert rows.place.max() < len(row)
    bounds = stream.cu_seqlens.tolist()
    inside = [sum(r < bound for r in row) for bound in bounds]
    assert rows.cu_seqlens.tolist() == inside
    assert rows.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_kept_rows_are_the_needed_ones_filled_up_to_the_capacity(share: float) -> None:
    stream = batch(LENGTHS)[0].stream
    total = len(stream.source)
    generator = torch.Generator().manual_seed(0)
    for spare in (0, 1, 7, total):
        needed = torch.rand(total, generator=generator) < share
        count = int(needed.sum()) + spare
        rows = keep(needed, count, stream)
        if count >= total:
            assert rows is None
        else:
            assert rows is not None
            assert len(rows.row) == max(count, 1)
            check(rows, needed, stream)


def test_more_needed_rows_than_were_promised_stay_inside_the_capacity() -> None:
    """A kernel that was told of rows that are not there would read past the end."""
    stream = batch(LENGTHS)[0].stream
    rows = keep(torch.ones(len(stream.source), dtype=torch.bool), 9, stream)
    assert rows is not None
    assert rows.row.tolist() == list(range(9))
    assert int(rows.cu_seqlens[-1]) == 9
    assert int(rows.place.max()) == 8


def test_rows_of_losses_are_masked_words_and_whole_images() -> None:
    inputs, masks = batch(LENGTHS)
    stream = inputs.stream
    rows = rows_of(inputs, masks)
    words = stream.text_row[masked_words(stream, masks)]
    images = stream.image_row[masks.image.any(1)].flatten()
    needed = torch.zeros(len(stream.source), dtype=torch.bool)
    needed[torch.cat([words, images])] = True
    check(rows, needed, stream)
    part = rows.of(stream)
    assert torch.equal(rows.row[part.image_row][masks.image.any(1)].flatten(), images)
    first = first_rows(stream)
    assert first is not None
    assert torch.equal(first.row, stream.cu_seqlens[: stream.pairs].long())


def test_attention_by_segment_is_that_on_a_table() -> None:
    inputs, masks = batch(LENGTHS)
    stream, rows = inputs.stream, rows_of(inputs, masks)
    assert (rows.cu_seqlens.diff() == 0).any()
    first = first_rows(stream)
    for kept in (None, rows, first):
        count = len(stream.source) if kept is None else len(kept.row)
        torch.manual_seed(0)
        results = []
        k, v = torch.randn(2, len(stream.source), 2, 8, dtype=torch.float64)
        q = torch.randn(count, 2, 8, dtype=torch.float64)
        up = torch.randn(count, 2, 8, dtype=torch.float64)
        for attend in (_by_segment, _padded):
            leaves = [part.clone().requires_grad_() for part in (q, k, v)]
            mixed = attend(*leaves, stream, kept)
            results.append([mixed, *torch.autograd.grad(mixed, leaves, up)])
        for by_segment, padded in zip(*results, strict=True):
            torch.testing.assert_close(by_segment, padded)


def test_a_segment_gives_the_same_bits_beside_any_others() -> None:
    """So that results do not depend on how a batch is split."""
    inputs, _ = batch(LENGTHS)
    stream = inputs.stream
    qkv = torch.randn(3, len(stream.source), 2, 8)
    together = _by_segment(*qkv, stream, None)
    bounds = stream.cu_seqlens.tolist()
    for first, last in itertools.pairwise(bounds):
        alone = dataclasses.replace(
            stream, cu_seqlens=torch.tensor([0, last - first], dtype=torch.int32)
        )
        found = _by_segment(*qkv[:, first:last], alone, None)
        assert torch.equal(found, together[first:last])
