"""Every key of run.yaml: the stages of a run, the nodes they ask for, and prices.

Owns names, defaults, help texts and the checks that need no file. Does not own the keys
of the commands that the stages start: `pipeline.preprocess` and `trainer.pretrain` each
check their own (`cluster.commands` asks them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DATA = "data"
PRETRAIN = "pretrain"
_OWNED = {
    "preprocess": ("output", "dry_run"),
    "pretrain": ("data", "output", "grow"),
    "evaluate": ("run", "data"),
}


def at_least(group: str, config: object, **lowest: float) -> None:
    """Raise ValueError for a key of `config`, a group of run.yaml, below its lowest
    value.
    """
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ValueError(f"{group}.{name} is {value}: it must be {low} or more")


@dataclass(frozen=True, kw_only=True)
class PreprocessStage:
    """Corpus to shards, by `pipeline.preprocess` (its --help explains `arguments`)."""

    config: str | None = None
    """YAML file with keys of pipeline.preprocess."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keys of pipeline.preprocess over those of `config`, nested or dotted: input,
    image.size, columns.caption, ... The output is the run's."""
    tries: int = 5
    """How often it is started in all, where it ends without having made its dataset;
    each time it goes on with what is committed."""

    def __post_init__(self) -> None:
        at_least("preprocess", self, tries=1)


@dataclass(frozen=True, kw_only=True)
class PretrainStage:
    """Shards to a model, by `trainer.pretrain` (its --help explains `arguments`)."""

    config: str
    """Recipe (mlim-base, emoji, ...) or YAML file of trainer.pretrain."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keys of trainer.pretrain over those of `config`, nested or dotted:
    optimizer.lr, checkpoint.every_minutes, ... Data and output are the run's."""
    min_nodes: int = 1
    """Fewest nodes to train on."""
    max_nodes: int = 1
    """Most nodes to train on."""
    gpus_per_node: int = 1
    """GPUs of a node; all are taken. A node of the local cluster has logical ones."""
    ranks_per_node: int | None = None
    """Ranks on a node; by default one for each of its GPUs."""
    cpus_per_node: float = 1
    """CPUs of a node that are asked for, for reading and decoding."""
    node_resource: str = "gpu_node"
    """Custom resource of which each node for training has one, and no other node."""
    wait_seconds: float = 900
    """How long to wait for max_nodes before training starts on fewer; as long again for
    min_nodes is no error: it waits on and says so."""
    settle_seconds: float = 600
    """Least time between a start and a stop to go on with more nodes."""
    silent_seconds: float = 60
    """A node that has answered nothing for so long is taken for dead."""
    stop_seconds: float = 600
    """How long a stop at a step's end, checkpoint included, may take."""
    checkpoint_seconds: float = 60
    """How long a checkpoint takes, until one has been measured: a node's notice that is
    shorter is not worth stopping for."""
    failures: int = 3
    """How many attempts may end because a process failed on a sound node."""
    preemptions: int = 1000
    """How many attempts may end because a node was taken away, or gave notice of it."""

    def __post_init__(self) -> None:
        at_least("pretrain", self, min_nodes=1, max_nodes=self.min_nodes)
        at_least("pretrain", self, gpus_per_node=0, ranks_per_node=1, cpus_per_node=0)
        at_least("pretrain", self, wait_seconds=0, settle_seconds=0, stop_seconds=1)
        at_least("pretrain", self, silent_seconds=1, checkpoint_seconds=0)
        at_least("pretrain", self, failures=0, preemptions=0)
        if self.ranks_per_node is None and self.gpus_per_node == 0:
            raise ValueError(
                "pretrain.gpus_per_node is 0: say with pretrain.ranks_per_node how "
                "many ranks a node without GPUs runs"
            )

    @property
    def ranks(self) -> int:
        """Ranks on one node."""
        return self.ranks_per_node or self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """What the trained model can do, by `trainer.evaluate`, and `trainer.report`."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Keys of trainer.evaluate: split, max_pairs, ..."""
    gpus: float = 0
    """GPUs that it asks for."""
    cpus: float = 1
    """CPUs that it asks for."""

    def __post_init__(self) -> None:
        at_least("evaluate", self, gpus=0, cpus=0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run from a corpus to a report, on a cluster."""

    output: str
    """Directory of the run: an absolute path that every node sees, or a URL such as
    s3://bucket/run. Shards go to OUTPUT/data, the model to OUTPUT/pretrain."""
    data: str | None = None
    """Shards, if they are not to be in OUTPUT/data."""
    preprocess: PreprocessStage | None = None
    """null: the shards are there already."""
    pretrain: PretrainStage | None = None
    """null: only shards are made."""
    evaluate: EvaluateStage | None = None
    """null: neither measured nor reported."""
    overlap: bool = False
    """Begin to train while shards are still being made, once `overlap_samples` are
    committed, and follow the growing dataset. Shards are committed as they come where
    nothing is compared across the corpus (one split, images as bytes, no id column, no
    filter of duplicates), and otherwise all at the end."""
    overlap_samples: int = 10_000
    """Committed samples to begin on."""
    prices: dict[str, float] = field(default_factory=dict)
    """Price of a node for an hour, by node type of the cluster: cpu, gpu, head, ..."""
    currency: str = "USD"
    """Of the prices."""

    def __post_init__(self) -> None:
        at_least("run", self, overlap_samples=1)
        if not (self.preprocess or self.pretrain or self.evaluate):
            raise ValueError(
                "the run has no stage: give preprocess, pretrain or evaluate, each a "
                "group of keys (--help explains them)"
            )
        if self.pretrain and not (self.preprocess or self.data):
            raise ValueError(
                "pretrain needs shards: give a preprocess stage, or `data` with a "
                "dataset that is there"
            )
        if self.evaluate and not self.pretrain:
            raise ValueError(
                "evaluate needs the pretrain stage whose model it measures"
            )
        if self.overlap and not (self.preprocess and self.pretrain):
            raise ValueError("overlap needs both preprocess and pretrain")
        for name, price in self.prices.items():
            if not price >= 0:
                raise ValueError(f"prices.{name} is {price}: it must be 0 or more")
        for stage, owned in _OWNED.items():
            given = getattr(self, stage)
            for key in owned:
                if given and key in given.arguments:
                    raise ValueError(
                        f"{stage}.arguments.{key} is given by the run: leave it out"
                    )

    @property
    def shards(self) -> str:
        """Where the dataset is."""
        return self.data or f"{self.output.rstrip('/')}/{DATA}"

    @property
    def trained(self) -> str:
        """The trainer's run directory."""
        return f"{self.output.rstrip('/')}/{PRETRAIN}"


def flags(arguments: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`arguments` as the flags of a command: `--optimizer.lr=0.001`."""
    import json

    found = []
    for key, value in arguments.items():
        if isinstance(value, Mapping) and value:
            found += flags(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(f"--{prefix}{key}={text}")
    return found
