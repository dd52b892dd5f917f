from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.kernels.numbers import interpreted
from tests.trainer.tiny import SMALL_MLIM
from trainer.kernels.take_rows import take_rows_fused, take_rows_ref
from trainer.masking import MaskConfig, Masks, Mode, mam
from trainer.matching import Matching
from trainer.models import mlim
from trainer.models.base import Inputs
from trainer.models.mlim import MlimConfig, MlimForPreTraining, compact, masked_words
from trainer.replacement import Replacement, random_words
from trainer.stream import capacity, lay_out

SIZE, V, MASK = 16, 50, 4
TINY = dataclasses.replace(SMALL_MLIM, width=16, ffn_width=32, embedder_widths=(6, 8))
GRID = SIZE // TINY.patch_size


def build(config: MlimConfig = TINY) -> MlimForPreTraining:
    torch.manual_seed(0)
    model = MlimForPreTraining(
        config,
        vocab_size=V,
        special_ids={"mask": MASK},
        max_text=20,
        image_size=SIZE,
    )
    # Larger weights than a fresh model's, so that wrong rows cannot hide.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(lengths: list[int], seed: int = 0) -> tuple[Inputs, Masks]:
    generator = torch.Generator().manual_seed(seed)
    stream = lay_out(np.array(lengths), GRID**2)
    ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
    ids[: stream.text_used] = torch.randint(
        5, V, (stream.text_used,), generator=generator
    )
    pixels = torch.randint(
        0, 256, (len(lengths), SIZE, SIZE, 3), dtype=torch.uint8, generator=generator
    )
    masks = mam(
        MaskConfig(),
        seed=seed,
        epoch=0,
        uids=torch.arange(len(lengths)) * 7919,
        n_text=stream.n_words,
        text_capacity=max(lengths),
        n_image=GRID**2,
    )
    inputs = Inputs(
        stream=stream,
        token_ids=ids,
        pixels=pixels,
        n_masked_words=capacity(int(masked_words(stream, masks).sum())),
        n_recon_images=capacity(int(masks.image.any(1).sum())),
    )
    return inputs, masks


def one(inputs: Inputs, masks: Masks, pair: int) -> tuple[Inputs, Masks]:
    """A pair of a batch as a batch of its own."""
    mine = (inputs.stream.text_pair == pair) & (
        torch.arange(len(inputs.token_ids)) < inputs.stream.text_used
    )
    stream = lay_out(np.array([int(mine.sum())]), GRID**2)
    ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
    ids[: stream.text_used] = inputs.token_ids[mine]
    row = slice(pair, pair + 1)
    alone = Masks(mode=masks.mode[row], text=masks.text[row], image=masks.image[row])
    return Inputs(
        stream=stream,
        token_ids=ids,
        pixels=inputs.pixels[row],
        n_masked_words=capacity(max(int(masks.text[pair].sum()), 1)),
        n_recon_images=1,
    ), alone


def matching(pairs: int) -> Matching:
    """Every second text with the image before its own."""
    own = torch.arange(pairs)
    other = own % 2 == 1
    return Matching(own - other.to(torch.int64), ~other)


LENGTHS = [7, 2, 12, 9, 3, 15, 8, 6, 4, 11]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_pair_does_not_see_its_neighbours_in_the_stream(norm: str) -> None:
    model = build(dataclasses.replace(TINY, norm=norm))  # type: ignore[arg-type]
    inputs, masks = batch(LENGTHS)
    together = model.encode(inputs, masks)
    bounds = inputs.stream.cu_seqlens
    for pair in range(len(LENGTHS)):
        alone = model.encode(*one(inputs, masks, pair))
        rows = together[int(bounds[pair]) : int(bounds[pair + 1])]
        torch.testing.assert_close(rows, alone[: len(rows)], atol=1e-5, rtol=1e-5)


def test_losses_are_those_of_naive_loops() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    output = model(inputs, masks)
    mlm, recon, correct = 0.0, 0.0, 0
    side = TINY.patch_size
    for pair, length in enumerate(LENGTHS):
        alone_inputs, alone_masks = one(inputs, masks, pair)
        hidden = model.encode(alone_inputs, alone_masks)
        for word in range(length - 2):
            if masks.text[pair, word]:
                target = int(alone_inputs.token_ids[word + 1])
                logits = model.word_logits(hidden[None, word + 1])[0]
                mlm -= float(logits.log_softmax(0)[target].detach())
                correct += int(logits.argmax()) == target
        if masks.image[pair].any():
            grid = hidden[length : length + GRID**2].T.reshape(1, -1, GRID, GRID)
            restored = torch.sigmoid(model.decoder(grid))[0]
            for position in masks.image[pair].nonzero().flatten().tolist():
                top, left = divmod(position, GRID)
                for y in range(top * side, (top + 1) * side):
                    for x in range(left * side, (left + 1) * side):
                        true = inputs.pixels[pair, y, x].float() / 255
                        recon += float(
                            (restored[:, y, x] - true).square().sum().detach()
                        )
    assert float(output.losses["mlm"].detach()) == pytest.approx(mlm, rel=1e-4)
    assert float(output.losses["recon"].detach()) == pytest.approx(recon, rel=1e-4)
    assert int(output.figures["mlm_accuracy"]) == correct


