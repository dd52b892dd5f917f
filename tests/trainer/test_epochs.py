"""Growing sources: epochs over frozen prefixes, and the run a pure function of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.epochs import Epochs, Frozen
from trainer.order import Began, SampleOrder, Source

LANES, PER_LANE = 3, 2
BATCH = LANES * PER_LANE


def build(
    counts: list[int], frozen: list[Frozen] | None = None, began: Began | None = None
) -> SampleOrder:
    return SampleOrder(
        [Source.of(counts)],
        seed=9,
        lanes=LANES,
        global_batch=BATCH,
        shuffle_shards=2,
        frozen=[frozen] if frozen else None,
        began=began,
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(BATCH, 40), min_size=2, max_size=12), st.data())
def test_each_epoch_covers_what_was_committed_when_it_was_frozen(
    counts: list[int], data: st.DataObject
) -> None:
    """A run beside a preprocess job, against a table worked out by hand."""
    known = data.draw(st.integers(1, len(counts)))
    order = build(counts[:known])
    seen, steps = [known], 0
    for _ in range(6):
        while order.undecided <= steps + 2:
            known = data.draw(st.integers(known, len(counts)))
            order.decide({0: (Source.of(counts[:known]), f"{known}")})
            seen.append(known)
        steps += sum(counts[: seen[len(seen) - 2]]) // BATCH
    whole = build(counts, list(order.epochs[0].frozen))
    step = 0
    for epoch, shards in enumerate(seen[:-1]):
        samples = sum(counts[:shards])
        taken = []
        for within in range(samples // BATCH):
            assert order.epoch_of(step) == epoch
            assert order.epoch_steps(step) == (within, samples // BATCH)
            places = order.samples_of(step, range(LANES)).places
            # Who learns of the table later works out the same.
            assert np.array_equal(places, whole.samples_of(step, range(LANES)).places)
            taken += [tuple(place) for place in places.tolist()]
            step += 1
        assert len(set(taken)) == len(taken) > samples - BATCH
        assert {shard for shard, _ in taken} <= set(range(shards))


def test_a_table_finds_every_turn_and_the_beginning_of_every_epoch() -> None:
    frozen = [
        Frozen(first=0, shards=1, records="a"),
        Frozen(first=20, shards=3, records="b"),
        Frozen(first=50, shards=4, records="c"),
    ]
    table = Epochs(frozen, lambda shards: 10 * shards)
    epochs, within = table.locate(np.array([0, 9, 10, 19, 20, 49, 50, 89, 90, 1_000]))
    assert epochs.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 26]
    assert within.tolist() == [0, 9, 0, 9, 0, 29, 0, 39, 0, 30]
    assert [table.first_turn(epoch) for epoch in range(6)] == [0, 10, 20, 50, 90, 130]
    assert [table.shards(epoch) for epoch in range(6)] == [1, 1, 3, 4, 4, 4]


def test_after_other_data_steps_count_anew_in_epochs_that_none_has_had() -> None:
    counts = [20, 30, 11]
    order = build(counts, began=Began(step=17, epoch=5))
    plain = build(counts)
    assert order.epoch_of(17) == 5
    assert order.epoch_steps(17) == (0, sum(counts) // BATCH)
    lanes = range(LANES)
    other = order.samples_of(17, lanes)
    assert set(other.epochs.tolist()) == {5}
    per_epoch = sum(counts) // BATCH
    same = plain.samples_of(5 * per_epoch, lanes)
    assert np.array_equal(other.places, same.places)


def test_an_epoch_looked_at_before_it_was_frozen_is_worked_out_anew() -> None:
    counts = [20, 30, 11, 24]
    ahead, fresh = (build(counts[:2]) for _ in range(2))
    first = sum(counts[:2]) // BATCH
    lanes = range(LANES)
    ahead.samples_of(first, lanes)
    for order in (ahead, fresh):
        order.decide({0: (Source.of(counts), "later")})
    for step in range(first, first + sum(counts) // BATCH):
        ours, theirs = (one.samples_of(step, lanes) for one in (ahead, fresh))
        assert np.array_equal(ours.places, theirs.places)
