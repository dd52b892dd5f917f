"""How fast, and in how much memory, candidates are compared across a corpus.

`python -m benchmarks.compare [N] [MB] [NEAR ...]` makes N signatures (default 5
million), compares them by all criteria with each of the near distances (0, 3 and 6) in
MB (64) of memory, on one core and a local disk, and prints a line per step: seconds,
candidates per second, and the peak memory of its process above that of an idle one. The
hashes are those of made-up smooth pictures, a tenth of them on a white ground: uneven,
as those of real ones are.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from pipeline.compare import (
    SIGNATURE_DTYPE,
    Comparison,
    collect,
    gather,
    match,
    scatter,
    store,
)
from pipeline.storage import Storage, open_storage

_PER_RANGE = 10_000
# Share of candidates that repeat another one's picture, source or caption.
_REPEATED = 0.1


def smooth_hashes(chance: np.random.Generator, count: int) -> np.ndarray:
    """Difference hashes of random pictures of 8 x 9 whose rows resemble each other."""
    rows = chance.normal(size=(count, 1, 9)) * 1.2
    pixels = rows + chance.normal(size=(count, 8, 9))
    pixels[chance.random(count) < 0.1, :, [[0], [1], [7], [8]]] = 9.0
    bits = (pixels[:, :, 1:] > pixels[:, :, :-1]).reshape(count, 64)
    return np.packbits(bits, axis=1).view("<u8")[:, 0]


def signatures(number: int, inputs: int) -> np.ndarray:
    """Those of one range."""
    chance = np.random.default_rng(number)
    made = np.zeros(_PER_RANGE, dtype=SIGNATURE_DTYPE)
    made["position"] = np.arange(_PER_RANGE)
    made["split"] = np.where(chance.random(_PER_RANGE) < 0.05, 0, 2)
    for name in ("uid", "sha256", "pixels", "caption"):
        made[name] = chance.integers(0, 1 << 64, made[name].shape, dtype=np.uint64)
    made["phash"] = smooth_hashes(chance, _PER_RANGE)
    again = np.flatnonzero(chance.random(_PER_RANGE) < _REPEATED)
    popular = chance.integers(0, inputs // 100, len(again), dtype=np.uint64)
    for name in ("pixels", "caption"):
        made[name][again] = popular.reshape(-1, *[1] * (made[name].ndim - 1))
    flips = np.uint64(1) << chance.integers(0, 64, (len(again), 2), dtype=np.uint64)
    originals = smooth_hashes(np.random.default_rng(0), _PER_RANGE)[again]
    made["phash"][again] = originals ^ np.bitwise_or.reduce(flips, axis=1)
    return made


def _measured(step: Callable[..., object], *given: object) -> tuple[float, float]:
    """Seconds, and the peak memory in MB, of a step in a process of its own."""
    parent, child = multiprocessing.Pipe()

    def run() -> None:
        start = time.perf_counter()
        step(*given)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        child.send((time.perf_counter() - start, peak))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    measured = parent.recv()
    process.join()
    return measured


def _store_all(storage: Storage, ranges: int, inputs: int) -> None:
    for number in range(ranges):
        made = signatures(number, inputs)
        store(storage, "c", number, committed=False, signatures=made)


def _each(
    step: Callable[..., object], storage: Storage, plan: Comparison, tasks: int
) -> None:
    for task in range(tasks):
        step(storage, "c", plan, task)


def _compare(storage: Storage, plan: Comparison, idle: float) -> None:
    steps: tuple[tuple[Callable[..., object], int], ...] = (
        (scatter, plan.groups),
        (match, plan.buckets),
        (collect, plan.groups),
        (gather, plan.ranges),
    )
    total = 0.0
    for step, tasks in steps:
        seconds, peak = _measured(_each, step, storage, plan, tasks)
        total += seconds
        print(
            f"  {step.__name__:8} {tasks:6} tasks {seconds:8.1f} s "
            f"{plan.inputs / seconds:12,.0f}/s {peak - idle:8.0f} MB",
            flush=True,
        )
    found = sum(
        len(gather(storage, "c", plan, number)) for number in range(plan.ranges)
    )
    print(f"  all {plan.inputs / total:,.0f}/s; {found:,} verdicts", flush=True)
    storage.remove_tree(f"c/{plan.folder}")


def main() -> None:
    """Run the benchmark that the module describes."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    memory = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    distances = [int(given) for given in sys.argv[3:]] or [0, 3, 6]
    ranges = -(-inputs // _PER_RANGE)
    _, idle = _measured(int)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        _store_all(storage, ranges, inputs)
        for near in distances:
            plan = Comparison(
                splits=True,
                exact=True,
                near=near,
                caption_repeats=5,
                inputs=ranges * _PER_RANGE,
                ranges=ranges,
                memory=memory * 1_000_000,
            )
            print(f"{plan.inputs:,} candidates, near {near}, {memory} MB", flush=True)
            _compare(storage, plan, idle)


if __name__ == "__main__":
    main()