def test_whole_region_scores_every_pixel_of_images_with_a_mask() -> None:
    config = dataclasses.replace(TINY, recon_region="whole")
    model, (inputs, masks) = build(config), batch(LENGTHS)
    hidden = model.encode(inputs, masks)
    expected = 0.0
    for pair in masks.image.any(1).nonzero().flatten():
        restored = model.decode_images(hidden, inputs, pair[None])[0]
        true = inputs.pixels[pair].permute(2, 0, 1).float() / 255
        expected += float((restored - true).square().sum().detach())
    assert float(model(inputs, masks).losses["recon"]) == pytest.approx(
        expected, rel=1e-5
    )
    pixels = config.recon_pixels(masks.counts.image, masks.image.shape[1])
    assert torch.equal(pixels, masks.image.any(1) * SIZE * SIZE)


def test_recon_counts_the_pixels_of_masked_squares() -> None:
    _, masks = batch(LENGTHS)
    expected = masks.image.sum(1) * TINY.patch_size**2
    found = TINY.recon_pixels(masks.counts.image, masks.image.shape[1])
    assert torch.equal(found, expected)


def test_masked_pixels_and_words_cannot_be_seen() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    assert masks.image.any()
    assert masks.text.any()
    side = TINY.patch_size
    hidden = masks.image.view(-1, GRID, GRID)
    hidden = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    pixels = torch.where(hidden, 255 - inputs.pixels, inputs.pixels)
    words = masked_words(inputs.stream, masks)
    ids = torch.where(words, 5 + inputs.token_ids % 7, inputs.token_ids)
    changed = inputs._replace(pixels=pixels, token_ids=ids)
    assert not torch.equal(changed.token_ids, inputs.token_ids)
    before, after = model.encode(inputs, masks), model.encode(changed, masks)
    assert torch.equal(before, after)


def test_visible_pixels_and_words_are_seen() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    before = model.encode(inputs, masks)
    flipped = inputs._replace(pixels=255 - inputs.pixels)
    assert not torch.allclose(before, model.encode(flipped, masks))


