"""`python -m cluster.status RUN`: how a run stands, for people or as JSON.

Owns the command line and the redrawing. What is read is in `cluster.standing`, the text
in `cluster.status_text`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import parse, run

PROG = "cluster.status"
DESCRIPTION = """\
Show how a run stands: its stage and progress, nodes by type and what they have cost so
far, throughput, restarts and their causes, and how long it will take.

  python -m cluster.status /shared/runs/first
  python -m cluster.status s3://bucket/runs/first --watch
  python -m cluster.status /shared/runs/first --json | jq .stages

It reads the run's directory alone: no cluster need be up, and no driver alive. Where
the driver's last sign of life is a minute old or more, it listens for another for half
a minute before it calls the driver gone: clocks may differ. Costs are of the nodes that
drivers saw while they ran; prices come from run.yaml.
"""


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Which run to show, and how."""

    run: str
    """`output` of the run: a directory or URL (the first word of the command)."""
    watch: bool = False
    """Show it again and again, until interrupted or the run has ended."""
    every: float = 5.0
    """Seconds between two looks."""
    json: bool = False
    """Print JSON; with --watch a line for each look."""

    def __post_init__(self) -> None:
        if not self.every > 0:
            raise ValueError(f"every is {self.every}: it must be above 0 seconds")


def main(argv: Sequence[str]) -> None:
    """Print how a run stands."""
    from cluster.standing import standing
    from cluster.status_text import text

    config = parse(
        StatusConfig, argv, prog=PROG, description=DESCRIPTION, positional="run"
    )
    clock_s = 0.0
    while True:
        found = standing(config.run, clock_s=clock_s, tell=_tell)
        clock_s = found.clock_s
        if config.json:
            indent = None if config.watch else 1
            print(json.dumps(dataclasses.asdict(found), indent=indent), flush=True)
        else:
            shown = text(found)
            if config.watch and sys.stdout.isatty():
                # What does not fit would scroll, and pile up above.
                rows = shutil.get_terminal_size().lines - 1
                shown = "\x1b[H\x1b[J" + "\n".join(shown.split("\n")[:rows])
            print(shown, flush=True)
        if not config.watch or found.state != "running":
            return
        time.sleep(config.every)


def _tell(line: str) -> None:
    """Beside what is asked for, which may be JSON."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, PROG)
