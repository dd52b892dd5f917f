"""`python -m cluster.local up|down|status`: a cluster on this machine, to try it on.

Owns the command. Its keys are in `cluster.local_options`, starting and ending in
`cluster.local_lifecycle`, what it tells in `cluster.local_status`.
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

`up` prints the lines to export (`eval "$(python -m cluster.local up)"` does it at once)
and how to submit a job; without --gpu-nodes there are nodes of type cpu alone. `down`
leaves no process. A cpu node has the custom resource cpu_node: 1, a gpu node has
gpu_node: 1 and GPUs, and the label ray.io/node-group says cpu or gpu. Linux only.

  python -m cluster.local up --gpu-nodes 2 --namespaces

gives every node a network namespace and an address of its own (root and iproute2).
Nothing leads from there out of this machine.
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
    from cluster import local_lifecycle, local_status

    if config.action == "up":
        cluster = local_lifecycle.up(config, tell=_tell)
        # Alone on stdout, so that a shell can take them: eval "$(... up)".
        print(local_status.exports(cluster), flush=True)
        _tell(local_status.next_steps(cluster))
    elif config.action == "down":
        local_lifecycle.down(config.folder, tell=_tell)
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
