"""The verdict names what limits a run, and what to do about it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.tiny import config
from trainer import folder, reading
from trainer.dataset import Dataset
from trainer.feed import Feed
from trainer.limits import Spent, Steps, verdict
from trainer.loader import Loader
from trainer.order import Drawn, SampleOrder

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    ("spent", "says"),
    [
        (
            Spent(elapsed=10, waited=0.1, decode=19),
            "compute limits the run: the device",
        ),
        (Spent(elapsed=10, waited=4, read=2, decode=17), "decode limits the run"),
        (Spent(elapsed=10, waited=4, read=15, decode=3), "storage limits the run"),
        (Spent(elapsed=10, waited=4, decode=3, copy=6), "copy limits the run"),
        (Spent(elapsed=10, waited=4, read=2, decode=3, copy=1), "host limits the run"),
    ],
)
def test_what_is_busiest_while_the_device_waits_is_named(
    spent: Spent, says: str
) -> None:
    line = verdict(spent, threads=2)
    assert line.startswith(says)
    assert "\n" not in line
    share = spent.waited / spent.elapsed
    assert f"waited {share:.1%} of the time" in line


def test_several_ranks_count_together() -> None:
    one = Spent(elapsed=5, waited=2, read=1, decode=9, copy=0)
    together = one + one + one + one
    assert together.elapsed == 20
    assert verdict(together, threads=2) == verdict(one, threads=2)


def test_the_wait_for_the_first_batch_of_a_process_is_its_start() -> None:
    steps = Steps()
    steps.add(Spent(elapsed=9, waited=8, decode=8))
    assert steps.verdict(threads=1) is None
    for _ in range(4):
        steps.add(Spent(elapsed=1, waited=0.01, decode=0.2))
    found = steps.verdict(threads=1)
    assert found is not None
    assert found.startswith("compute limits the run")
    steps.add(Spent(elapsed=1, waited=0.9, decode=0.95))
    assert (steps.verdict(threads=1) or "").startswith("decode limits the run")
    assert steps.verdict(threads=1) is None


def steps_of(
    shards: Path, pace: float, *more: str, first: int = 4, steps: int = 24
) -> str:
    """The verdict over real steps that each compute for `pace` seconds, from `first`
    on.
    """
    keys = config(shards, Path("unused"), *more)
    reader = Loader(Dataset(shards, "train"), keys, rank=0, world_size=1)
    spent = Spent()
    with Feed(reader.steps(0, steps), torch.device("cpu")) as feed:
        for number in range(steps):
            begun = time.perf_counter()
            batch = feed.next()
            time.sleep(pace)
            delivery = feed.ended()
            if number >= first:
                spent += Spent(
                    elapsed=time.perf_counter() - begun,
                    waited=delivery.waited(),
                    read=batch.read_s,
                    decode=batch.decode_s,
                )
    return verdict(spent, threads=keys.threads)


@pytest.mark.alone
def test_a_real_run_that_computes_decodes_or_reads_is_told_so(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 24 images of 32 px are made in some milliseconds.
    assert steps_of(shards, 0.8, steps=8).startswith("compute limits the run")
    # Without drawing the masks of 4,096 image tokens a pair for the digest.
    large = ("--image.size=1024", "--image.geometry=random_resized_crop")
    large += ("--digest=samples",)
    assert steps_of(shards, 0.0, *large).startswith("decode limits the run")

    def slow(*words: Any) -> int:
        time.sleep(0.01)
        return read(*words)

    read = os.preadv
    monkeypatch.setattr(os, "preadv", slow)
    assert steps_of(shards, 0.0).startswith("storage limits the run")


def test_a_wait_for_a_file_to_be_fetched_is_storage(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends before any thread can read."""

    def fetched(dataset: Dataset, shard: int) -> object:
        time.sleep(0.05)
        return opened(dataset, shard)

    opened = reading._opened
    monkeypatch.setattr(reading, "_opened", fetched)
    assert steps_of(shards, 0.0).startswith("storage limits the run")


def test_a_wait_for_indexes_is_storage_and_working_out_the_order_is_not(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(order: SampleOrder, *words: Any, **more: Any) -> Drawn:
        time.sleep(0.5)
        return samples_ahead(order, *words, **more)

    def loaded(*words: Any) -> Any:
        time.sleep(0.5)
        return load_index(*words)

    samples_ahead, load_index = SampleOrder.samples_ahead, folder.load_index
    with monkeypatch.context() as patched:
        patched.setattr(SampleOrder, "samples_ahead", slowly)
        assert steps_of(shards, 0.0, first=0).startswith("host limits the run")
    monkeypatch.setattr(folder, "load_index", loaded)
    assert steps_of(shards, 0.0, first=0).startswith("storage limits the run")
