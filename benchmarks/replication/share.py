"""`python -m benchmarks.replication.share DATASET --fraction F --output FILE`.

Owns which training pairs a smaller share of a dataset consists of: those whose uid,
itself a hash, lies below that share of all uids, so that a smaller share is part of a
larger one. Does not own making it: pipeline.preprocess leaves out the uids of FILE
(`--deny_uids`), and held-out pairs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import parse, run
from trainer.files import write_text

PROG = "benchmarks.replication.share"
DESCRIPTION = """\
List the uids of the training pairs that a smaller share of a dataset lacks.

  python -m benchmarks.replication.share shards --fraction 0.25 --output denied.txt
  python -m pipeline.preprocess ... --deny_uids denied.txt --tokenizer shards/tokenizer
"""


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """Which share of what."""

    data: str
    """Dataset directory (the first word of the command)."""
    fraction: float
    """Share of the training pairs that is kept."""
    output: str
    """File of the uids that are not."""
    split: str = "train"
    """Split that is made smaller."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}: above 0, at most 1")


def denied(data: Path, *, split: str, fraction: float) -> np.ndarray:
    """Sorted uids (N,) uint64 of a split that a share of it lacks.

    Raises:
        ValueError: no such split.
    """
    files = sorted((data / split).glob("*.index.npy"))
    if not files:
        raise ValueError(f"{data} has no shards of split {split!r}")
    uids = np.concatenate([np.load(file)["uid"] for file in files])
    # uint64 holds no 2^64.
    limit = min(int(fraction * 2**64), 2**64 - 1)
    return np.sort(uids[uids > np.uint64(limit)])


def main(argv: Sequence[str]) -> None:
    """Write the list."""
    config = parse(
        ShareConfig, argv, prog=PROG, description=DESCRIPTION, positional="data"
    )
    uids = denied(Path(config.data), split=config.split, fraction=config.fraction)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(f"{uid:016x}\n" for uid in uids.tolist()))
    print(f"{len(uids)} uids: {output}")


if __name__ == "__main__":
    run(main, PROG)
