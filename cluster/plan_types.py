"""Node types that a plan may name: those of a cluster's YAML, or the usual ones.

Owns reading the file, and refusing names that nobody knows and nodes that will not do.
Does not own what the types are used for (`cluster.plan_run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.options import PretrainStage
from cluster.plan_options import Assumptions, NodeTypes, PlanConfig
from pipeline.config import nearest


def with_types(config: PlanConfig) -> PlanConfig:
    """`config` with what the cluster's YAML says of its nodes.

    Raises:
        ValueError: the file cannot be used, a type that is named is not known, or its
            nodes are too few or too small for the run.
    """
    types = config.types
    if config.cluster is None:
        # Named by hand, so that prices may name them as well.
        known = [*dataclasses.astuple(NodeTypes()), "cpu-ondemand"]
        _refuse_unknown(config, [*known, *dataclasses.astuple(types)], "")
        return config
    content = _content(config.cluster)
    groups = content["available_node_types"]
    _refuse_unknown(config, [*groups, types.head], f" of {config.cluster}")
    if config.pretrain:
        _refuse_small(config, config.pretrain, groups[types.gpu])
    assume = _assumed(config.assume, groups.get(types.cpu, {}))
    idle = content.get("idle_timeout_minutes", assume.idle_minutes)
    assume = dataclasses.replace(assume, idle_minutes=idle)
    return dataclasses.replace(config, assume=assume)


def _refuse_unknown(config: PlanConfig, known: Sequence[str], place: str) -> None:
    names = [(f"prices.{name}", name) for name in config.prices]
    if config.preprocess:
        names.append(("types.cpu", config.types.cpu))
    if config.pretrain:
        names.append(("types.gpu", config.types.gpu))
    for key, name in names:
        if name not in known:
            listed = ", ".join(dict.fromkeys(known))
            raise ValueError(
                f"{key}: {name!r} is no node type{place}.{nearest(name, known)} "
                f"There are {listed}; --types names those that the plan is about, "
                "--cluster the YAML file that has them"
            )


def _refuse_small(
    config: PlanConfig, stage: PretrainStage, group: Mapping[str, Any]
) -> None:
    name, gpus = config.types.gpu, group.get("resources", {}).get("GPU")
    most = group.get("max_workers")
    if gpus is not None and gpus < stage.gpus_per_node:
        raise ValueError(
            f"pretrain.gpus_per_node is {stage.gpus_per_node}, and a node of the type "
            f"{name!r} has {gpus} in {config.cluster}: correct one of them"
        )
    if most is not None and most < stage.max_nodes:
        raise ValueError(
            f"pretrain.max_nodes is {stage.max_nodes}, and {config.cluster} allows "
            f"{most} of the type {name!r}: raise its max_workers, or lower max_nodes"
        )


def _content(path: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = yaml.safe_load(Path(path).read_text())
        groups = content["available_node_types"].items()
        types = {str(name): dict(group) for name, group in groups}
        return content | {"available_node_types": types}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"--cluster {path} cannot be read: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--cluster {path} has no available_node_types: give a YAML file of "
            "`ray up`, or leave it out"
        ) from error


def _assumed(assume: Assumptions, group: Mapping[str, Any]) -> Assumptions:
    cores = group.get("resources", {}).get("CPU")
    most = group.get("max_workers")
    return dataclasses.replace(
        assume,
        cpu_cores=int(cores) if cores else assume.cpu_cores,
        cpu_nodes=int(most) if most else assume.cpu_nodes,
    )
