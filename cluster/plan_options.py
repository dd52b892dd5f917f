"""Keys of `cluster.plan`: those of run.yaml, and what is assumed about the machines.

Owns the keys that only a plan has, and their checks. Does not own those of a run
(`cluster.options`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.options import RunConfig, at_least

NO_OUTPUT = "RUN"


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the machines can do. The plan prints all of it."""

    cpu_cores: int = 16
    """Cores of a node for preprocessing."""
    cpu_nodes: int = 10
    """Most nodes for preprocessing: max_workers of their type."""
    core_speed: float = 1.0
    """Speed of one of those cores, as a multiple of one of this machine's."""
    node_minutes: float = 5
    """From the demand for a node until it is there."""
    idle_minutes: float = 5
    """How long a node without work is kept: idle_timeout_minutes."""
    mfu: float = 0.35
    """Model FLOPs utilisation: the share of its peak that a GPU gives."""
    least_step_ms: float = 20
    """Milliseconds that a step takes however small the model: kernels to launch,
    gradients to exchange."""
    write_mb_s: float = 500
    """MB/s of a checkpoint that one node writes to the run's storage; all nodes write
    their parts at once."""
    stall_seconds: float | None = None
    """How long training stands still for a checkpoint. Default: the time to copy a
    GPU's part of it to the host at 2 GB/s, and half a second."""
    restart_seconds: float = 180
    """From starting ranks until they train: processes, compilation, loading."""
    wait_seconds: float = 10
    """How long a start waits for nodes that are on their way, where there are enough
    for a smaller one: cluster.pretrain waits long only before the first."""
    detect_seconds: float | None = None
    """From a node's death until the run is stopped. Default: what run.yaml says with
    pretrain.silent_seconds, which is the longest that it takes."""

    def __post_init__(self) -> None:
        _above_zero("assume", self, "core_speed", "write_mb_s", "mfu")
        at_least("assume", self, cpu_cores=1, cpu_nodes=1, node_minutes=0)
        at_least("assume", self, idle_minutes=0, stall_seconds=0, restart_seconds=0)
        at_least("assume", self, detect_seconds=0, least_step_ms=0)
        at_least("assume", self, wait_seconds=0)
        if self.mfu > 1:
            raise ValueError(f"assume.mfu is {self.mfu}: a share, at most 1")


@dataclass(frozen=True, kw_only=True)
class SpotOptions:
    """How nodes for training are preempted, and come back."""

    rate: float = 0.05
    """Preemptions of one node in an hour that it is up: 0.05 is one in 20 hours."""
    notice_seconds: float = 120
    """How long before it goes a node is told: AWS says 120, GCP and Azure 30."""
    sudden: float = 0.1
    """Share of preemptions that come without notice, crashes of nodes among them."""
    return_minutes: float = 15
    """Mean time until another node is in its place."""
    fixed_return: bool = False
    """Always that long, rather than exponentially distributed."""
    runs: int = 200
    """Runs to simulate for each interval between checkpoints."""
    seed: int = 0
    """Of the simulation."""

    def __post_init__(self) -> None:
        at_least("spot", self, rate=0, notice_seconds=0, return_minutes=0, seed=0)
        at_least("spot", self, runs=10)
        if not 0 <= self.sudden <= 1:
            raise ValueError(f"spot.sudden is {self.sudden}: a share, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class NodeTypes:
    """Names of node types in the cluster's YAML, which prices are looked up by."""

    cpu: str = "cpu"
    """Of nodes for preprocessing."""
    gpu: str = "gpu"
    """Of nodes for training that may be preempted."""
    ondemand: str = "gpu-ondemand"
    """Of the same nodes where they are not preempted."""
    head: str = "head"
    """Of the head."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """A run, and what is assumed of the machines that it is planned for."""

    output: str = NO_OUTPUT
    """Not written to; shards that are complete there are not planned again."""
    gpu: str | None = None
    """Kind of the GPUs: h100, h200, a100-80, l40s, ...; a wrong one lists all."""
    cluster: str | None = None
    """YAML file of `ray up` to take from: node types, CPUs and most nodes of the one
    for preprocessing, idle minutes. Without it types are cpu, gpu, their -ondemand kin,
    and head."""
    types: NodeTypes = field(default_factory=NodeTypes)
    """Which node type does what."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What the machines can do."""
    spot: SpotOptions = field(default_factory=SpotOptions)
    """Preemptions."""
    png: str | None = None
    """Draw lost work against the interval, and one run, to this PNG file."""
    html: str | None = None
    """The plan with that picture as one page that opens offline."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrain and not self.gpu:
            raise ValueError(
                "--gpu must be given: the kind of GPU to train on (h100, a100-80, "
                "l40s, ...; a wrong one lists all)"
            )
        if not (self.preprocess or self.pretrain):
            raise ValueError("there is nothing to plan: give preprocess or pretrain")
        if not self.pretrain and (self.png or self.html):
            raise ValueError("--png and --html show training: give pretrain, too")


def _above_zero(group: str, config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            value = getattr(config, name)
            raise ValueError(f"{group}.{name} is {value}: it must be above 0")
