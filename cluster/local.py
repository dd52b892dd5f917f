"""`python -m cluster.local up|down|status`: a cluster on this machine, to try it on.

Owns the command. Its keys are in `cluster.local_options`, starting and ending in
`cluster.local_cluster`, what it tells in `cluster.local_status`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster.local_options import LocalConfig
from pipeline.config import parse, run

PROG = "cluster.local"
DESCRIPTION = """\
A real autoscaling Ray cluster on this machine: a head, and worker nodes that start when
work needs them and end when they are idle. Every node is a Ray node of its own with
logical CPUs and GPUs, so that what runs here runs on a cloud's nodes too.

  python -m cluster.local up --cpu-nodes 3 --gpu-nodes 2
  python -m cluster.local status
  python -m cluster.local down

`up` prints the lines to export and how to submit a job. `down` leaves no process. Nodes
are of type cpu (custom resource cpu_node: 1) and gpu (gpu_node: 1, GPU). Linux only.
"""


def main(argv: Sequence[str]) -> int:
    """Start, end or describe the cluster."""
    config = parse(
        LocalConfig,
        [_with_underscores(word) for word in argv],
        prog=PROG,
        description=DESCRIPTION,
        positional="action",
    )
    from cluster import local_cluster, local_status

    if config.action == "up":
        cluster = local_cluster.up(config, tell=_tell)
        print(local_status.next_steps(cluster))
    elif config.action == "down":
        local_cluster.down(config.folder, tell=_tell)
    else:
        print(local_status.status(config.folder, json=config.json))
    return 0


def _with_underscores(word: str) -> str:
    """`--cpu-nodes=3` as `--cpu_nodes=3`: both are common, one is a key."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, PROG)
