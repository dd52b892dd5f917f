"""`python -m cluster.fallback --config_file ~/ray_bootstrap_config.yaml --address ...`.

Owns the fallback from spot to on-demand on clouds where Ray starts the machines itself
(cluster/aws.yaml, cluster/gcp.yaml). On Kubernetes Ray has one of its own
(cluster/kuberay).

Why it is needed: of the node types that fit, autoscaler v2 of Ray 2.60 takes the one
with the highest `priority`. Types whose machines never came up are put last for a
while, but a type whose request the cloud refuses at once (no spot capacity, a quota) is
not: it is asked for again, seconds later, for ever. The autoscaler reads its
configuration anew on every round, so this lowers the priority of a type there while the
cloud refuses it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import parse, printable, run

PROG = "cluster.fallback"
DESCRIPTION = """\
Let the next node type have its turn while the cloud refuses one: the priority of a node
type that could not be started is lowered in the autoscaler's configuration for some
minutes, so that of gpu and gpu-ondemand the second is taken when there is no spot
capacity, and spot is tried again later. Runs on the head; the start commands of
cluster/aws.yaml and cluster/gcp.yaml start it.

  python -m cluster.fallback --config_file ~/ray_bootstrap_config.yaml \\
      --address 127.0.0.1:6379 --seconds 600
"""
# Added to the priority of a type that is refused; no sensible priority is as low.
_LOWERED = -1_000_000


@dataclass(frozen=True)
class FallbackConfig:
    """Keys of cluster.fallback."""

    config_file: Path
    """The file that `ray start --head --autoscaling-config` was given."""
    address: str
    """Host and port of the head."""
    seconds: float = 600.0
    """For how long a refused type comes last; then it is tried again."""
    every_seconds: float = 2.0
    """Time between two looks."""


def main(argv: Sequence[str]) -> int:
    """Watch for ever; whoever starts it ends it."""
    config = parse(FallbackConfig, argv, prog=PROG, description=DESCRIPTION)
    path = config.config_file.expanduser()
    shown = ""
    while True:
        try:
            since = time.time() - config.seconds
            refused = {n for n, at in refusals(config.address).items() if at > since}
            if changed := rewrite(path, refused):
                print(f"{PROG}: {changed}", flush=True)
        except Exception as error:  # of a head that is away: Ray has several
            if (text := printable(str(error))) != shown:
                print(f"{PROG}: {text}; trying again", flush=True)
            shown = text
        time.sleep(config.every_seconds)


def refusals(address: str) -> dict[str, float]:
    """When the cloud last refused a machine, by node type; seconds since the epoch."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
        GetClusterStatusReply,
    )

    reply = GcsClient(address=address).get_cluster_status(timeout_s=10)
    state = GetClusterStatusReply.FromString(reply).autoscaling_state
    last: dict[str, float] = {}
    for failed in state.failed_instance_requests:
        name = failed.ray_node_type_name
        last[name] = max(last.get(name, 0.0), float(failed.failed_ts))
    return last


def rewrite(path: Path, refused: set[str]) -> str:
    """Bring the priorities in the file at `path` in line; what changed, or nothing.

    The file is replaced whole: the autoscaler may read it at any moment.
    """
    given = json.loads(path.read_text())
    before = priorities(given)
    for name, node_type in given["available_node_types"].items():
        own = before[name] - (_LOWERED if before[name] <= _LOWERED // 2 else 0)
        now = own + (_LOWERED if name in refused else 0)
        if now != before[name]:
            node_type["priority"] = now
    after = priorities(given)
    if after == before:
        return ""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(given))
    temporary.chmod(path.stat().st_mode)
    temporary.replace(path)
    return ", ".join(
        f"{name} {'comes last: refused' if after[name] < priority else 'as before'}"
        for name, priority in before.items()
        if after[name] != priority
    )


def priorities(given: Mapping[str, Any]) -> dict[str, int]:
    """Priority of each node type; the higher, the earlier."""
    types = given["available_node_types"]
    return {name: int(each.get("priority", 0)) for name, each in types.items()}


if __name__ == "__main__":
    run(main, PROG)
