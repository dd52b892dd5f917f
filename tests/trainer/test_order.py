from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract import valid_world_sizes
from trainer.order import SampleOrder

PER_LANE = 2


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    missing = lanes * PER_LANE - sum(counts)
    if missing > 0:
        counts.append(missing)
    return SampleOrder(
        counts,
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=lanes,
        global_batch=lanes * PER_LANE,
        shuffle_shards=draw(st.integers(1, 5)),
    )


def epoch_places(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    rows = [order.samples_of(step, range(order.lanes)) for step in steps]
    return [(int(shard), int(sample)) for shard, sample in np.concatenate(rows)]


@settings(deadline=None, max_examples=80)
@given(orders(), st.integers(0, 5))
def test_an_epoch_takes_each_sample_at_most_once_and_leaves_fewer_than_a_batch(
    order: SampleOrder, epoch: int
) -> None:
    places = epoch_places(order, epoch)
    assert len(set(places)) == len(places)
    assert order.samples - len(places) < order.lanes * PER_LANE
    for shard, sample in places:
        assert 0 <= sample < order.counts[shard]


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 200))
def test_ranks_together_take_the_step_at_every_world_size(
    order: SampleOrder, step: int
) -> None:
    whole = order.samples_of(step, range(order.lanes))
    for world in valid_world_sizes(order.lanes):
        share = order.lanes // world
        parts = [
            order.samples_of(step, range(rank * share, (rank + 1) * share))
            for rank in range(world)
        ]
        assert {len(part) for part in parts} == {share * PER_LANE}
        assert np.array_equal(np.concatenate(parts), whole)


@settings(deadline=None, max_examples=30)
@given(orders(), st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_any_step_can_be_asked_for_in_any_order(
    order: SampleOrder, steps: list[int]
) -> None:
    for step in steps:
        fresh = SampleOrder(
            order.counts,
            seed=order.seed,
            lanes=order.lanes,
            global_batch=order.lanes * PER_LANE,
            shuffle_shards=order.shuffle_shards,
        )
        lanes = range(order.lanes)
        assert np.array_equal(
            order.samples_of(step, lanes), fresh.samples_of(step, lanes)
        )


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 3))
def test_lanes_are_equal_to_within_one_sample(order: SampleOrder, epoch: int) -> None:
    sizes = [
        sum(piece.stop - piece.start for piece in order.lane_pieces(epoch, lane))
        for lane in range(order.lanes)
    ]
    assert sum(sizes) == order.samples
    assert max(sizes) - min(sizes) <= 1


def test_epochs_seeds_and_leftovers_differ() -> None:
    def build(seed: int) -> SampleOrder:
        return SampleOrder(
            [31, 17, 29], seed=seed, lanes=4, global_batch=8, shuffle_shards=2
        )

    first, second = (epoch_places(build(0), epoch) for epoch in (0, 1))
    assert first != second
    assert set(first) != set(second)
    assert epoch_places(build(1), 0) != first


def test_a_dataset_of_one_shard_has_other_lanes_every_epoch() -> None:
    order = SampleOrder([600], seed=5, lanes=4, global_batch=8, shuffle_shards=1)
    starts = {order.lane_pieces(epoch, 0)[0].start for epoch in range(8)}
    assert len(starts) > 4


def test_a_window_mixes_its_shards_and_no_others() -> None:
    order = SampleOrder([50] * 8, seed=0, lanes=1, global_batch=1, shuffle_shards=4)
    windows = order.lane_pieces(0, 0)[:4]
    size = sum(piece.stop - piece.start for piece in windows)
    places = order.lane_samples(0, 0, 0, size)
    assert set(places[:, 0]) == {piece.shard for piece in windows}
    assert len(set(places[:20, 0])) > 1


def test_too_few_samples_and_uneven_lanes_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="lower global_batch"):
        SampleOrder([5], seed=0, lanes=4, global_batch=8, shuffle_shards=1)
    with pytest.raises(ValueError, match="does not divide global_batch"):
        SampleOrder([50], seed=0, lanes=3, global_batch=8, shuffle_shards=1)
