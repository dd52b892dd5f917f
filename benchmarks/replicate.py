"""`python -m benchmarks.replicate`: the papers' claims on public data, with seeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import parse, run

PROG = "benchmarks.replicate"
DESCRIPTION = """\
Pretrain, fine-tune and measure every row of a matrix with every seed, and print tables:
each seed's value, mean, standard deviation, the paired difference from a reference over
seeds and over test items, and what the papers claim beside it.

  python -m benchmarks.replicate --work runs/replicate --dry_run
  python -m benchmarks.replicate --work runs/replicate
  python -m benchmarks.replicate --work runs/full --matrix full --minutes 6 \\
      --inputs.flickr8k flickr8k/captions.tsv --inputs.fashion fashion/items.parquet

small: emoji, hours on two cores. photos: photos and a catalogue with small models, an
hour or two on two cores. full: the papers' rows on these, on a GPU. Or a YAML file of
your own (benchmarks/replication/small.yaml shows how).

The same command continues, whenever and however it was stopped. Its status is 0 when
everything is done, 75 when time is up and stages remain, 1 when a stage has failed. A
stage that is stopped may take up to a minute more to keep what it has.
"""
_TIME_IS_UP = 75


@dataclass(frozen=True, kw_only=True)
class ReplicateConfig:
    """What to replicate, how much of it now, and where the tables go."""

    work: str
    """Folder of the replication: runs, logs, and markers of what is complete."""
    matrix: str = "small"
    """small, photos, full, or a YAML file."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Corpora that the matrix does not name itself: {flickr8k: PATH}."""
    minutes: float | None = None
    """Stop after so many minutes; null: when everything is done."""
    only: str | None = None
    """ROW,SEED: what these need and nothing else; or ROW, or ,SEED."""
    jobs: int | None = None
    """Stages at a time, each on one core. Default: one with a GPU, else one a core."""
    dry_run: bool = False
    """Say what remains, with an estimate, and do nothing."""
    output: str | None = None
    """Path of the tables, without suffix (.md, .json, .png). Default: WORK/tables."""

    def __post_init__(self) -> None:
        from trainer.options import at_least

        at_least("", self, minutes=0, jobs=1)


def main(argv: Sequence[str]) -> int:
    """Run what remains, write the tables."""
    config = parse(ReplicateConfig, argv, prog=PROG, description=DESCRIPTION)
    from benchmarks.replication.checking import check, check_inputs
    from benchmarks.replication.matrix import load
    from benchmarks.replication.schedule import Place, Schedule, locked
    from benchmarks.replication.stages import only, plan
    from benchmarks.replication.writing import (
        require_own,
        say_what_remains,
        write_tables,
    )

    # In order, as Ctrl-C: what runs keeps what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    matrix = load(config.matrix)
    place = Place(work=Path(config.work).resolve(), inputs=config.inputs)
    stages = plan(matrix, only=only(config.only))
    check_inputs(matrix, config.inputs)
    check(stages, place)
    gpu = Path("/dev/nvidiactl").exists()
    schedule = Schedule(
        place,
        stages,
        jobs=config.jobs or (1 if gpu else os.cpu_count() or 1),
        seconds=matrix.seconds,
        threads=None if gpu else 1,
    )
    output = Path(config.output) if config.output else place.work / "tables"
    require_own(output)
    if config.dry_run:
        say_what_remains(schedule)
        return 0
    with locked(place.work) as lock:
        try:
            failed = schedule.run(minutes=config.minutes, lock=lock)
        finally:
            write_tables(matrix, place, output)
    for name, said in failed.items():
        print(f"{name} failed: {said}")
    if failed:
        return 1
    return _TIME_IS_UP if schedule.remaining() else 0


if __name__ == "__main__":
    run(main, PROG)
