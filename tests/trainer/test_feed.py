"""Steps arrive on the device in order, whole, and the wait for them is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import config
from trainer.dataset import Dataset
from trainer.feed import Feed
from trainer.loader import Loader, StepBatch

CPU = torch.device("cpu")
STEPS = 8


def loader(shards: Path, *more: str) -> Loader:
    keys = config(shards, Path("unused"), *more)
    return Loader(Dataset(shards, "train"), keys, rank=0, world_size=1)


def slowly(batches: Iterator[StepBatch], seconds: float) -> Iterator[StepBatch]:
    for batch in batches:
        time.sleep(seconds)
        yield batch


def failing(batches: Iterator[StepBatch], after: int) -> Iterator[StepBatch]:
    for number, batch in enumerate(batches):
        if number == after:
            raise ValueError("the loader says so")
        yield batch


def test_on_a_cpu_the_device_waits_as_long_as_the_host(shards: Path) -> None:
    reader = loader(shards)
    with Feed(slowly(reader.steps(0, STEPS), 0.05), CPU) as feed:
        for step in range(STEPS):
            begun = time.perf_counter()
            batch = feed.next()
            took = time.perf_counter() - begun
            delivery = feed.ended()
            assert batch.step == step
            assert 0.05 <= delivery.waited() <= took
            assert delivery.copy_seconds() == 0


def test_what_the_loader_raises_reaches_whoever_asks(shards: Path) -> None:
    with Feed(failing(loader(shards).steps(0, STEPS), 2), CPU) as feed:
        assert [feed.next().step, feed.next().step] == [0, 1]
        with pytest.raises(ValueError, match="the loader says so"):
            feed.next()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a missing device")
def test_what_the_device_raises_reaches_whoever_asks(shards: Path) -> None:
    gpu = torch.device("cuda", 0)
    with Feed(loader(shards).steps(0, STEPS), gpu) as feed:
        for _ in range(2):
            # A torch without CUDA and one without a driver say it in their own ways.
            with pytest.raises((RuntimeError, AssertionError, AttributeError)):
                feed.next()


def equal(ours: StepBatch, theirs: StepBatch) -> bool:
    return all(
        torch.equal(one.cpu(), other)
        for mine, yours in zip(ours.micro_batches, theirs.micro_batches, strict=True)
        for one, other in zip(mine.tensors(), yours.tensors(), strict=True)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_tensor_of_every_step_arrives(shards: Path) -> None:
    gpu = torch.device("cuda")
    expected = loader(shards).steps(0, 40)
    with Feed(loader(shards).steps(0, 40), gpu) as feed:
        for theirs in expected:
            ours = feed.next()
            # Work that is still going on when the next copies begin.
            torch.cuda._sleep(20_000_000)
            kept = [
                tensor.clone() for m in ours.micro_batches for tensor in m.tensors()
            ]
            feed.ended()
            assert all(tensor.is_cuda for tensor in kept)
            assert equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_slow_loader_is_waited_for_and_a_fast_one_is_not(
    shards: Path,
) -> None:
    gpu = torch.device("cuda")
    waits = {}
    for name, seconds in (("fast", 0.0), ("slow", 0.1)):
        with Feed(slowly(loader(shards).steps(0, 12), seconds), gpu) as feed:
            deliveries, ends = [], []
            for _ in range(12):
                feed.next()
                torch.cuda._sleep(60_000_000)
                # What a step came to is known when the next one is on its way.
                if ends:
                    ends[-1].synchronize()
                deliveries.append(feed.ended())
                ends.append(torch.cuda.current_stream().record_event())
            torch.cuda.synchronize()
        waits[name] = sorted(one.waited() for one in deliveries[4:])[4]
    # Medians: the slow loader's steps are waited for, whatever else happens.
    assert waits["fast"] < waits["slow"] / 2
    assert all(one.copy_seconds() > 0 for one in deliveries)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_errors_and_an_early_end_leave_no_thread(shards: Path) -> None:
    import threading

    gpu = torch.device("cuda")
    with Feed(failing(loader(shards).steps(0, STEPS), 2), gpu) as feed:
        assert [feed.next().step, feed.next().step] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="the loader says so"):
                feed.next()
    with Feed(loader(shards).steps(0, STEPS), gpu) as feed:
        feed.next()
    assert "copy" not in {thread.name for thread in threading.enumerate()}
