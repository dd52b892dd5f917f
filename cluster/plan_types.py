"""Node types that a plan may name: those of a cluster's YAML, or the usual ones.

Owns reading the file, and refusing names that nobody knows. Does not own what the types
are used for (`cluster.plan_run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.plan_options import Assumptions, NodeTypes, PlanConfig
from pipeline.config import nearest


def with_types(config: PlanConfig) -> PlanConfig:
    """`config` with what the cluster's YAML says of its nodes.

    Raises:
        ValueError: the file cannot be used, or a type that is named is not known.
    """
    types = config.types
    known = [*dataclasses.asdict(NodeTypes()).values(), "cpu-ondemand"]
    place = ""
    if config.cluster:
        groups = _node_groups(config.cluster)
        known, place = [*groups, types.head], f" of {config.cluster}"
        config = dataclasses.replace(
            config, assume=_assumed(config.assume, groups.get(types.cpu, {}))
        )
    else:
        # Named by hand, so that prices may name them as well.
        known += [types.cpu, types.gpu, types.ondemand, types.head]
    needed = [("types.cpu", types.cpu)] * bool(config.preprocess)
    if config.pretrain:
        needed.append(("types.gpu", types.gpu))
    names = [*needed, *((f"prices.{name}", name) for name in config.prices)]
    for key, name in names:
        if name not in known:
            listed = ", ".join(dict.fromkeys(known))
            raise ValueError(
                f"{key}: {name!r} is no node type{place}.{nearest(name, known)} "
                f"There are {listed}; --types names those that the plan is about, "
                "--cluster the YAML file that has them"
            )
    return config


def _node_groups(path: str) -> dict[str, dict[str, Any]]:
    try:
        groups = yaml.safe_load(Path(path).read_text())["available_node_types"]
        return {str(name): dict(group) for name, group in groups.items()}
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
