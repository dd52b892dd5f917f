"""`python -m trainer.evaluate RUN --task TASK`: what a trained model can do.

Owns the command line alone: probes are in `trainer.probing`, tasks in `trainer.tasks`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipeline.config import given, parse, run

PROG = "trainer.evaluate"
DESCRIPTION = """\
Measure a model on held-out pairs.

  python -m trainer.evaluate runs/first --task probes
  python -m trainer.evaluate runs/matched --task matching --pairs val-pairs.npy

probes (the default), of a run of trainer.pretrain: does each modality help to restore
the other? MLM loss with the true, another pair's and a blank image; loss of images with
the true, another pair's and an empty caption. Writes RUN/probes.json, RUN/probes.html
(pairs where the right partner helps most, where a wrong one is better, and where both
are nearest in worth), RUN/probes.npz (every pair's losses) and figures to RUN/probes/.

{tasks}: RUN is what trainer.finetune wrote, or, where a task needs no fine-tuning, a
run or an export. Writes RUN/TASK.json (value, confidence interval, chance, dataset
hash, command) and RUN/TASK.html, examples to look at. --help with --task explains the
keys of a task.
"""


def main(argv: Sequence[str]) -> None:
    """Measure, write `RUN/TASK.json`, print a table."""
    task, command = given(argv, "task"), shlex.join(["python", "-m", PROG, *argv])
    description = _description()
    if task in (None, "probes"):
        _probes(argv, description, command)
        return
    from trainer.tasks import evaluation

    config = parse(
        evaluation.keys_of(task),
        argv,
        prog=PROG,
        description=description,
        positional="run",
    )
    print(evaluation.evaluate(config, command=command))


def _probes(argv: Sequence[str], description: str, command: str) -> None:
    from trainer.local_run import local_run
    from trainer.probing import ProbesConfig, print_probes, probes

    config = parse(
        ProbesConfig, argv, prog=PROG, description=description, positional="run"
    )
    with local_run(config.run, weights=True) as folder:
        result = probes(folder, config, command=command)
    print_probes(result)
    print(f"{config.run.rstrip('/')}/probes.json")


def _description() -> str:
    from trainer.tasks.names import NAMES

    return DESCRIPTION.format(tasks=", ".join(NAMES))


if __name__ == "__main__":
    run(main, PROG)