def test_capacities_do_not_change_losses_or_gradients() -> None:
    inputs, masks = batch(LENGTHS)
    roomy = inputs._replace(
        n_masked_words=inputs.n_masked_words + 9, n_recon_images=len(LENGTHS)
    )
    results = []
    for each in (inputs, roomy):
        model = build()
        output = model(each, masks)
        output.total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((output, gradients))
    (tight, g_tight), (wide, g_wide) = results
    torch.testing.assert_close(tight.losses["mlm"], wide.losses["mlm"])
    torch.testing.assert_close(tight.losses["recon"], wide.losses["recon"])
    assert len(g_tight) == len(list(build().parameters()))
    for a, b in zip(g_tight, g_wide, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@interpreted
def test_images_that_do_not_count_take_no_gradient_from_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, masks = batch(LENGTHS)
    scored = masks.image.any(1)
    real = int(scored.sum())
    image_row = inputs.stream.image_row.clone()
    # As the places of rows that the last layer did not keep: anybody's.
    image_row[~scored] = image_row[scored][0]
    stream = dataclasses.replace(inputs.stream, image_row=image_row)
    inputs = inputs._replace(stream=stream, n_recon_images=real + 1)
    model, found = build(), []
    for take in (take_rows_ref, take_rows_fused):
        monkeypatch.setattr(mlim, "take_rows", take)
        generator = torch.Generator().manual_seed(1)
        hidden_td = torch.randn(len(stream.source), TINY.width, generator=generator)
        hidden_td.requires_grad_()
        _image, error = model.score_images(hidden_td, inputs, masks)
        found.append(torch.autograd.grad(error.sum(), hidden_td)[0])
    assert (found[0][image_row[scored][0]] != 0).any(1).all()
    torch.testing.assert_close(*found)


def test_losses_by_mode_are_those_of_the_pairs_of_each_mode() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    output = model(inputs, masks)
    assert set(masks.mode.tolist()) == set(Mode)
    expected = torch.zeros(4, 3)
    for pair, mode in enumerate(masks.mode.tolist()):
        alone = model(*one(inputs, masks, pair))
        counts = masks.counts
        expected[:, mode] += torch.stack(
            [
                alone.losses["mlm"].detach(),
                alone.losses["recon"].detach(),
                counts.text[pair],
                counts.image[pair],
            ]
        )
    torch.testing.assert_close(output.by_mode, expected, rtol=1e-4, atol=1e-4)
    assert output.by_mode[2, Mode.IMAGE_HEAVY] == 0
    assert output.by_mode[3, Mode.TEXT_HEAVY] == 0


def replaced(masks: Masks, *, kept: Tensor, swapped: Tensor) -> Masks:
    word = torch.randint(
        0, 1 << 32, masks.text.shape, generator=torch.Generator().manual_seed(1)
    )
    shown = Replacement(kept & masks.text, swapped & masks.text, word)
    return dataclasses.replace(masks, replacement=shown)


def test_kept_words_are_seen_and_scored() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    nothing = torch.zeros_like(masks.text)
    keep = replaced(masks, kept=masks.text, swapped=nothing)
    bare = dataclasses.replace(masks, text=nothing)
    hidden = model.encode(inputs, keep)
    assert torch.equal(hidden, model.encode(inputs, bare))
    assert not torch.equal(hidden, model.encode(inputs, masks))
    scores = model.score_words(hidden, inputs, keep)
    n_masked = int(masks.text.sum())
    assert int((scores.nll > 0).sum()) == n_masked
    places = masked_words(inputs.stream, masks).nonzero().flatten()
    assert torch.equal(scores.text[:n_masked], places)


def test_swapped_words_show_another_word_and_the_true_one_is_asked_for() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    nothing = torch.zeros_like(masks.text)
    swap = replaced(masks, kept=nothing, swapped=masks.text)
    assert swap.replacement is not None
    others = random_words(swap.replacement.word, V, [MASK])
    ids = inputs.token_ids.clone()
    for row in masked_words(inputs.stream, masks).nonzero().flatten().tolist():
        pair = int(inputs.stream.text_pair[row])
        ids[row] = others[pair, int(inputs.stream.text_position[row]) - 1]
    bare = dataclasses.replace(masks, text=nothing)
    hidden = model.encode(inputs, swap)
    assert torch.equal(hidden, model.encode(inputs._replace(token_ids=ids), bare))
    true = model.score_words(hidden, inputs, swap).nll.sum()
    wrong = model.score_words(hidden, inputs._replace(token_ids=ids), swap).nll.sum()
    assert float(true) == pytest.approx(float(model(inputs, swap).losses["mlm"]))
    assert float(true) != pytest.approx(float(wrong))


def test_words_that_are_not_replaced_are_hidden_as_before() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    nothing = torch.zeros_like(masks.text)
    none = replaced(masks, kept=nothing, swapped=nothing)
    assert torch.equal(model.encode(inputs, none), model.encode(inputs, masks))


def test_a_micro_batch_needs_no_value_on_the_host() -> None:
    """On the meta device there are no values, only shapes."""
    inputs, masks = batch(LENGTHS)
    masks = replaced(masks, kept=masks.text, swapped=masks.text)
    assert masks.replacement is not None
    away = torch.device("meta")
    output = build().to(away)(
        inputs._replace(
            stream=inputs.stream.to(away),
            token_ids=inputs.token_ids.to(away),
            pixels=inputs.pixels.to(away),
        ),
        Masks(
            mode=masks.mode.to(away),
            text=masks.text.to(away),
            image=masks.image.to(away),
            replacement=Replacement(*(part.to(away) for part in masks.replacement)),
        ),
    )
    assert output.by_mode.shape == (4, 3)


def test_nothing_masked_gives_loss_zero_and_finite_gradients() -> None:
    inputs, masks = batch(LENGTHS)
    clean = Masks(
        mode=masks.mode,
        text=torch.zeros_like(masks.text),
        image=torch.zeros_like(masks.image),
    )
    model = build()
    output = model(inputs, clean)
    assert float(output.losses["mlm"]) == 0
    assert float(output.losses["recon"]) == 0
    output.total.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_one_mask_vector_serves_both_modalities() -> None:
    model = build()
    inputs, masks = batch(LENGTHS)
    everything = Masks(
        mode=masks.mode,
        text=torch.ones_like(masks.text),
        image=torch.ones_like(masks.image),
    )
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.encode(inputs, everything)
    vector = model.words.weight[MASK]
    image = model.embedding_norm(vector + model.image_positions.weight)
    torch.testing.assert_close(seen[0][inputs.stream.image_row[0]], image)
    word = model.embedding_norm(vector + model.text_positions.weight[1])
    torch.testing.assert_close(seen[0][inputs.stream.text_row[1]], word)


def test_compact_lists_true_entries_in_order() -> None:
    chosen = torch.tensor([False, True, False, True, True])
    index, valid = compact(chosen, 4)
    assert index[:3].tolist() == [1, 3, 4]
    assert valid.tolist() == [True, True, True, False]


def test_paper_sized_embedder_and_decoder_meet_their_budgets() -> None:
    config = MlimConfig(
        width=1024,
        heads=16,
        layers=1,
        ffn_width=8,
        embedder_widths=(24, 48, 64, 64, 96),
        embedder_hidden=128,
        decoder_widths=(144, 256, 160, 128, 64, 64, 32, 32, 16),
    )
    with torch.device("meta"):
        model = MlimForPreTraining(
            config, vocab_size=8, special_ids={"mask": 4}, max_text=4, image_size=384
        )
    counts = [
        sum(p.numel() for p in part.parameters())
        for part in (model.embedder, model.decoder)
    ]
    assert counts == [202_952, 2_793_603]
    assert model.grid**2 == 144


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads"):
        MlimConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="decoder_widths needs 5"):
        MlimConfig(decoder_widths=(8, 8))


