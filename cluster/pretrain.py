"""`python -m cluster.pretrain --config run.yaml`: the pretrain stage of a run alone.

Owns the command line alone: keys are in `cluster.options`, the stage in
`cluster.elastic`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from cluster.journal import Journal
from cluster.options import RunConfig
from cluster.run import drive, only
from pipeline.config import parse, run

PROG = "cluster.pretrain"
DESCRIPTION = """\
Train on nodes that come, go and die, with the same run.yaml as cluster.run:

  ray job submit --working-dir . -- python -m cluster.pretrain --config run.yaml

Starts on as many nodes as there are between pretrain.min_nodes and max_nodes, goes on
with fewer when some are taken away, and grows again when they return. The same command,
submitted again, continues from the last complete checkpoint.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when all steps are taken."""
    config = parse(RunConfig, argv, prog=PROG, description=DESCRIPTION)
    return drive(only(config, "pretrain"), [PROG, *argv], _stages)


def _stages(
    config: RunConfig,
    journal: Journal,
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    from cluster.stages import train

    train(config, journal, stop=stop)


if __name__ == "__main__":
    run(main, PROG)
