from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from tests.trainer.kernels.numbers import CPU, interpreted, spread_out
from tests.trainer.masks import UID
from tests.trainer.test_masking import EVERYTHING, configs
from trainer.kernels.case import Case
from trainer.kernels.mam_masks import CASES, mam_fused, mam_masks
from trainer.mask_config import MaskConfig, Mode
from trainer.masking import Masks, mam
from trainer.philox import Use, draw

pytestmark = interpreted
SMALL = [case for case in CASES if case.small]
TIE = (8376, [122, 155], 20)
uint64 = st.integers(0, (1 << 64) - 1)


def assert_same(found: Masks, wanted: Masks) -> None:
    for name in ("mode", "text", "image"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), name
    assert (found.replacement is None) == (wanted.replacement is None)
    pairs = zip(found.replacement or (), wanted.replacement or (), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def arguments(n_words: list[int], **changed: Any) -> dict[str, Any]:
    return {
        "seed": (5 << 33) + 9,
        "epoch": torch.arange(len(n_words)) * 65_537 % (1 << 24),
        "uids": torch.arange(1, len(n_words) + 1) * UID,
        "n_text": torch.tensor(n_words),
        "text_capacity": max(n_words),
        "n_image": 49,
        **changed,
    }


@settings(max_examples=20, deadline=None)
@given(
    config=configs(),
    pairs=st.lists(st.tuples(uint64, st.integers(0, 40)), min_size=1, max_size=3),
    spare=st.integers(0, 9),
    grid=st.integers(1, 7),
    seed=uint64,
    epoch=st.integers(0, (1 << 24) - 1),
    own_epochs=st.booleans(),
    mode=st.sampled_from([None, *Mode]),
)
def test_masks_are_those_of_the_reference_whatever_the_setting(
    config: MaskConfig,
    pairs: list[tuple[int, int]],
    spare: int,
    grid: int,
    seed: int,
    epoch: int,
    own_epochs: bool,
    mode: Mode | None,
) -> None:
    uids = torch.tensor([uid - (uid >> 63 << 64) for uid, _ in pairs])
    words = [count for _, count in pairs]
    epochs = (torch.arange(len(pairs)) * 7919 + epoch) % (1 << 24)
    asked = arguments(
        words,
        seed=seed,
        epoch=epochs if own_epochs else epoch,
        uids=uids,
        text_capacity=max(max(words) + spare, 1),
        n_image=grid**2,
        mode=mode,
    )
    assert_same(mam_fused(config, **asked), mam(config, **asked))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_cases_agree(case: Case) -> None:
    inputs = case.inputs(CPU, torch.float32, 3)
    pairs = zip(case.fused(*inputs), case.reference(*inputs), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("mode", Mode)
def test_ranks_are_right_where_positions_fill_several_programs(mode: Mode) -> None:
    asked = arguments([200, 127], n_image=13**2, mode=mode)
    assert_same(mam_fused(MaskConfig(), **asked), mam(MaskConfig(), **asked))


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_nothing_and_everything_can_be_masked(rate: float, count: str) -> None:
    config = MaskConfig(
        policy="uniform",
        uniform_rate=rate,
        count=count,  # type: ignore[arg-type]
    )
    words = [0, 1, 9]
    found = mam_fused(config, **arguments(words))
    assert found.counts.text.tolist() == [int(rate) * each for each in words]
    assert found.counts.image.tolist() == [int(rate) * 49] * 3


def test_of_two_equal_keys_the_first_position_is_masked() -> None:
    """A pair found by search, two of whose positions draw the same word."""
    uid, positions, rank = TIE
    index = torch.tensor(positions)
    words = draw(
        seed=3, use=Use.IMAGE_MASK, epoch=0, uid=torch.tensor(uid), index=index
    )[0]
    assert words[0] == words[1]
    config = MaskConfig(light_image_rate=(rank + 1) / 256)
    asked = arguments(
        [1],
        seed=3,
        epoch=0,
        uids=torch.tensor([uid]),
        n_image=256,
        mode=Mode.LIGHT,
    )
    found = mam_fused(config, **asked)
    assert found.image[0, index].tolist() == [True, False]
    assert_same(found, mam(config, **asked))


def test_inputs_need_not_be_contiguous() -> None:
    asked = arguments([3, 0, 14, 7])
    gaps = {
        name: spread_out(value) if isinstance(value, torch.Tensor) else value
        for name, value in asked.items()
    }
    assert not gaps["uids"].is_contiguous()
    assert_same(mam_fused(EVERYTHING, **gaps), mam(EVERYTHING, **asked))


def test_without_a_gpu_the_reference_draws() -> None:
    asked = arguments([3, 9])
    assert_same(mam_masks(EVERYTHING, **asked), mam(EVERYTHING, **asked))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1 << 64}, "seed"),
        ({"epoch": 1 << 24}, "epoch"),
        ({"n_image": 50}, "square"),
    ],
)
def test_what_the_reference_refuses_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mam_fused(MaskConfig(), **arguments([3], **changed))


@pytest.mark.parametrize("replaces", [[], [1 << 28, 1 << 29]])
def test_the_operator_keeps_the_rules_of_operators(replaces: list[int]) -> None:
    three, sizes = torch.arange(3), (True, 4, 3, 1)
    library.opcheck(
        torch.ops.palimpsest.mam_masks.default,
        (three, three, three, -5, [9, 1 << 31], [0, 8, 9], [9, 9, 0], replaces, *sizes),
    )
