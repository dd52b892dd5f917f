"""`python -m trainer.replay RUN --step N`: what was in the batch of a step.

Owns the command. What is read is in `trainer.replay_data`, the text in
`trainer.replay_text`, the page in `trainer.replay_page`.
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import parse, run

PROG = "trainer.replay"
DESCRIPTION = """\
Show what was in the batch of one step of a run, such as the one where the loss spiked.
Samples, captions, crops and masks follow from the run's configuration and dataset, so
any step, past or future, is made at once, without a model or the steps before it.

  python -m trainer.replay runs/first --step 4711
  python -m trainer.replay runs/first --step 4711 --html step.html --pairs 64
  python -m trainer.replay runs/first --step 4711 --rank 3 --world_size 8

Steps are counted as in metrics.jsonl and the report: the first one is 1, and
checkpoints/step-00000200 comes after step 200. The step's sample_digest is computed and
compared with the recorded one; the exit status is 1 where they differ.
"""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Which step to show, and how much of it."""

    run: str
    """Run directory that trainer.pretrain wrote, or its URL (the first word of the
    command)."""
    step: int
    """Step as metrics.jsonl counts: from 1, also beyond the end of the schedule."""
    data: list[str] | str | None = None
    """Dataset directory, where it has moved since the run; of a run on several, every
    one of them, in the same order: [photos, tables]."""
    lane: int | None = None
    """Show only this lane of the sample order, from 0."""
    rank: int | None = None
    """Show only what this rank reads, from 0; with --world_size."""
    world_size: int | None = None
    """How many ranks --rank is one of."""
    pairs: int | None = None
    """Show at most this many pairs, the first ones; null for all."""
    html: str | None = None
    """Also write a page with every pair's image; with --pairs where a step is large."""
    json: str | None = None
    """Also write everything as JSON, with the positions that are masked."""


def main(argv: Sequence[str]) -> int:
    """Make the step's batch, print it and write what is asked for."""
    config = parse(
        ReplayConfig, argv, prog=PROG, description=DESCRIPTION, positional="run"
    )
    from trainer.files import write_text
    from trainer.local_run import local_run
    from trainer.replay_data import as_json, replay
    from trainer.replay_page import page
    from trainer.replay_text import text

    with local_run(config.run) as folder:
        found = replay(
            folder,
            step=config.step,
            data=config.data,
            lane=config.lane,
            rank=config.rank,
            world_size=config.world_size,
            limit=config.pairs,
            pictures=config.html is not None,
        )
    if config.json:
        write_text(_file(config.json), jsonlib.dumps(as_json(found), indent=1) + "\n")
    if config.html:
        write_text(_file(config.html), page(found))
    _print(text(found))
    return int(found.digest.matches is False)


def _file(name: str) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return Path(name)


def _print(lines: str) -> None:
    try:
        print(lines, flush=True)
    except BrokenPipeError:
        # `| head` has seen enough; Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run(main, PROG)
