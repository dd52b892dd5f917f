"""Order of one source: every sample at most once an epoch, the same for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.tiny import again, same_drawn, steps_per_epoch
from trainer.contract import valid_world_sizes
from trainer.order import SampleOrder, Source

PER_LANE = 2


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    missing = lanes * PER_LANE - sum(counts)
    if missing > 0:
        counts.append(missing)
    return SampleOrder(
        [Source.of(counts)],
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=lanes,
        global_batch=lanes * PER_LANE,
        shuffle_shards=draw(st.integers(1, 5)),
    )


def epoch_places(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    first = epoch * steps_per_epoch(order)
    rows = [
        order.samples_of(step, range(order.lanes)).places
        for step in range(first, first + steps_per_epoch(order))
    ]
    return [(int(shard), int(sample)) for shard, sample in np.concatenate(rows)]


@settings(deadline=None, max_examples=80)
@given(orders(), st.integers(0, 5))
def test_an_epoch_takes_each_sample_at_most_once_and_leaves_fewer_than_a_batch(
    order: SampleOrder, epoch: int
) -> None:
    places = epoch_places(order, epoch)
    counts = order.sources[0].counts
    assert len(set(places)) == len(places)
    assert counts.sum() - len(places) < order.lanes * PER_LANE
    for shard, sample in places:
        assert 0 <= sample < counts[shard]


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 200))
def test_ranks_together_take_the_step_at_every_world_size(
    order: SampleOrder, step: int
) -> None:
    whole = order.samples_of(step, range(order.lanes)).places
    for world in valid_world_sizes(order.lanes):
        share = order.lanes // world
        parts = [
            again(order).samples_of(step, range(rank * share, (rank + 1) * share))
            for rank in range(world)
        ]
        assert {len(part) for part in parts} == {share * PER_LANE}
        assert np.array_equal(np.concatenate([part.places for part in parts]), whole)


@settings(deadline=None, max_examples=30)
@given(orders(), st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_any_step_can_be_asked_for_in_any_order(
    order: SampleOrder, steps: list[int]
) -> None:
    lanes = range(order.lanes)
    for step in steps:
        asked, fresh = (one.samples_of(step, lanes) for one in (order, again(order)))
        assert np.array_equal(asked.places, fresh.places)
        assert (
            set(asked.epochs)
            == {order.epoch_of(step)}
            == {step // steps_per_epoch(order)}
        )


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 60), st.integers(1, 9))
def test_steps_worked_out_together_are_those_worked_out_alone(
    order: SampleOrder, step: int, most: int
) -> None:
    order.decided_before(step + 1)
    lanes = range(order.lanes)
    together = order.samples_ahead(step, lanes, most=most)
    steps, rest = divmod(len(together), order.lanes * PER_LANE)
    within, per_epoch = order.epoch_steps(step) or (0, 0)
    assert rest == 0
    assert steps == min(most, per_epoch - within)
    alone = [again(order).samples_of(step + n, lanes) for n in range(steps)]
    same_drawn(together, alone)


def lane_sizes(order: SampleOrder, epoch: int) -> list[int]:
    built = order.lanes_of(0, epoch)
    pieces = [built.pieces(lane) for lane in range(order.lanes)]
    return [int((piece.stop - piece.start).sum()) for piece in pieces]


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 3))
def test_lanes_are_equal_to_within_one_sample(order: SampleOrder, epoch: int) -> None:
    sizes = lane_sizes(order, epoch)
    assert sum(sizes) == order.sources[0].counts.sum()
    assert max(sizes) - min(sizes) <= 1
    built = order.lanes_of(0, epoch)
    assert sizes == [built.length(lane) for lane in range(order.lanes)]


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 60))
def test_after_a_sample_come_all_others_of_its_lane_and_then_those_of_the_next(
    order: SampleOrder, step: int
) -> None:
    drawn = order.samples_of(step, range(order.lanes))
    row = step % len(drawn)
    after = np.concatenate(list(order.following(drawn, row))).tolist()
    lane = int(drawn.lanes[row])
    built = order.lanes_of(0, int(drawn.epochs[row]))
    ring = built.between(lane, 0, built.length(lane)).tolist()
    at = int(drawn.positions[row])
    assert ring[at] == drawn.places[row].tolist()
    others = [number % order.lanes for number in range(lane + 1, lane + order.lanes)]
    expected = ring[at + 1 :] + ring[:at]
    for other in others:
        length = built.length(other)
        ring = built.between(other, 0, length).tolist()
        begin = (at + length // 2) % length
        expected += ring[begin:] + ring[:begin]
    assert after == expected


def test_a_lost_lane_has_as_many_samples_in_its_place_and_none_of_the_same_step() -> (
    None
):
    order = SampleOrder(
        [Source.of([40] * 6)], seed=2, lanes=12, global_batch=24, shuffle_shards=2
    )
    steps, stand_ins = range(10), []
    for step in steps:
        drawn = order.samples_of(step, range(12))
        for row in np.flatnonzero(drawn.lanes == 5).tolist():
            of_lane = order.lanes_of(0, 0).length(5)
            ring = np.concatenate(list(order.following(drawn, row))).tolist()
            stand_ins.append(tuple(ring[of_lane - 1]))
            assert list(stand_ins[-1]) not in drawn.places.tolist()
    assert len(set(stand_ins)) == len(stand_ins) == 20


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 60), st.integers(2, 3))
def test_the_shards_of_the_coming_steps_are_known_ahead(
    order: SampleOrder, step: int, windows: int
) -> None:
    order.decided_before(step + 1)
    lanes = range(order.lanes)
    ahead = order.shards_ahead(step, lanes, windows=windows)
    assert len(set(ahead)) == len(ahead)
    assert set(order.samples_of(step, lanes).places[:, 0].tolist()) <= set(ahead)


def test_epochs_seeds_and_leftovers_differ() -> None:
    def build(seed: int) -> SampleOrder:
        return SampleOrder(
            [Source.of([31, 17, 29])],
            seed=seed,
            lanes=4,
            global_batch=8,
            shuffle_shards=2,
        )

    first, second = (epoch_places(build(0), epoch) for epoch in (0, 1))
    assert first != second
    assert set(first) != set(second)
    assert epoch_places(build(1), 0) != first


def test_a_dataset_of_one_shard_has_other_lanes_every_epoch() -> None:
    order = SampleOrder(
        [Source.of([600])], seed=5, lanes=4, global_batch=8, shuffle_shards=1
    )
    starts = {int(order.lanes_of(0, epoch).pieces(0).start[0]) for epoch in range(8)}
    assert len(starts) > 4


def test_a_window_mixes_its_shards_and_no_others() -> None:
    order = SampleOrder(
        [Source.of([50] * 8)], seed=0, lanes=1, global_batch=1, shuffle_shards=4
    )
    built = order.lanes_of(0, 0)
    pieces = built.pieces(0)
    places = built.between(0, 0, int(pieces.window_ends[0]))
    assert set(places[:, 0].tolist()) == set(pieces.shard[:4].tolist())
    assert len(set(places[:20, 0].tolist())) > 1


def test_shards_of_very_different_sizes_and_fewer_than_lanes_have_whole_lanes() -> None:
    for counts in ([1] * 100 + [3_000], [7], [1, 1, 1, 21], [25]):
        order = SampleOrder(
            [Source.of(counts)], seed=3, lanes=6, global_batch=6, shuffle_shards=2
        )
        for epoch in range(3):
            places = epoch_places(order, epoch)
            assert len(set(places)) == len(places) == sum(counts) // 6 * 6


def test_too_few_samples_and_uneven_lanes_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="lower global_batch"):
        SampleOrder([Source.of([5])], seed=0, lanes=4, global_batch=8, shuffle_shards=1)
    with pytest.raises(ValueError, match="does not divide global_batch"):
        SampleOrder(
            [Source.of([50])], seed=0, lanes=3, global_batch=8, shuffle_shards=1
        )