def test_tied_head_is_the_word_embedding() -> None:
    model = build()
    hidden = torch.randn(3, TINY.width)
    dense = model.mlm_dense
    normed = model.mlm_norm(F.gelu(F.linear(hidden, dense.weight, dense.bias)))
    expected = normed @ model.words.weight.T + model.mlm_bias
    torch.testing.assert_close(model.word_logits(hidden), expected)


def test_a_fresh_model_passes_images_in_and_pixels_out() -> None:
    """With the framework's own initialisation the spread over images was 0.0007 at the
    embedder's end and 0.00003 at the decoder's, so that neither learned for long.
    """
    torch.manual_seed(0)
    config = MlimConfig(
        embedder_widths=(24, 48, 64, 96), decoder_widths=(64, 64, 48, 48, 32, 32, 24)
    )
    model = MlimForPreTraining(
        config, vocab_size=8, special_ids={"mask": 4}, max_text=4, image_size=32
    )
    pixels = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    hidden = torch.randn(16, config.width, 2, 2)
    with torch.no_grad():
        assert model.embed_pixels(pixels).std(0).mean() > 0.05
        assert model.decoder(hidden).std(0).mean() > 0.05


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_itm_loss_is_that_of_every_pair_alone_with_nothing_masked(norm: str) -> None:
    model = build(dataclasses.replace(TINY, norm=norm, itm_weight=1))
    inputs, masks = batch(LENGTHS)
    drawn = matching(len(LENGTHS))
    output = model(inputs._replace(matching=drawn), masks)
    expected, right = 0.0, 0
    for pair in range(len(LENGTHS)):
        alone, _ = one(inputs, masks, pair)
        image = int(drawn.image_of[pair])
        alone = alone._replace(pixels=inputs.pixels[image : image + 1])
        cls = model.encode(alone, None)[0]
        logits = model.itm_head(torch.tanh(model.itm_pooler(cls)))
        truth = int(drawn.matched[pair])
        expected -= float(logits.log_softmax(0)[truth].detach())
        right += int(logits.argmax()) == truth
    assert float(output.losses["itm"].detach()) == pytest.approx(expected, rel=1e-4)
    assert int(output.figures["itm_accuracy"]) == right
    plain = model(inputs, masks)
    for name in ("mlm", "recon"):
        torch.testing.assert_close(output.losses[name], plain.losses[name])
    name = "mlm_accuracy"
    torch.testing.assert_close(output.figures[name], plain.figures[name])
    torch.testing.assert_close(output.by_mode, plain.by_mode)


def test_a_model_without_itm_weight_has_no_itm_head() -> None:
    names = [name for name, _ in build().named_parameters()]
    assert not [name for name in names if name.startswith("itm_")]
    inputs, _ = batch(LENGTHS)
    with pytest.raises(ValueError, match="itm_weight 1"):
        build().matching_logits(torch.zeros(1, TINY.width), inputs.stream)


def test_layers_are_compiled_for_few_shapes_and_change_no_loss() -> None:
    plain, compiled = build(), build()
    compiled.compile_layers(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        lengths = torch.randint(3, 18, (9,), generator=generator).tolist()
        inputs, masks = batch(lengths, seed)
        losses, gradients = [], []
        for model in (plain, compiled):
            model.zero_grad()
            output = model(inputs, masks)
            loss = output.total
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Layers share their code, the last one takes rows; then sizes are variables, of
    # the images that are decoded too.
    assert 0 < counters["frames"]["ok"] <= 8
    assert compiled.state_dict().keys() == plain.state_dict().keys()
