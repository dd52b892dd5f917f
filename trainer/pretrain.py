"""`deepspeed --module trainer.pretrain --config RECIPE --data SHARDS --output RUN`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import run

PROG = "trainer.pretrain"
RECIPES = Path(__file__).parent / "recipes"
_SECONDS_TO_TELL = 60.0
DESCRIPTION = """\
Train a masked vision-language model on shards made by pipeline.preprocess.

  deepspeed --num_accelerators 2 --module trainer.pretrain --config emoji \\
      --data shards/ --output runs/first

Any key of the recipe can be given dotted: --optimizer.lr 3e-4 --mask.heavy_rate 0.7.
--model.name (or the recipe) says which model is trained, and which model keys there
are: `--model.name maskvlm --help` shows those of MaskVLM.
The same command continues a run that was stopped or killed. Nodes that share no disk
take --output s3://bucket/runs/first, or another URL.
"""


def main(argv: Sequence[str]) -> int:
    """Parse `argv`, check everything that can be checked, and train."""
    from trainer.check import check
    from trainer.loop import mark_complete, train
    from trainer.options import PretrainConfig, parse_run

    # The launcher appends this; the environment says the same.
    words = [word for word in argv if not word.startswith("--local_rank")]
    try:
        config = parse_run(
            PretrainConfig,
            words,
            prog=PROG,
            description=DESCRIPTION,
            recipes=RECIPES,
        )
        checked = check(config)
    except (ValueError, OSError):
        # Every rank of a node finds the same mistake; one of them tells, and the others
        # wait, because the launcher ends all ranks when the first one exits. Who alone
        # has failed tells in the end.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_TO_TELL)
        raise
    if checked.first_step >= config.last_step:
        if os.environ.get("RANK", "0") == "0":
            # A kill may have come between the last checkpoint and this marker.
            mark_complete(config, checked.copy, checked.first_step)
            print(
                f"{config.output} is at step {checked.first_step} of "
                f"{config.last_step} asked for: nothing left to do"
            )
        return 0
    try:
        return train(config, checked)
    finally:
        # Or the end of the process would wait for whoever waits for storage.
        checked.dataset.close()
        if checked.copy:
            checked.copy.close()


if __name__ == "__main__":
    run(main, PROG)
