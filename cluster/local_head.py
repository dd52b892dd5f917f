"""The head of the local cluster.

Owns its start: addresses and ports, the environment that all nodes share, and what the
autoscaler reads. Does not own the processes (`cluster.local_node`), the other nodes
(`cluster.local_provider`), or clearing up (`cluster.local_lifecycle`).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster import local_cluster, local_node
from cluster.local_cluster import TOKEN, Cluster
from cluster.local_node import HEAD, Node
from cluster.local_options import LocalConfig
from cluster.namespaces import INTERFACE, Network
from cluster.runner import free_port

Tell = Callable[[str], None]
_AUTOSCALER = "autoscaler.json"
_MB = 1_000_000
_POLL_S = 0.25
_TELL_S = 5
# A job that is asked to stop saves a checkpoint first; Ray's own patience is 3 s.
_STOP_SECONDS = 600
_HEALTH_FAILURES = 4


def start_head(config: LocalConfig, tell: Tell) -> Cluster:
    """Start the head of a cluster that has no folder yet, and wait until it takes jobs.

    Raises:
        OSError: it does not start; whatever runs by then is left.
    """
    folder = config.folder
    folder.mkdir(mode=0o700)
    local_cluster.write_token(folder, secrets.token_hex(32))
    network = Network(folder=folder) if config.namespaces else None
    if network:
        network.create()
        address = network.address(0)
        network.add(HEAD, address)
    else:
        address = _own_address()
    ports = _free_ports(3)
    # Nothing but this machine reaches an address of a namespace.
    dashboard = address if network else "127.0.0.1"
    cluster = Cluster(
        folder=folder,
        address=f"{address}:{ports[0]}",
        dashboard=f"http://{dashboard}:{ports[1]}",
        config=config.kept,
    )
    environment = _environment(config, cluster)
    autoscaler = folder / _AUTOSCALER
    autoscaler.write_text(
        json.dumps(_autoscaler_config(config, cluster, environment), indent=1)
    )
    head = Node(id=HEAD, type=HEAD, address=address)
    local_node.write(folder, head)
    store = {"object_store_memory": config.object_store_mb * _MB}
    words = local_node.ray_start_words(folder, head, store)
    tell(f"starting the head of {config.name} ...")
    head, _ = local_node.start(
        folder,
        head,
        [
            *words,
            "--head",
            f"--port={ports[0]}",
            f"--dashboard-host={dashboard}",
            f"--dashboard-port={ports[1]}",
            f"--ray-client-server-port={ports[2]}",
            f"--autoscaling-config={autoscaler}",
        ],
        environment=environment,
        within=network.within(HEAD) if network else (),
    )
    _wait_for_jobs(cluster, head, config.start_seconds, tell)
    local_cluster.write(cluster)
    return cluster


def _autoscaler_config(
    config: LocalConfig, cluster: Cluster, environment: Mapping[str, str]
) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads."""
    kinds = {
        "cpu": (config.cpu_nodes, {"cpu_node": 1}),
        "gpu": (config.gpu_nodes, {"gpu_node": 1, "GPU": config.gpus_per_node}),
    }
    types: dict[str, Any] = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    }
    for kind, (most, resources) in kinds.items():
        if most:
            types[kind] = {
                "resources": {
                    "CPU": config.cpus_per_node,
                    "object_store_memory": config.object_store_mb * _MB,
                    **resources,
                },
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
                "idle_timeout_s": config.idle_seconds,
            }
    # Ray fills these in for providers of its own alone, and then asks for each.
    empty: dict[str, Any] = {
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    return {
        "cluster_name": config.name,
        "max_workers": config.most_nodes - 1,
        "upscaling_speed": 1000,
        "idle_timeout_minutes": config.idle_seconds / 60,
        "provider": {
            "type": "external",
            "module": "cluster.local_provider.LocalNodeProvider",
            "disable_node_updaters": True,
            "folder": str(cluster.folder),
            "gcs_address": cluster.address,
            "address": cluster.address.rpartition(":")[0],
            "namespaces": config.namespaces,
            "environment": dict(environment),
        },
        "head_node_type": HEAD,
        "available_node_types": types,
        **empty,
    }


def _environment(config: LocalConfig, cluster: Cluster) -> dict[str, str]:
    """Variables of every node, and so of everything that runs on it."""
    # A node is dead when checks, each at most so long and a second apart, have failed.
    check = config.dead_after / _HEALTH_FAILURES - 1
    found = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.folder / TOKEN),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": str(int(1000 * check)),
        "RAY_health_check_failure_threshold": str(_HEALTH_FAILURES),
    }
    if config.namespaces:
        # By a host's name, which is the same everywhere here, gloo finds no address.
        found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), INTERFACE)
    return found


def _wait_for_jobs(cluster: Cluster, head: Node, seconds: float, tell: Tell) -> None:
    begun = told = time.monotonic()
    while True:
        with contextlib.suppress(OSError, ValueError):
            local_cluster.get(cluster, "/api/jobs/")
            if (cluster.folder / HEAD / local_node.READY).exists():
                return
        now = time.monotonic()
        said = local_node.last_words(cluster.folder / HEAD)
        if not local_node.keeper(head):
            raise OSError(
                "the head has ended while it started; if a port was taken meanwhile, "
                f"start it again. It said:\n{said}"
            )
        if now - begun > seconds:
            raise OSError(
                f"the head takes no jobs after {seconds:.0f} s: give it longer "
                f"(--start-seconds) if the machine is busy. It said:\n{said}"
            )
        if now - told > _TELL_S:
            told = now
            tell(f"  {now - begun:.0f} s ...")
        time.sleep(_POLL_S)


def _own_address() -> str:
    """Address of this machine's way out; loopback where it has none.

    Ray takes no loopback address for a node where there is another.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        contextlib.suppress(OSError),
    ):
        # Nothing is sent.
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def _free_ports(count: int) -> list[int]:
    """Different ones that nobody listens on, none that the system hands out itself."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port(""))
    return [*found]
