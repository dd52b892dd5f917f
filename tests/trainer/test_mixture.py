"""Mixtures: exact shares, epochs of their own, pure and the same for any ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.tiny import again, same_drawn
from trainer import order as order_module
from trainer.contract import valid_world_sizes
from trainer.lanes import EpochLanes
from trainer.mixture import BLOCK, Mixture, shares
from trainer.order import Began, SampleOrder, Source

weights = st.dictionaries(
    st.sampled_from("abcdefg"), st.floats(0.05, 20.0), min_size=2, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(weights)
def test_shares_add_up_and_are_within_one_draw_of_exact(
    given_weights: dict[str, float],
) -> None:
    found = shares(given_weights)
    exact = np.array(list(given_weights.values())) / sum(given_weights.values()) * BLOCK
    assert found.sum() == BLOCK
    assert np.abs(found - exact).max() < 1
    # Largest remainder: whoever was rounded up had more left over than who was not.
    left = exact - np.floor(exact)
    up = found > np.floor(exact)
    if up.any() and not up.all():
        assert left[up].min() >= left[~up].max()


@settings(deadline=None, max_examples=25)
@given(weights, st.integers(0, 2**64 - 1), st.integers(0, 40), st.integers(0, 3))
def test_every_block_of_every_lane_holds_the_exact_shares(
    given_weights: dict[str, float], seed: int, block: int, lane: int
) -> None:
    per_block = shares(given_weights)
    mixture = Mixture(per_block, seed=seed, epoch_base=0, blocks_kept=2)
    source, turn = mixture.between(lane, block * BLOCK, (block + 1) * BLOCK)
    assert np.bincount(source, minlength=len(per_block)).tolist() == per_block.tolist()
    for number, share in enumerate(per_block.tolist()):
        first = block * share
        assert turn[source == number].tolist() == list(range(first, first + share))
    other, _ = mixture.between(lane + 1, block * BLOCK, (block + 1) * BLOCK)
    assert (source != other).any()


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6]))
    per_lane = draw(st.integers(1, 5))
    sources = [
        Source.of(
            [lanes, *draw(st.lists(st.integers(1, 30), max_size=6))],
            name=name,
            weight=draw(st.floats(0.1, 5.0)),
        )
        for name in "abc"[: draw(st.integers(2, 3))]
    ]
    return SampleOrder(
        sources,
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=lanes,
        global_batch=lanes * per_lane,
        shuffle_shards=draw(st.integers(1, 4)),
    )


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 5_000))
def test_a_step_is_pure_and_the_same_at_every_world_size(
    order: SampleOrder, step: int
) -> None:
    whole = order.samples_of(step, range(order.lanes))
    for world in valid_world_sizes(order.lanes):
        share = order.lanes // world
        parts = [
            again(order).samples_of(step, range(rank * share, (rank + 1) * share))
            for rank in range(world)
        ]
        same_drawn(whole, parts)


@settings(deadline=None, max_examples=25)
@given(orders(), st.integers(0, 3_000), st.integers(1, 6))
def test_steps_worked_out_together_are_those_worked_out_alone(
    order: SampleOrder, step: int, most: int
) -> None:
    order.decided_before(step + 1)
    lanes = range(order.lanes)
    together = order.samples_ahead(step, lanes, most=most)
    steps, rest = divmod(len(together), order.lanes * order.per_lane)
    assert rest == 0
    assert 1 <= steps <= max(min(most, order.undecided - step), 1)
    alone = [again(order).samples_of(step + n, lanes) for n in range(steps)]
    same_drawn(together, alone)


@settings(deadline=None, max_examples=25)
@given(orders())
def test_each_source_takes_each_sample_at_most_once_an_epoch_and_wraps_at_its_lanes(
    order: SampleOrder,
) -> None:
    steps = min(3 * BLOCK // order.per_lane, 400)
    seen: dict[tuple[int, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    turns: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        drawn = order.samples_of(step, range(order.lanes))
        for row in range(len(drawn)):
            source, epoch = int(drawn.sources[row]), int(drawn.epochs[row])
            seen[source, epoch][tuple(drawn.places[row].tolist())] += 1
            # A lane takes its source's positions one after another, epoch by epoch.
            lane = int(drawn.lanes[row])
            per_epoch = int(order.sources[source].counts.sum()) // order.lanes
            expected = divmod(turns[source, lane], per_epoch)
            assert (epoch, int(drawn.positions[row])) == expected
            turns[source, lane] += 1
    for (source, _), places in seen.items():
        assert set(places.values()) == {1}
        counts = order.sources[source].counts
        assert all(0 <= sample < counts[shard] for shard, sample in places)


@settings(deadline=None, max_examples=30)
@given(orders(), st.integers(0, 3_000))
def test_no_step_needs_an_epoch_before_it_is_frozen(
    order: SampleOrder, step: int
) -> None:
    frozen_by_resume = again(order)
    frozen_by_resume.decided_before(step)
    while order.undecided < step:
        order.decide({})
    assert order.undecided == frozen_by_resume.undecided
    drawn = order.samples_of(step, range(order.lanes))
    while order.undecided <= step:
        order.decide({})
    for number in range(len(order.sources)):
        used = drawn.epochs[drawn.sources == number]
        assert not len(used) or used.max() <= order.decided(number)


def test_sources_differ_in_their_order_and_sources_have_lanes_of_their_own() -> None:
    twins = [Source.of([40] * 5, name="a"), Source.of([40] * 5, name="b")]
    order = SampleOrder(twins, seed=1, lanes=2, global_batch=2, shuffle_shards=2)
    first, second = (order.lanes_of(number, 0) for number in (0, 1))
    assert first.between(0, 0, 100).tolist() != second.between(0, 0, 100).tolist()


def test_a_share_too_small_and_a_source_too_small_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="'b' has a share below one in 1,000"):
        shares({"a": 10_000.0, "b": 1.0})
    small = [Source.of([50], name="a"), Source.of([3], name="b")]
    with pytest.raises(ValueError, match=r"3 samples of source 'b'.* lower lanes"):
        SampleOrder(small, seed=0, lanes=4, global_batch=4, shuffle_shards=1)


@settings(deadline=None, max_examples=30)
@given(orders(), st.integers(1, 400))
def test_epochs_are_told_as_they_are(order: SampleOrder, steps: int) -> None:
    """The highest is the highest that any lane has drawn from; that of a step is what
    its sources have on average, so no more than the highest before its end.
    """
    lanes = range(order.lanes)
    drawn = [order.samples_of(step, lanes).epochs for step in range(steps)]
    assert order.last_epoch(steps) == max(int(each.max()) for each in drawn)
    assert 0 <= order.epoch_of(steps - 1) <= order.last_epoch(steps)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**64 - 1))
def test_the_highest_epoch_is_that_of_the_lane_that_is_furthest(
    data: st.DataObject, seed: int
) -> None:
    """Of more lanes than are looked at together, at steps at which no lane, some or all
    have come to an epoch that their block holds.
    """
    lanes, per_lane = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 7))
    turns = data.draw(st.lists(st.integers(1, 900), min_size=2, max_size=5))
    sources = [
        Source.of([lanes * length], name=name, weight=data.draw(st.floats(0.1, 5.0)))
        for name, length in zip("abcde", turns, strict=False)
    ]
    order = SampleOrder(
        sources,
        seed=seed,
        lanes=lanes,
        global_batch=lanes * per_lane,
        shuffle_shards=1,
        began=Began(step=3, epoch=2),
    )
    mixture = order.mixture
    assert mixture
    for draws in data.draw(st.lists(st.integers(0, 3_500), min_size=5, max_size=5)):
        step = draws // per_lane
        highest = np.zeros(len(sources), dtype=np.int64)
        for lane in range(lanes):
            source, _ = mixture.between(lane, 0, max(step * per_lane, 1))
            drawn = np.bincount(source[: step * per_lane], minlength=len(sources))
            highest = np.maximum(highest, drawn)
        epochs = [max(n - 1, 0) // t for n, t in zip(highest, turns, strict=True)]
        assert order.last_epoch(3 + step) == max(epochs) + 2


def test_no_epoch_of_a_small_source_is_worked_out_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a block its lanes are in many epochs at once, and the large source's
    windows must not be lost to them.
    """
    made: list[tuple[int, int]] = []

    class Counted(EpochLanes):
        def __init__(self, *words: Any, source: int, epoch: int, **more: Any) -> None:
            super().__init__(*words, source=source, epoch=epoch, **more)
            made.append((source, epoch))

    monkeypatch.setattr(order_module, "EpochLanes", Counted)
    sources = [
        Source.of([5_000] * 40, name="large", weight=1),
        Source.of([30], name="small", weight=1),
    ]
    order = SampleOrder(sources, seed=1, lanes=12, global_batch=48, shuffle_shards=4)
    for step in range(300):
        order.samples_of(step, range(12))
    assert len(made) == len(set(made)) > 200


def test_small_sources_of_a_mixture_have_epochs_long_before_a_block_is_drawn() -> None:
    sources = [
        Source.of([120], name="photos", weight=3),
        Source.of([40], name="shop", weight=1),
    ]
    order = SampleOrder(sources, seed=3, lanes=4, global_batch=8, shuffle_shards=1)
    # Of 80 draws of a lane 60 are photos, 30 an epoch, and 20 of the shop, 10 an epoch.
    assert order.epoch_of(40) == 2
    assert order.last_epoch(40) in (1, 2)
