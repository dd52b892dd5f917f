"""Starting and ending the local cluster.

Owns its folder (token, configuration of the autoscaler, where it can be reached) and
the head's start. Does not own nodes (`cluster.local_node`, `cluster.local_provider`) or
what is told about them (`cluster.local_status`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import local_node, local_processes
from cluster.local_node import HEAD, Node
from cluster.local_options import LocalConfig, where
from cluster.namespaces import INTERFACE, Network

TOKEN = "token"
_CLUSTER = "cluster.json"
_AUTOSCALER = "autoscaler.json"
_MB = 1_000_000
# A head takes about 700 MB, a worker node with one busy worker about 350.
_HEAD_MB, _NODE_MB = 800, 350
_POLL_S = 0.25
_HEALTH_FAILURES = 4

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a cluster can be reached."""

    folder: Path
    address: str
    """host:port of its GCS, for drivers on this machine."""
    dashboard: str
    """URL of dashboard and jobs."""
    config: Mapping[str, Any]
    """The keys it was started with."""

    @property
    def within(self) -> list[str]:
        """Words in front of a command, which run it with the head's network: a driver
        that is not a job has to."""
        if self.config["namespaces"]:
            return Network(folder=self.folder).within(HEAD)
        return []

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to reach it."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN),
        }


def up(config: LocalConfig, *, tell: Tell) -> Cluster:
    """Start a cluster, unless it is up; returns when its head takes jobs.

    Raises:
        ValueError: it is up with other keys.
        OSError: this machine has not what it takes, or the head does not start.
    """
    folder = config.folder
    with _alone(folder):
        if there := find(folder):
            _same(there, config)
            tell(f"{config.name} is up already")
            return there
        if folder.exists():
            tell(f"clearing away what a dead cluster has left in {folder}")
            _clear(folder)
        _check_machine(config)
        try:
            return _start(config, tell)
        except BaseException:
            _clear(folder)
            raise


def down(folder: Path, *, tell: Tell) -> None:
    """End a cluster, dead or alive, with everything that runs on it.

    Raises:
        OSError: some processes do not end.
    """
    with _alone(folder):
        if not folder.exists():
            tell(f"no cluster at {folder}")
            return
        tell(f"{folder.name} is down: ended {_clear(folder)} processes")


def find(folder: Path) -> Cluster | None:
    """The cluster whose folder this is, if it is up."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / _CLUSTER).read_text())
        head = [node for node in local_node.nodes(folder) if node.type == HEAD]
        if head and local_node.keeper(head[0]):
            return Cluster(folder=folder, **values)
    return None


def get(cluster: Cluster, path: str) -> Any:
    """What the cluster's dashboard answers to GET `path`.

    Raises:
        OSError: no answer, or a refusal.
    """
    token = (cluster.folder / TOKEN).read_text()
    request = urllib.request.Request(
        cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"}
    )
    # The user's proxy has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else starts or ends this cluster meanwhile."""
    state = folder.parent
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Below a temp dir anybody can make a folder of this name before its owner does.
    if state.stat().st_uid != os.getuid():
        raise OSError(f"{state} belongs to another user: give your own --state")
    with (state / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _same(there: Cluster, config: LocalConfig) -> None:
    wanted = _keys(config)
    other = [key for key in wanted if there.config.get(key) != wanted[key]]
    if other:
        had = ", ".join(f"--{key}={there.config.get(key)}" for key in other)
        raise ValueError(
            f"{config.name} is up already with {had}: end it first (python -m "
            f"cluster.local down{where(config.folder)}), or start another with --name"
        )


def _keys(config: LocalConfig) -> dict[str, Any]:
    keys = dataclasses.asdict(config)
    for name in ("action", "json", "state", "start_seconds"):
        del keys[name]
    return keys


def _check_machine(config: LocalConfig) -> None:
    import psutil

    if not Path("/proc/self/environ").exists():
        raise OSError("the local cluster needs Linux (in WSL 2 or a container, say)")
    free = psutil.virtual_memory().available / _MB
    needed = _HEAD_MB + (config.most_nodes - 1) * (_NODE_MB + config.object_store_mb)
    if free < needed:
        raise OSError(
            f"{free:.0f} MB of memory are free and {config.most_nodes - 1} worker "
            f"nodes can take {needed}: ask for fewer (--cpu-nodes, --gpu-nodes) or "
            "end something else"
        )


def _start(config: LocalConfig, tell: Tell) -> Cluster:
    folder = config.folder
    folder.mkdir(mode=0o700)
    _write_secret(folder / TOKEN, secrets.token_hex(32))
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
        config=_keys(config),
    )
    environment = _environment(config, cluster)
    autoscaler = folder / _AUTOSCALER
    autoscaler.write_text(
        json.dumps(autoscaler_config(config, cluster, environment), indent=1)
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
    values = {"address": cluster.address, "dashboard": cluster.dashboard}
    (folder / _CLUSTER).write_text(json.dumps({**values, "config": cluster.config}))
    return cluster


def autoscaler_config(
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
            get(cluster, "/api/jobs/")
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
        if now - told > 5:
            told = now
            tell(f"  {now - begun:.0f} s ...")
        time.sleep(_POLL_S)


def _clear(folder: Path) -> int:
    """End everything of a cluster and remove its folder; how many processes ended."""
    ended = local_processes.end_members(folder)
    Network(folder=folder).remove()
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def _write_secret(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)


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
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
