"""`python -m trainer.finetune RUN --task TASK --output OUT`: a model learns a task.

Owns the command line alone: the run is in `trainer.tasks.finetuning`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipeline.config import ConfigError, given, parse, run

PROG = "trainer.finetune"
DESCRIPTION = """\
Fine-tune a pretrained model on a task, on one GPU or on CPUs.

  python -m trainer.finetune runs/first --task matching --pairs train-pairs.npy \\
      --dev_pairs dev-pairs.npy --output runs/matched
  python -m trainer.finetune runs/first --task matching --pairs train-pairs.npy \\
      --from_scratch --output runs/scratch
  python -m trainer.evaluate runs/matched --task matching --pairs test-pairs.npy

Tasks: {tasks}. --help with --task explains the keys of a task.

RUN is what trainer.pretrain or trainer.export wrote. --from_scratch trains the same
model without pretraining, to see what that was worth. The same command continues an
interrupted run, bit for bit. The best checkpoint by the task's dev metric is kept,
beside the newest, if there are dev examples.
"""


def main(argv: Sequence[str]) -> None:
    """Fine-tune, and say where the result is."""
    from trainer.tasks.names import fine_tuned

    task = given(argv, "task")
    from trainer.tasks import finetuning

    if task is None and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"--task must be given: one of {', '.join(fine_tuned())}")
    config = parse(
        finetuning.keys_of(task),
        argv,
        prog=PROG,
        description=DESCRIPTION.format(tasks=", ".join(fine_tuned())),
        positional="run",
    )
    command = shlex.join(["python", "-m", PROG, *argv])
    print(finetuning.finetune(config, command=command))


if __name__ == "__main__":
    run(main, PROG)
