"""`trainer.pretrain` on nodes of one rank each that share no disk:
`deepspeed --module tests.trainer.apart WORDS`. Each rank has a home of its own below
$XDG_CACHE_HOME, where its working copy and its shards lie.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config import run
from tests.conftest import deepspeed_command


def apart_command(ranks: int, *words: str | Path) -> list[str]:
    """The launcher with `ranks` ranks, each on a node of its own."""
    command = deepspeed_command(ranks, *words)
    command[command.index("trainer.pretrain")] = "tests.trainer.apart"
    return command


def home(cache: Path, rank: int) -> Path:
    """The home of a rank's node."""
    return cache / f"node-{rank}"


if __name__ == "__main__":
    from trainer.pretrain import PROG, main

    rank = int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(home(Path(os.environ["XDG_CACHE_HOME"]), rank))
    os.environ["LOCAL_RANK"] = "0"
    run(main, PROG)
