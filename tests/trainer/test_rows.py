"""Samples of several steps worked out at once: the same as one by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.tiny import config
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.order import Source
from trainer.rows import Rows, rows_of

COLUMNS = Rows.__dataclass_fields__


def loader(shards: Path, *more: str) -> Loader:
    keys = config(shards, Path("unused"), "--image.flip=true", *more)
    return Loader(Dataset(shards, "train"), keys, rank=0, world_size=1)


def assert_same(ours: Rows, theirs: Rows) -> None:
    for name in COLUMNS:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("samples", [1, 64, 512])
@pytest.mark.parametrize("mixture", ["none", "weights"])
def test_a_step_is_given_the_rows_that_it_would_have_alone(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, samples: int, mixture: str
) -> None:
    monkeypatch.setattr("trainer.rows._SAMPLES_AHEAD", samples)
    reader = loader(mixed, f"--mixture={mixture}")
    steps = [0, 1, 5, 2, 30, 31, 3, *range(40, 48)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(reader.ahead.of, steps))
    for step, (drawn, rows) in zip(steps, found, strict=True):
        alone = reader.order.samples_of(step, reader.lanes)
        assert np.array_equal(drawn.lanes, alone.lanes)
        assert np.array_equal(drawn.positions, alone.positions)
        expected = rows_of(reader.dataset, reader.config, alone.places, alone.epochs)
        assert_same(rows, expected)


def test_a_step_looked_at_before_its_epoch_was_frozen_is_worked_out_anew(
    mixed: Path,
) -> None:
    reader = loader(mixed, "--mixture=none")
    order = reader.order
    whole = order.sources[0]
    fewer = Source(name="", shards=whole.shards[:-1], counts=whole.counts[:-1])
    order.sources[0] = fewer
    order.epochs[0] = order._table(0, None)
    step = order.undecided
    before, _ = reader.ahead.of(step)
    last = whole.shards[-1]
    assert last not in before.places[:, 0]
    order.decide({0: (whole, "grown")})
    found = [reader.ahead.of(step + n)[0] for n in range(order.undecided - step)]
    assert any(last in drawn.places[:, 0] for drawn in found)
    for n, drawn in enumerate(found):
        alone = order.samples_of(step + n, reader.lanes)
        assert np.array_equal(drawn.places, alone.places)
