"""Several short training runs of one recipe, some at a time, each on a core of its own.

Owns starting them and waiting. A run that is there and finished is not taken again.
Does not own what is made of them (`benchmarks.curves`, `benchmarks.ablations`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.contract import COMPLETE


def train_all(runs: Mapping[Path, Sequence[str]], *, jobs: int) -> None:
    """Train each run directory with its words of `trainer.pretrain`, `jobs` at once.

    Raises:
        ValueError: a run failed; with the end of what it said.
    """

    def train(run: Path) -> None:
        command = [sys.executable, "-m", "trainer.pretrain", f"--output={run}"]
        done = subprocess.run(
            [*command, *runs[run]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not (run / COMPLETE).exists():
            raise ValueError(f"{run} did not finish: {done.stdout[-2000:]}")
        print(f"{run.name} is trained", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, runs))
