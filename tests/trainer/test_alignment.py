"""Hard negatives are drawn as the similarity says, and never match."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.models.alignment import (
    Temperature,
    drawn_candidates,
    hard_negatives,
    identities,
    projections,
    table_of,
)

PAIRS, GROUP = 4096, 8


def pairs(**changed: torch.Tensor) -> dict[str, Any]:
    """Arguments of a draw over pairs that all differ, but for what is `changed`."""
    given = {
        "epochs": torch.zeros(PAIRS, dtype=torch.int64),
        "uids": torch.arange(PAIRS) * 0x9E3779B97F4A7C1,
        "images": torch.arange(PAIRS),
        "captions": torch.arange(PAIRS)[:, None].expand(-1, 3),
    }
    return {**given, **changed, "group": GROUP, "seed": 3}


def similarity() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(PAIRS // GROUP, GROUP, GROUP, generator=generator)


@pytest.mark.parametrize("same", ["uids", "images", "captions"])
def test_a_negative_is_never_a_match(same: str) -> None:
    number = torch.arange(PAIRS)
    # The first six of a group are one sample, one picture or one caption.
    shared = torch.where(number % GROUP < 6, number // GROUP * GROUP, number)
    given = shared[:, None].expand(-1, 3) if same == "captions" else shared
    drawn = drawn_candidates(**pairs(**{same: given}))
    found = hard_negatives(drawn, similarity())
    assert found.found.all()
    for other in (found.text_of, found.image_of):
        assert not (shared[other] == shared).any()
        assert torch.equal(other // GROUP, number // GROUP)


def test_negatives_are_as_likely_as_their_softmax() -> None:
    one = torch.tensor(
        [
            [9.0 if row == column else row - 0.5 * column for column in range(GROUP)]
            for row in range(GROUP)
        ]
    ).expand(PAIRS // GROUP, -1, -1)
    found = hard_negatives(drawn_candidates(**pairs()), one)
    own = torch.arange(PAIRS) % GROUP
    for other, table in ((found.text_of, one[0]), (found.image_of, one[0].T)):
        shares = table.masked_fill(torch.eye(GROUP, dtype=torch.bool), -math.inf)
        shares = shares.softmax(1)
        counts = torch.zeros(GROUP, GROUP).index_put(
            (own, other % GROUP), torch.ones(PAIRS), accumulate=True
        )
        each = PAIRS // GROUP
        spread = (shares * (1 - shares) * each).sqrt()
        assert ((counts - shares * each).abs() <= 4 * spread + 1).all()
    assert not torch.equal(found.text_of, found.image_of)


def test_a_group_of_one_picture_has_no_negatives() -> None:
    drawn = drawn_candidates(**pairs(images=torch.zeros(PAIRS, dtype=torch.int64)))
    found = hard_negatives(drawn, similarity())
    assert not found.found.any()
    assert torch.equal(found.text_of, torch.arange(PAIRS))
    assert torch.equal(found.image_of, torch.arange(PAIRS))


def test_a_group_s_negatives_are_its_own_affair() -> None:
    drawn, scores = drawn_candidates(**pairs()), similarity()
    whole = hard_negatives(drawn, scores)
    half = PAIRS // 2
    parts = pairs()
    for name in ("epochs", "uids", "images", "captions"):
        parts[name] = parts[name][half:]
    found = hard_negatives(drawn_candidates(**parts), scores[half // GROUP :])
    assert torch.equal(found.text_of + half, whole.text_of[half:])
    assert torch.equal(found.image_of + half, whole.image_of[half:])


def test_the_most_similar_is_drawn_even_where_it_drowns_all_others() -> None:
    scores = torch.zeros(PAIRS // GROUP, GROUP, GROUP)
    scores[:, :, 3] = 100
    found = hard_negatives(drawn_candidates(**pairs()), scores)
    others = torch.arange(PAIRS) % GROUP != 3
    assert (found.text_of[others] % GROUP == 3).all()


def test_identities_are_equal_for_equal_rows_alone_whatever_their_width() -> None:
    rows = torch.tensor([[5, 6, 7, -1], [5, 6, -1, -1], [6, 5, 7, -1], [5, 6, 7, 0]])
    found = identities(rows)
    assert len(set(found.tolist())) == 4
    assert torch.equal(identities(rows[:3, :3]), found[:3])
    numbers = torch.arange(1 << 16)
    many = identities(torch.stack([numbers & 255, numbers >> 8], 1))
    assert len(many.unique()) == len(numbers)


def test_a_table_keeps_identities_of_64_bits_in_fp32() -> None:
    values = torch.tensor([0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1, 0xFFFF])
    unit = torch.randn(len(values), 6)
    table = table_of(unit, unit, values, values.flip(0))
    assert table.dtype == torch.float32
    image, text = projections(table)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(len(values)))
    assert torch.equal(image, text)
    parts = table[:, -8:-4].long()
    back = (parts << torch.arange(0, 64, 16)).sum(1)
    assert torch.equal(back, values)


@pytest.mark.parametrize(("log", "leads_back"), [(6.0, 1.0), (-3.0, -1.0)])
def test_a_temperature_past_its_bounds_can_come_back(
    log: float, leads_back: float
) -> None:
    temperature = Temperature(0.07)
    with torch.no_grad():
        temperature.log_factor.fill_(log)
    factor = temperature()
    assert float(factor.detach()) == pytest.approx(100 if log > 0 else 1)
    (gradient,) = torch.autograd.grad(leads_back * factor, temperature.log_factor)
    assert float(gradient) != 0
    (gradient,) = torch.autograd.grad(
        -leads_back * temperature(), temperature.log_factor
    )
    assert float(gradient) == 0
