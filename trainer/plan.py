"""`python -m trainer.plan --config RECIPE --data DIR --gpus N --gpu h200`.

Owns the command. Its keys are in `trainer.plan_options`, the plan in
`trainer.plan_run`, the text in `trainer.plan_text`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import run
from trainer.options import parse_run
from trainer.plan_options import PlanConfig

PROG = "trainer.plan"
RECIPES = Path(__file__).parent / "recipes"
DESCRIPTION = """\
What a training run will take, before anyone rents a GPU: parameters, memory by ZeRO
stage, steps, hours, reading and decoding, checkpoints, cost. Nothing is trained and no
GPU is needed.

  python -m trainer.plan --config emoji --data shards/ --gpus 8 --gpu h200
  python -m trainer.plan --config emoji --gpus 4 --gpu a100-80 --mfu 0.3 --price 1.9
  python -m trainer.plan --config emoji --data shards/ --gpus 8 --gpu h200 \\
      --global_batch 4096 --micro_batch 256 --json

It takes every key of trainer.pretrain beside its own (gpus, gpu, mfu, headroom, price,
vocab_size, text_tokens, decode, json), and refuses what pretrain would refuse. Step
time follows from the model's FLOPs and an assumed utilisation (--mfu): put in the mfu
that your own run wrote to metrics.jsonl. Without --data, lengths and sizes are assumed,
and it says which.
"""


def main(argv: Sequence[str]) -> int:
    """Plan, and print the plan."""
    config = parse_run(
        PlanConfig, argv, prog=PROG, description=DESCRIPTION, recipes=RECIPES
    )
    from trainer.plan_run import as_json, plan
    from trainer.plan_text import text

    found = plan(config)
    print(jsonlib.dumps(as_json(found), indent=1) if config.json else text(found))
    return 0


if __name__ == "__main__":
    run(main, PROG)
