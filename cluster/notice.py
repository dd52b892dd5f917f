"""`python -m cluster.notice --cloud aws --address HEAD:6379`.

Owns the watcher that every spot node of cluster/aws.yaml and cluster/gcp.yaml runs. The
clouds' answers are read by `cluster.metadata`; what a driver then sees is in
`cluster.draining`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.metadata import CLOUDS, Interruption
from pipeline.config import ConfigError, parse, printable, run

PROG = "cluster.notice"
DESCRIPTION = """\
Tell Ray that the cloud is about to take this machine: ask the metadata service again
and again, and drain this node with the deadline when it says so. Ray then starts
nothing new here, and cluster.pretrain writes a checkpoint if one fits. Ends when the
node is drained. The start commands of cluster/aws.yaml and cluster/gcp.yaml run it.

  python -m cluster.notice --cloud aws --address $RAY_HEAD_IP:6379
  python -m cluster.notice --cloud gcp --address $RAY_HEAD_IP:6379 --every_seconds 1
"""


@dataclass(frozen=True)
class NoticeConfig:
    """Keys of cluster.notice."""

    cloud: str
    """Whose machine this is: aws or gcp."""
    address: str
    """Host and port of the cluster's head, such as 10.0.0.4:6379."""
    instance: str = ""
    """This machine's name in the cluster; empty: what Ray's autoscaler put into
    RAY_CLOUD_INSTANCE_ID."""
    every_seconds: float = 2.0
    """Time between two questions."""
    metadata: str = ""
    """Address of the metadata service; empty: the cloud's own."""


def main(argv: Sequence[str]) -> int:
    """Watch until there is a notice, then drain."""
    config = parse(NoticeConfig, argv, prog=PROG, description=DESCRIPTION)
    instance = config.instance or os.environ.get("RAY_CLOUD_INSTANCE_ID", "")
    if config.cloud not in CLOUDS:
        raise ConfigError(f"--cloud is one of {', '.join(CLOUDS)}: {config.cloud!r}")
    if not instance:
        raise ConfigError("--instance is empty, and so is RAY_CLOUD_INSTANCE_ID")
    found = await_notice(config)
    print(f"{PROG}: {found.what}", flush=True)
    while not tell(found, address=config.address, instance=instance):
        if time.time() > found.deadline:
            raise OSError(f"{instance} could not be drained before its deadline")
        time.sleep(1)
    print(f"{PROG}: {instance} drains", flush=True)
    return 0


def tell(found: Interruption, *, address: str, instance: str) -> bool:
    """Drain this node; whether the head agreed."""
    from cluster.draining import drain

    deadline_ms = int(found.deadline * 1000)
    try:
        return drain(address, instance=instance, why=found.what, by_ms=deadline_ms)
    except Exception as error:  # of a head that is away: Ray has several
        print(f"{PROG}: {printable(str(error))}; trying again", flush=True)
        return False


def await_notice(config: NoticeConfig) -> Interruption:
    """The notice, once there is one. A service that fails is asked again."""
    cloud = CLOUDS[config.cloud]
    told = ""
    while True:
        try:
            found = cloud.interruption(config.metadata or cloud.base)
        except (OSError, ValueError, KeyError) as error:
            found = None
            if (text := printable(str(error))) != told:
                print(f"{PROG}: {text}; asking again", flush=True)
            told = text
        if found:
            return found
        time.sleep(config.every_seconds)


if __name__ == "__main__":
    run(main, PROG)
