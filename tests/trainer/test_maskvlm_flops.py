"""FLOPs of MaskVLM are those of the naive loops, product by product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.test_maskvlm import (
    GRID,
    SIZE,
    TINY,
    Naive,
    Pairs,
    V,
    build,
    with_keys,
)
from trainer.flops import step_flops
from trainer.models.maskvlm_config import MaskVlmConfig

LENGTH, PAIRS = 9, 4
N_IMAGE = GRID**2


def work(words: int = 8) -> Any:
    """What the loader counts of pairs of one length."""
    tokens = LENGTH + N_IMAGE
    return SimpleNamespace(
        pairs=PAIRS,
        tokens=PAIRS * tokens,
        squared_lengths=PAIRS * tokens**2,
        scored_lengths=0,
        masked_words=words,
        recon_images=PAIRS,
        recon_pixels=0,
    )


def parts(config: MaskVlmConfig) -> dict[str, float]:
    return config.forward_flops(work(), vocab_size=V, image_size=SIZE)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def test_encoders_decoder_and_head_are_counted_as_they_are_run() -> None:
    model, pairs = build(), Pairs([LENGTH] * PAIRS)
    naive, found = Naive(model), parts(TINY)
    pixels, ids = pairs.pixels[0], pairs.texts[0]
    patches = 2 * SIZE**2 * 3 * TINY.width
    # The loops embed a square by a matrix and a vector, which torch does not count.
    image = counted(lambda: naive.image(pixels, None))
    text = counted(lambda: naive.text(ids, None))
    assert found["patches"] == PAIRS * patches
    # Clean and masked.
    assert found["image_encoder"] == 2 * PAIRS * image
    assert found["text_encoder"] == 2 * PAIRS * text
    x, other = torch.zeros(N_IMAGE, 16), torch.zeros(LENGTH, 16)

    def decode() -> None:
        hidden = naive.through(model.mim_decoder, model.mim_norm, x, other)
        model.mim_pixels(hidden)

    assert found["decoder"] == PAIRS * counted(decode)
    head = counted(lambda: model.word_logits(torch.zeros(8, 16)))
    assert found["mlm_head"] == head
    total = step_flops(TINY, work(), vocab_size=V, image_size=SIZE)
    assert total == 3 * sum(found.values()) - PAIRS * patches


@pytest.mark.parametrize("itm", [True, False])
def test_a_block_across_is_counted_for_every_pass_and_its_keys_once(itm: bool) -> None:
    model = build()
    naive, width = Naive(model), TINY.width
    image, text = torch.zeros(N_IMAGE + 1, width), torch.zeros(LENGTH, width)
    passes = 4 if itm else 1
    whole = counted(
        lambda: (
            naive.through(model.image_cross, model.image_cross_norm, image, text),
            naive.through(model.text_cross, model.text_cross_norm, text, image),
        )
    )
    # Two blocks here; keys and values of both modalities.
    keys = 4 * width**2 * (N_IMAGE + 1 + LENGTH)
    expected = PAIRS * (passes * whole // 2 - (passes - 1) * keys)
    less, more = (
        parts(with_keys({"itm_weight": float(itm), "cross_layers": layers}))["cross"]
        for layers in (2, 3)
    )
    assert more - less == expected
    # A last block, of which less is read, is less than a whole one.
    assert 0 < less < 2 * expected


def test_what_is_off_counts_nothing() -> None:
    off = dataclasses.replace(TINY, itm_weight=0, mlm_weight=0, mim_weight=0)
    found = parts(off)
    assert found["cross"] == found["decoder"] == found["mlm_head"] == 0
    assert found["image_encoder"] == parts(TINY)["image_encoder"] / 2
