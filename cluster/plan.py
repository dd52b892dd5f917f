"""`python -m cluster.plan --config run.yaml --gpu KIND`.

Owns the command. Its keys are in `cluster.plan_options`, the plan in
`cluster.plan_run`, the text in `cluster.plan_text`, the picture in
`cluster.plan_picture`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path

from cluster.plan_options import PlanConfig
from pipeline.config import ConfigError, parse, run

PROG = "cluster.plan"
DESCRIPTION = """\
Nodes, hours and cost of a run, before anything starts: the corpus by a dry run of
pipeline.preprocess, the recipe by trainer.plan, and what preemptions cost by simulating
them, with the best interval between checkpoints. Nothing is rented or written.

  python -m cluster.plan --config run.yaml --gpu h100
  python -m cluster.plan --config run.yaml --gpu h100 --cluster cluster/aws.yaml \\
      --prices '{cpu: 0.3, gpu: 12, gpu-ondemand: 32}' --spot.rate 0.2 --html plan.html
  python -m cluster.plan --preprocess.config examples/emoji.yaml \\
      --pretrain.config emoji --pretrain.max_nodes 4 --gpu l4

It takes the keys of cluster.run beside its own (gpu, cluster, types, assume, spot, png,
html, json). Whatever is assumed is printed with its key: put in what you measured, in a
second file if you like (--config run.yaml --config assumptions.yaml). In the simulation
nodes are preempted at random, each on its own; training goes on with the largest valid
number of nodes, waits, restarts, loses work and grows back as cluster.run does.
"""


def main(argv: Sequence[str]) -> int:
    """Plan, and print the plan."""
    config = parse(PlanConfig, argv, prog=PROG, description=DESCRIPTION)
    from cluster.plan_run import as_json, plan
    from cluster.plan_text import text

    for key, path in (("png", config.png), ("html", config.html)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"--{key} {path} is in a folder that does not exist")
    found = plan(config)
    print(jsonlib.dumps(as_json(found), indent=1) if config.json else text(found))
    if config.png or config.html:
        from cluster.plan_picture import page, picture

        drawn = picture(found)
        if config.png:
            Path(config.png).write_bytes(drawn)
        if config.html:
            Path(config.html).write_text(page(drawn, text(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main, PROG)
