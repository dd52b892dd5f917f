"""MaskVLM's losses are those of naive loops, whatever stands beside a pair."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.masking import MaskConfig, Masks, mam
from trainer.models import base
from trainer.models.base import Contrast, Inputs, Output, Sizes
from trainer.models.maskvlm import MaskVlmForPreTraining
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.mlim import masked_words
from trainer.stream import capacity, lay_out

SIZE, V, MASK, MAX_TEXT = 16, 50, 4, 20
TINY = MaskVlmConfig(
    image_layers=2,
    text_layers=2,
    width=16,
    heads=2,
    ffn_width=32,
    patch_size=4,
    cross_layers=2,
    decoder_layers=2,
    projection_width=8,
    itm_group=4,
)
GRID = SIZE // TINY.patch_size
LENGTHS = [7, 2, 12, 9, 3, 15, 8, 6]
MASK_KEYS = MaskConfig(
    mode_probabilities=(0.0, 0.0, 1.0),
    light_image_rate=0.6,
    light_text_rate=0.3,
    image_block=2,
)


ALONE = Contrast(torch.detach, 0)


def build(config: MaskVlmConfig = TINY) -> MaskVlmForPreTraining:
    torch.manual_seed(0)
    model = config.build(Sizes(V, {"mask": MASK}, MAX_TEXT, SIZE))
    # Larger weights than a fresh model's, so that wrong rows cannot hide.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "temperature" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_keys(keys: dict[str, Any]) -> MaskVlmConfig:
    """The tiny model with other keys."""
    return dataclasses.replace(TINY, **keys)


class Pairs:
    """Some pairs, and any of them as a micro-batch of its own."""

    def __init__(self, lengths: list[int], *, keys: MaskConfig = MASK_KEYS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.keys = lengths, keys
        self.texts = [torch.randint(5, V, (n,), generator=generator) for n in lengths]
        shape = (len(lengths), SIZE, SIZE, 3)
        self.pixels = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=generator
        )
        self.uids = torch.arange(len(lengths)) * 7919
        self.images = torch.arange(len(lengths)) + (1 << 31)

    def micro(
        self, config: MaskVlmConfig, first: int = 0, count: int | None = None
    ) -> tuple[Inputs, Masks]:
        """Consecutive pairs, with what the loader counts and draws of them."""
        rows = slice(first, len(self.lengths) if count is None else first + count)
        texts = self.texts[rows]
        lengths = np.array([len(text) for text in texts])
        stream = lay_out(lengths, GRID**2)
        ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
        ids[: stream.text_used] = torch.cat(texts)
        masks = mam(
            self.keys,
            seed=0,
            epoch=0,
            uids=self.uids[rows],
            n_text=stream.n_words,
            text_capacity=MAX_TEXT,
            n_image=GRID**2,
        )
        captions = torch.full((len(texts), MAX_TEXT), -1)
        for row, text in enumerate(texts):
            captions[row, : len(text)] = text
        inputs = Inputs(
            stream=stream,
            token_ids=ids,
            pixels=self.pixels[rows],
            n_masked_words=capacity(int(masked_words(stream, masks).sum())),
            n_recon_images=capacity(int(masks.image.any(1).sum())),
            matching=config.matching(
                seed=3,
                epochs=torch.zeros(len(texts), dtype=torch.int64),
                uids=self.uids[rows],
                images=self.images[rows],
                captions=lambda: captions,
            ),
        )
        return inputs, masks


def seeing(table: Tensor, first: int) -> Contrast:
    """The global batch as a micro-batch sees it."""
    return Contrast(lambda own: table, first)


def step(
    model: MaskVlmForPreTraining, pairs: Pairs, count: int
) -> tuple[Output, dict[str, Tensor], list[Output]]:
    """Sums and gradients of a step in micro-batches of `count` pairs, as the loop takes
    it.
    """
    config, total = model.config, len(pairs.lengths)
    micros = [pairs.micro(config, at, count) for at in range(0, total, count)]
    table = None
    if config.contrastive:
        with torch.no_grad():
            features = [model(inputs, None).features for inputs, _ in micros]
        table = torch.cat(features)
    model.zero_grad()
    outputs = []
    for number, (own, masks) in enumerate(micros):
        inputs = own
        given = inputs
        if table is not None:
            # Its own rows are not for it to read.
            seen = table.clone()
            seen[number * count : (number + 1) * count] = float("nan")
            contrast = seeing(seen, number * count)
            given = inputs._replace(contrast=contrast)
        output = model(given, masks)
        output.total.backward()
        outputs.append(output)
    summed = Output(
        losses=_added([output.losses for output in outputs]),
        figures=_added([output.figures for output in outputs]),
        by_mode=torch.stack([output.by_mode for output in outputs]).sum(0),
    )
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return summed, gradients, outputs


def _added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([p[name].detach().float() for p in parts]).sum()
        for name in parts[0]
    }


# --- a plain re-derivation, a pair at a time -----------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    found = []
    for part in zip(*(x.chunk(heads, 1) for x in (q, k, v)), strict=True):
        weights = (part[0] @ part[1].T / part[0].shape[1] ** 0.5).softmax(1)
        found.append(weights @ part[2])
    return torch.cat(found, 1)


def norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, layer.eps)


def itself(layer: Any, x: Tensor, heads: int) -> Tensor:
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, 1)
    return layer.out(attend(q, k, v, heads))


def plain(block: Any, x: Tensor, heads: int) -> Tensor:
    def ffn(h: Tensor) -> Tensor:
        return block.down(F.gelu(F.linear(h, block.up.weight, block.up.bias)))

    if block.pre:
        x = x + itself(block.attention, norm(block.attention_norm, x), heads)
        return x + ffn(norm(block.ffn_norm, x))
    x = norm(block.attention_norm, x + itself(block.attention, x, heads))
    return norm(block.ffn_norm, x + ffn(x))


def across(block: Any, x: Tensor, other: Tensor, heads: int) -> Tensor:
    h = norm(block.attention_norm, x)
    if block.attention is not None:
        x = x + itself(block.attention, h, heads)
        h = norm(block.cross_norm, x)
    k, v = block.cross.key_value(other).chunk(2, 1)
    x = x + block.cross.out(attend(block.cross.query(h), k, v, heads))
    up = F.linear(norm(block.ffn_norm, x), block.up.weight, block.up.bias)
    return x + block.down(F.gelu(up))


class Naive:
    """The model, a pair at a time."""

    def __init__(self, model: MaskVlmForPreTraining) -> None:
        self.model, self.heads = model, model.config.heads

    def image(self, pixels: Tensor, mask: Tensor | None) -> Tensor:
        model, side = self.model, self.model.config.patch_size
        rows = [model.image_cls + model.image_positions.weight[0]]
        for position in range(GRID**2):
            top, left = divmod(position, GRID)
            square = pixels[
                top * side : (top + 1) * side, left * side : (left + 1) * side
            ]
            values = (square.float() / 127.5 - 1).permute(2, 0, 1).flatten()
            weight = model.patches.weight.flatten(1)
            assert model.patches.bias is not None
            row = weight @ values + model.patches.bias
            if mask is not None and mask[position]:
                assert model.mim_mask is not None
                row = model.mim_mask
            rows.append(row + model.image_positions.weight[position + 1])
        x = torch.stack(rows)
        for block in model.image_blocks:
            x = plain(block, x, self.heads)
        return norm(model.image_norm, x)

    def text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        model = self.model
        ids = ids.clone()
        for word in range(len(ids) - 2):
            if mask is not None and mask[word]:
                ids[word + 1] = MASK
        x = model.words.weight[ids] + model.text_positions.weight[: len(ids)]
        x = norm(model.embedding_norm, x)
        for block in model.text_blocks:
            x = plain(block, x, self.heads)
        if model.config.text_norm == "pre":
            x = norm(model.text_norm, x)
        return x

    def through(self, blocks: Any, last: Any, x: Tensor, other: Tensor) -> Tensor:
        for block in blocks:
            x = across(block, x, other, self.heads)
        return norm(last, x)

    def images_across(self, image: Tensor, text: Tensor) -> Tensor:
        model = self.model
        return self.through(model.image_cross, model.image_cross_norm, image, text)

    def texts_across(self, text: Tensor, image: Tensor) -> Tensor:
        model = self.model
        return self.through(model.text_cross, model.text_cross_norm, text, image)

    def match(self, image: Tensor, text: Tensor) -> Tensor:
        both = [self.images_across(image, text)[0], self.texts_across(text, image)[0]]
        return self.model.itm_head(torch.cat(both))


@pytest.mark.parametrize("text_norm", ["post", "pre"])
def test_mlm_and_mim_are_those_of_naive_loops(text_norm: str) -> None:
    config = with_keys({"itc_weight": 0, "itm_weight": 0, "text_norm": text_norm})
    model, pairs = build(config), Pairs(LENGTHS)
    inputs, masks = pairs.micro(config)
    output, naive, side = model(inputs, masks), Naive(model), config.patch_size
    mlm, mim, right = 0.0, 0.0, 0
    for pair, ids in enumerate(pairs.texts):
        pixels = pairs.pixels[pair]
        image, text = naive.image(pixels, None), naive.text(ids, None)
        hidden = naive.texts_across(naive.text(ids, masks.text[pair]), image)
        for word in range(len(ids) - 2):
            if masks.text[pair, word]:
                logits = model.word_logits(hidden[None, word + 1])[0]
                mlm -= float(logits.log_softmax(0)[ids[word + 1]].detach())
                right += int(logits.argmax() == ids[word + 1])
        x = naive.images_across(naive.image(pixels, masks.image[pair]), text)[1:]
        x = naive.through(model.mim_decoder, model.mim_norm, x, text)
        for position in masks.image[pair].nonzero().flatten().tolist():
            square = torch.sigmoid(model.mim_pixels(x[position])).view(3, side, side)
            top, left = divmod(position, GRID)
            for y in range(side):
                for z in range(side):
                    true = pixels[top * side + y, left * side + z].float() / 255
                    error = (square[:, y, z] - true).abs()
                    mim += float(error.mean().detach())
    assert float(output.losses["mlm"].detach()) == pytest.approx(mlm, rel=1e-4)
    assert float(output.losses["mim"].detach()) == pytest.approx(mim, rel=1e-4)
    assert int(output.figures["mlm_accuracy"]) == right
    words, squares = masks.text.sum(), masks.image.sum()
    expected = torch.tensor([mlm, mim, float(words), float(squares)])
    torch.testing.assert_close(output.by_mode.sum(1), expected, rtol=1e-4, atol=1e-4)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-4, atol=2e-5, msg=f"{name}: {{}}".format
        )


def with_twins(lengths: list[int] = LENGTHS) -> Pairs:
    """Pairs of which two have one image file, and two others one caption."""
    pairs = Pairs([*lengths[:6], lengths[2], *lengths[7:]])
    pairs.images[5] = pairs.images[1]
    pairs.texts[6] = pairs.texts[2].clone()
    return pairs


@pytest.mark.parametrize("count", [8, 4, 2, 1])
def test_itc_is_a_dense_softmax_over_the_global_batch(count: int) -> None:
    config = dataclasses.replace(TINY, itm_weight=0, mlm_weight=0, mim_weight=0)
    model, pairs = build(config), with_twins()
    found, gradients, _ = step(model, pairs, count)
    naive, features = Naive(model), []
    for pixels, ids in zip(pairs.pixels, pairs.texts, strict=True):
        image, text = naive.image(pixels, None)[0], naive.text(ids, None)[0]
        features.append([F.normalize(model.itc_image(image), dim=0)])
        features[-1].append(F.normalize(model.itc_text(text), dim=0))
    factor = model.itc_temperature.log_factor.exp()
    assert float(factor.detach()) == pytest.approx(1 / 0.07)
    alike = {(1, 5), (5, 1), (2, 6), (6, 2)}
    loss, right = torch.zeros(()), [0, 0]
    n = len(LENGTHS)
    for pair in range(n):
        for way in (0, 1):
            # Of the other modality of every pair but those that are alike.
            others = [one for one in range(n) if (pair, one) not in alike]
            scores = torch.cat(
                [
                    factor * features[pair][way] @ features[one][1 - way][:, None]
                    for one in others
                ]
            )
            own = others.index(pair)
            loss = loss - scores.log_softmax(0)[own] / 2
            right[way] += int(scores.argmax()) == own
    torch.testing.assert_close(found.losses["itc"], loss.detach(), rtol=1e-4, atol=1e-4)
    close(gradients, gradients_of(model, loss))
    assert float(found.figures["itc_image_to_text_r1"]) == right[0]
    assert float(found.figures["itc_text_to_image_r1"]) == right[1]
    assert float(found.figures["itc_temperature"]) == pytest.approx(0.07 * n)
    with torch.no_grad():
        table = model(pairs.micro(config)[0], None).features
        held_out = model.held_out_contrast(table)
    assert held_out["itc_loss"] == pytest.approx(float(loss.detach()) / n, rel=1e-4)
    assert held_out["itc_image_to_text_r1"] == right[0] / n
    assert held_out["itc_temperature"] == pytest.approx(0.07)


def test_itm_is_that_of_pairs_one_at_a_time_and_negatives_never_match() -> None:
    config = dataclasses.replace(TINY, mlm_weight=0, mim_weight=0)
    model, pairs = build(config), with_twins()
    inputs, masks = pairs.micro(config)
    inputs = inputs._replace(contrast=ALONE)
    output = model(inputs, masks)
    encoded = model.encode_pairs(inputs, None, model._wanted(inputs).passes)
    whole = model._whole_pairs(inputs, model.table(encoded, inputs))
    naive, loss, right = Naive(model), 0.0, 0.0
    images = [naive.image(pixels, None) for pixels in pairs.pixels]
    texts = [naive.text(ids, None) for ids in pairs.texts]
    image_of, text_of = (x.view(3, -1).T for x in (whole.image_of, whole.text_of))
    for pair in range(len(LENGTHS)):
        shown = list(zip(image_of[pair].tolist(), text_of[pair].tolist(), strict=True))
        assert shown[0] == (pair, pair)
        for way, (image, text) in enumerate(shown):
            logits = naive.match(images[image], texts[text])
            target = int(way == 0)
            loss -= float(logits.log_softmax(0)[target].detach()) / 3
            right += (int(logits.argmax()) == target) / 3
            if way:
                assert image // 4 == text // 4 == pair // 4
                assert pairs.images[image] != pairs.images[text]
                assert not torch.equal(pairs.texts[image], pairs.texts[text])
        assert shown[1][0] == pair
        assert shown[2][1] == pair
    assert float(output.losses["itm"].detach()) == pytest.approx(loss, rel=1e-4)
    assert float(output.figures["itm_accuracy"]) == pytest.approx(right)


def test_a_pair_without_a_negative_is_asked_about_itself_alone() -> None:
    config = dataclasses.replace(TINY, itc_weight=0, mlm_weight=0, mim_weight=0)
    model, pairs = build(config), Pairs(LENGTHS)
    pairs.images[:4] = 5
    inputs, masks = pairs.micro(config)
    whole = model._whole_pairs(inputs, None)
    assert whole.counts is not None
    assert whole.counts.tolist() == [[1, 0, 0]] * 4 + [[1, 1, 1]] * 4
    own, loss = torch.arange(4), model(inputs, masks).losses["itm"]
    rest = pairs.micro(config, 4, 4)
    encoded = model.encode_pairs(inputs, None, model._wanted(inputs).passes)
    logits = model.matching_logits(encoded, own, own)
    expected = F.cross_entropy(
        logits, torch.ones(4, dtype=torch.int64), reduction="sum"
    )
    torch.testing.assert_close(loss, expected + model(*rest).losses["itm"])


def test_held_out_pairs_are_scored_as_they_stand() -> None:
    model, pairs = build(), Pairs(LENGTHS)
    inputs, masks = pairs.micro(TINY)
    matched = torch.tensor([True, False] * 4)
    output = model(inputs._replace(matching=base.as_matched(8, matched)), masks)
    own = torch.arange(8)
    encoded = model.encode_pairs(inputs, masks, model._wanted(inputs).passes)
    logits = model.matching_logits(encoded, own, own)
    expected = F.cross_entropy(logits, matched.long(), reduction="sum")
    torch.testing.assert_close(output.losses["itm"], expected)
    assert float(output.losses["mlm"]) == float(output.losses["mim"]) == 0
    assert not output.by_mode.any()
    nothing = model(inputs._replace(matching=None), masks)
    assert float(nothing.losses["itm"]) == float(nothing.losses["itc"]) == 0
    assert float(nothing.losses["mlm"].detach()) > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("count", [8, 4])
def test_a_step_does_not_depend_on_its_split(count: int, recompute: bool) -> None:
    model, pairs = build(), with_twins()
    expected, gradients, _ = step(model, pairs, 8)
    model.recompute = recompute
    found, others, _ = step(model, pairs, count)
    for name, value in expected.losses.items():
        torch.testing.assert_close(found.losses[name], value, rtol=1e-4, atol=1e-4)
    for name, value in expected.figures.items():
        torch.testing.assert_close(found.figures[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.by_mode, expected.by_mode, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    close(others, gradients)


LOSSES = ("itc", "itm", "mlm", "mim")


@pytest.mark.parametrize("on", range(1, 16))
def test_a_loss_that_is_off_has_no_head_no_pass_and_no_effect(on: int) -> None:
    wanted = {name: bool(on >> bit & 1) for bit, name in enumerate(LOSSES)}
    config = with_keys({f"{name}_weight": float(on) for name, on in wanted.items()})
    model, pairs = build(config), Pairs(LENGTHS)
    whole = build()
    with torch.no_grad():
        names = {name for name, _ in model.named_parameters()}
        for name, parameter in whole.named_parameters():
            if name in names:
                parameter.copy_(model.get_parameter(name))
    found, gradients, _ = step(model, pairs, 8)
    expected, _, _ = step(whole, pairs, 8)
    assert found.losses.keys() >= {name for name in LOSSES if wanted[name]}
    for name, value in found.losses.items():
        if not wanted[name]:
            assert float(value) == 0
        # Without contrast the negatives of matching are others.
        elif name != "itm" or wanted["itc"]:
            torch.testing.assert_close(value, expected.losses[name])
    assert gradients.keys() == names
    passes = model._wanted(pairs.micro(config)[0]._replace(contrast=ALONE)).passes
    assert passes.masked_images == wanted["mim"]
    assert passes.masked_texts == wanted["mlm"]
    clean = wanted["itc"] or wanted["itm"]
    assert passes.clean_images == clean or wanted["mlm"]
    assert passes.clean_texts == clean or wanted["mim"]


def test_masked_pixels_and_words_cannot_be_seen() -> None:
    model, pairs = build(), Pairs(LENGTHS)
    inputs, masks = pairs.micro(TINY)
    passes = model._wanted(inputs).passes._replace(
        clean_images=False, clean_texts=False
    )
    side = TINY.patch_size
    hidden = masks.image.view(-1, GRID, GRID)
    hidden = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    assert hidden.any(dim=(1, 2)).all()
    pixels = torch.where(hidden, 255 - inputs.pixels, inputs.pixels)
    words = masked_words(inputs.stream, masks)
    assert words.any()
    ids = torch.where(words, 5 + inputs.token_ids % 7, inputs.token_ids)
    changed = inputs._replace(pixels=pixels, token_ids=ids)
    before, after = (
        model.encode_pairs(each, masks, passes) for each in (inputs, changed)
    )
    assert torch.equal(before.image_bnd, after.image_bnd)
    assert torch.equal(before.text_td, after.text_td)
    flipped = inputs._replace(pixels=255 - inputs.pixels)
    assert not torch.allclose(
        before.image_bnd, model.encode_pairs(flipped, masks, passes).image_bnd
    )


def test_mim_restores_the_two_by_two_blocks_that_are_masked() -> None:
    _, masks = Pairs(LENGTHS).micro(TINY)
    blocks = masks.image.view(-1, GRID // 2, 2, GRID // 2, 2)
    assert torch.equal(blocks.any(4).any(2), blocks.all(4).all(2))
    # 60 % of four blocks, and 30 % of the words.
    assert blocks.all(4).all(2).sum((1, 2)).tolist() == [2] * len(LENGTHS)
    words = [max(round(0.3 * (n - 2)), int(n > 2)) for n in LENGTHS]
    assert masks.text.sum(1).tolist() == words
    assert TINY.recon_pixels(masks.counts.image, GRID**2).tolist() == [128] * 8


def test_nothing_masked_gives_loss_zero_and_gradients_of_zero() -> None:
    config = dataclasses.replace(TINY, itc_weight=0, itm_weight=0)
    none = dataclasses.replace(MASK_KEYS, light_image_rate=0.0, light_text_rate=0.0)
    model, pairs = build(config), Pairs(LENGTHS, keys=none)
    found, gradients, _ = step(model, pairs, 8)
    assert float(found.losses["mlm"]) == float(found.losses["mim"]) == 0
    # All parameters take part, whatever is masked: ranks must agree on them.
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all(not gradient.any() for gradient in gradients.values())


def test_compiled_layers_take_the_same_step() -> None:
    parts = ("image_layers", "text_layers", "cross_layers", "decoder_layers")
    model = build(with_keys(dict.fromkeys(parts, 1)))
    pairs = with_twins()
    expected, gradients, _ = step(model, pairs, 8)
    model.compile_layers(backend="eager")
    found, others, _ = step(model, pairs, 8)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-4)
    close(others, gradients)


def test_keys_that_cannot_be_are_refused_with_the_cure() -> None:
    def refused(match: str, **keys: Any) -> None:
        with pytest.raises(ValueError, match=match):
            MaskVlmConfig(**keys)

    refused("nothing would be learned", **{f"{name}_weight": 0 for name in LOSSES})
    refused(r"heads 3 does not divide", heads=3)
    refused("give 2 or more", itm_group=1)
    refused("between 0.01 and 1", itc_temperature=2.0)
    refused("--model.text_norm post", text_norm="pre", text_body="roberta-base")
    assert base.find("maskvlm") is MaskVlmConfig
    assert "maskvlm" in base.names()
    assert TINY.group == 4
    assert dataclasses.replace(TINY, itm_weight=0).group == 1


def test_a_step_asks_the_device_for_no_value() -> None:
    """On a device that has none: whoever asked would be refused."""
    model, (inputs, masks) = build().to("meta"), Pairs(LENGTHS).micro(TINY)
    drawn = inputs.matching
    there = inputs._replace(
        stream=inputs.stream.to(torch.device("meta")),
        token_ids=inputs.token_ids.to("meta"),
        pixels=inputs.pixels.to("meta"),
        matching=type(drawn)(*(part.to("meta") for part in drawn)),
        contrast=ALONE,
    )
    hidden = Masks(
        mode=masks.mode.to("meta"),
        text=masks.text.to("meta"),
        image=masks.image.to("meta"),
    )
    output = model(there, hidden)
    output.total.backward()
    assert output.total.is_meta
    assert model(there, None).features.shape == (len(LENGTHS), 2 * 8 + 8)
