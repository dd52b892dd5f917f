"""How long it takes to say which samples a rank of a huge run takes at any step.

    python -m benchmarks.placement [--ranks 1024] [--shards 100000] [--samples 10000]

No images: the order alone. A rank is asked for a step that it has never been near
(after a restart: cold), then for the next ones (warm). Prints the median and the worst,
and the peak memory of the process; writes `benchmarks/results/placement.json`, the
result that comes with the code: a trial belongs elsewhere, --output /tmp/trial.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loader_data import ROOT
from trainer.order import SampleOrder, Source

RESULTS = ROOT / "benchmarks" / "results" / "placement.json"
_WARM_STEPS = 20


def build(given: argparse.Namespace, counts: Sequence[int]) -> SampleOrder:
    """The order of the run, as a rank makes it when it starts."""
    sources = [Source.of(counts, name="large")]
    if given.beside:
        sources.append(Source.of([given.beside], name="small"))
    return SampleOrder(
        sources,
        seed=given.seed,
        lanes=given.lanes or given.ranks,
        global_batch=given.global_batch,
        shuffle_shards=given.shuffle_shards,
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times in milliseconds, memory in MiB."""
    counts = [given.samples] * given.shards
    before = _peak()
    begun = time.perf_counter()
    order = build(given, counts)
    construct = time.perf_counter() - begun
    steps = sum(counts) // given.global_batch
    share = order.lanes // given.ranks
    draw = random.Random(given.seed)
    cold, warm = [], []
    for _ in range(given.places):
        order = build(given, counts)
        rank = draw.randrange(given.ranks)
        step = draw.randrange(given.epochs * steps - _WARM_STEPS)
        lanes = range(rank * share, (rank + 1) * share)
        for number in range(_WARM_STEPS):
            begun = time.perf_counter()
            found = order.samples_of(step + number, lanes)
            took = time.perf_counter() - begun
            (warm if number else cold).append(took)
            assert len(found) == given.global_batch // given.ranks
    return {
        "construct_ms": construct * 1e3,
        "cold_ms": statistics.median(cold) * 1e3,
        "cold_worst_ms": max(cold) * 1e3,
        "warm_ms": statistics.median(warm) * 1e3,
        "warm_worst_ms": max(warm) * 1e3,
        "memory_mib": _peak() - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--lanes", type=int, help="default: one for each rank")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument(
        "--beside",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="of a second source, one shard, from which half of the pairs are drawn",
    )
    parser.add_argument("--global_batch", type=int, default=16_384)
    parser.add_argument("--shuffle_shards", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--places", type=int, default=50, help="(rank, step) tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help="file of the result; default: benchmarks/results/placement.json",
    )
    given = parser.parse_args(argv)
    found = measure(given)
    ms = {name: f"{value:.3f} ms" for name, value in found.items()}
    print(
        f"{given.ranks:,} ranks, {given.shards:,} shards of {given.samples:,} samples, "
        f"{given.beside:,} samples beside them\n"
        f"construct       {ms['construct_ms']}\n"
        f"any step, cold  {ms['cold_ms']}, worst {ms['cold_worst_ms']}\n"
        f"the next ones   {ms['warm_ms']}, worst {ms['warm_worst_ms']}\n"
        f"memory          {found['memory_mib']:.0f} MiB"
    )
    result = {
        "command": "python -m benchmarks.placement",
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{key: value for key, value in vars(given).items() if key != "output"},
        **{key: round(value, 4) for key, value in found.items()},
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(given.output)


if __name__ == "__main__":
    main()
