"""`python -m cluster.run --config run.yaml`: corpus to report, on a cluster.

Owns the command line and the order of a driver's duties. Keys are in `cluster.options`,
checks in `cluster.checks`, the stages in `cluster.stages`.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence

from cluster.options import RunConfig
from pipeline.config import parse, printable, run

PROG = "cluster.run"
DESCRIPTION = """\
Preprocess, pretrain, evaluate and report, as stages of one run on a Ray cluster:

  ray job submit --working-dir . -- python -m cluster.run --config run.yaml

The same command, submitted again, continues: what is done is not done again, and
training goes on from the last complete checkpoint on whatever nodes there are.
`python -m cluster.status OUTPUT` shows how it stands. run.yaml:

  output: /shared/runs/first             # or s3://bucket/runs/first
  preprocess:
    arguments: {input: /shared/products.parquet, image.size: 256}
  pretrain:
    config: mlim-base
    min_nodes: 1
    max_nodes: 4
    gpus_per_node: 8
  evaluate: {}
  prices: {gpu: 31.50, cpu: 0.40}

--preprocess.help, --pretrain.help and --evaluate.help explain the keys of each stage.
"""
_STOPPED = 143


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when every stage is done."""
    from cluster.stages import run_stages

    config = parse(RunConfig, argv, prog=PROG, description=DESCRIPTION)
    return drive(config, [PROG, *argv], run_stages)


def drive(
    config: RunConfig, command: Sequence[str], stages: Callable[..., None]
) -> int:
    """Be the driver of a run: join the cluster, be alone, check, then run `stages`."""
    from cluster.checks import check
    from cluster.driver import (
        Stopped,
        connected,
        gcs_address,
        only_driver,
        refuse_driver_elsewhere,
        stop_asked,
    )
    from cluster.journal import Journal
    from cluster.nodes import NodeClock
    from cluster.store import Store, first_line

    with connected(), only_driver(config.output), stop_asked() as stop:
        check(config)
        run_store = Store(config.output)
        refuse_driver_elsewhere(run_store, tell)
        journal = Journal(run_store, tell)
        journal.write(
            "driver_started",
            command=shlex.join(command),
            config=dataclasses.asdict(config),
            cluster=gcs_address(),
        )
        status = "finished"
        try:
            with NodeClock(journal.usage):
                stages(config, journal, tell=tell, stop=stop)
        except Stopped:
            status = "stopped"
        except BaseException as error:
            status = first_line(error)
            raise
        finally:
            journal.write("driver_ended", status=status)
    if status == "stopped":
        tell("stopped, as asked; the same command continues")
        return _STOPPED
    tell(f"done: {config.output}")
    return 0


def only(config: RunConfig, stage: str) -> RunConfig:
    """`config` with one stage alone, on the data that the others would make.

    Raises:
        ValueError: it has no such stage.
    """
    if getattr(config, stage) is None:
        raise ValueError(f"the configuration has no {stage} stage: give its keys")
    return dataclasses.replace(
        config,
        preprocess=config.preprocess if stage == "preprocess" else None,
        pretrain=config.pretrain if stage == "pretrain" else None,
        evaluate=None,
        data=config.data if stage == "preprocess" else config.shards,
        overlap=False,
    )


def tell(line: str) -> None:
    """One line for whoever reads the job's log."""
    print(printable(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, PROG)
