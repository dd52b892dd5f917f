"""`python -m cluster.preprocess --config run.yaml`: the first stage of a run alone.

Owns the command line. The stage is in `cluster.stages`, the whole run in `cluster.run`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.options import RunConfig
from cluster.run import drive, only
from pipeline.config import parse, run

PROG = "cluster.preprocess"
DESCRIPTION = """\
Make the shards of a run on a Ray cluster, with the same run.yaml as cluster.run:

  ray job submit --working-dir . -- python -m cluster.preprocess --config run.yaml

CPU nodes come as there are ranges to work on, and go when none are left. The same
command continues. For a corpus without a run: python -m pipeline.preprocess.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when the dataset is complete."""
    from cluster.stages import preprocess

    config = only(
        parse(RunConfig, argv, prog=PROG, description=DESCRIPTION), "preprocess"
    )
    return drive(config, [PROG, *argv], preprocess)


if __name__ == "__main__":
    run(main, PROG)
