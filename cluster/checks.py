"""Whatever can be wrong with a run, before any node starts.

Owns asking storage, the commands and the cluster's configuration. Does not own the
rules themselves: keys are the commands' own, valid world sizes those of
`trainer.contract`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from cluster import nodes
from cluster.commands import (
    EVALUATE,
    PREPROCESS,
    PRETRAIN,
    Lanes,
    config_file,
    evaluate_words,
    lanes_of,
    preprocess_words,
    resolved,
    trainer_config,
)
from cluster.demand import bundle
from cluster.options import EvaluateStage, PretrainStage, RunConfig
from cluster.store import Store, without_password
from cluster.trained import saved_step
from pipeline.config import differences, nearest
from pipeline.manifest import MANIFEST, Manifest, manifest_from_json
from trainer.contract import CONFIG, blocking, valid_world_sizes


def check(config: RunConfig) -> None:
    """Raise ValueError or OSError, with the cure, for what would fail later.

    Needs a connection to the cluster, and starts nothing on it.
    """
    Store(config.output).refuse_unwritable()
    if config.preprocess:
        words = preprocess_words(config.preprocess, output=config.shards)
        named = any(word.startswith(("--input=", "--inputs=")) for word in words)
        if not named and not config.preprocess.config:
            raise ValueError("preprocess.arguments.input must name the corpus")
        resolved(PREPROCESS, words)
    elif read_manifest(config.shards) is None:
        raise ValueError(
            f"{without_password(config.shards)} has no {MANIFEST}: correct `data`, or "
            "give a preprocess stage that makes it"
        )
    if config.pretrain:
        given = trainer_config(
            config.pretrain, data=config.shards, output=config.trained
        )
        valid_nodes(config.pretrain, lanes_of(given))
        _refuse_other_run(config.trained, given)
        _refuse_missing_nodes(config.pretrain)
    if config.evaluate:
        words = evaluate_words(config.evaluate, run=config.trained, data=config.shards)
        resolved(EVALUATE, words)
        _refuse_too_much(config.evaluate)
    _refuse_unknown_types(config)


def valid_nodes(stage: PretrainStage, lanes: Lanes) -> list[int]:
    """Numbers of nodes, rising, between the stage's least and most, at which the run
    takes the same steps.

    Raises:
        ValueError: there is none, or the lanes do not divide the global batch.
    """
    if lanes.global_batch % lanes.lanes:
        raise ValueError(
            f"lanes {lanes.lanes} does not divide global_batch {lanes.global_batch}: "
            "choose another of them under pretrain.arguments"
        )
    sizes = valid_world_sizes(
        lanes.lanes, global_batch=lanes.global_batch, group=lanes.group
    )
    by_nodes = [size // stage.ranks for size in sizes if size % stage.ranks == 0]
    found = [n for n in by_nodes if stage.min_nodes <= n <= stage.max_nodes]
    if not found:
        some = ", ".join(map(str, by_nodes)) or "none"
        raise ValueError(
            f"no number of nodes from {stage.min_nodes} (pretrain.min_nodes) to "
            f"{stage.max_nodes} (max_nodes) with {stage.ranks} ranks each divides the "
            f"{lanes.lanes} lanes of the run: possible with such nodes are {some}; or "
            "choose other `lanes` for a new run"
        )
    return found


def read_manifest(data: str) -> Manifest | None:
    """What a dataset's manifest says, also while it is being written; None where there
    is none yet.

    Raises:
        ValueError: it is damaged, or of another schema.
    """
    text = Store(data).read(MANIFEST)
    if text is None:
        return None
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{without_password(data)}/{MANIFEST} is damaged ({error}): run preprocess "
            "again to have it written anew"
        ) from error
    return manifest_from_json(value)


def _refuse_other_run(run: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError where the trainer's run was made with a configuration that
    `given` cannot continue; nor is a complete one what `given` would make.
    """
    text = Store(run).read(CONFIG)
    if text is None or not saved_step(run):
        # The trainer starts anew.
        return
    with suppress(yaml.YAMLError, AttributeError):
        if not _changed(yaml.safe_load(text), given):
            return
    # Read by the trainer, keys that there were none of then have their defaults.
    with config_file(text) as path:
        changed = _changed(resolved(PRETRAIN, [f"--config={path}"]), given)
    if changed:
        raise ValueError(
            f"{without_password(run)} was trained with another configuration: "
            f"{'; '.join(changed)}. Take the old values to continue it, or another "
            "`output` for a new run"
        )


def _changed(before: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    lines = differences(before, given)
    return blocking(lines, changed_data=given["changed_data"])


def _refuse_missing_nodes(stage: PretrainStage) -> None:
    if several := nodes.with_several(stage.node_resource):
        raise ValueError(
            f"node type {several[0]} has more than one {stage.node_resource!r}, so one "
            f"node would count as several: give it `{stage.node_resource}: 1`"
        )
    kinds = nodes.offered({stage.node_resource: 1})
    offers = nodes.offered(bundle(stage))
    if kinds is None or offers is None:
        return
    if not kinds:
        raise ValueError(
            f"no node type of the cluster has the resource {stage.node_resource!r} "
            f"({_listed(nodes.known_types() or [])}): give the nodes for training "
            f"`resources: {{{stage.node_resource}: 1}}` in the cluster's YAML, or name "
            "theirs in pretrain.node_resource"
        )
    if not offers:
        raise ValueError(
            f"pretrain.gpus_per_node is {stage.gpus_per_node} and cpus_per_node "
            f"{stage.cpus_per_node:g}: no node for training has as many "
            f"({_listed(list(kinds))}); see `resources` in the cluster's YAML"
        )
    most = sum(offers.values())
    if most < stage.min_nodes:
        raise ValueError(
            f"pretrain.min_nodes is {stage.min_nodes}, and the cluster may have "
            f"{most} such nodes at most ({_listed(list(offers))}): raise their "
            "max_workers, or lower min_nodes"
        )


def _refuse_too_much(stage: EvaluateStage) -> None:
    if nodes.offered({"GPU": stage.gpus, "CPU": stage.cpus}) == {}:
        raise ValueError(
            f"evaluate.gpus is {stage.gpus:g} and evaluate.cpus {stage.cpus:g}: no "
            f"node type of the cluster has as many "
            f"({_listed(nodes.known_types() or [])})"
        )


def _refuse_unknown_types(config: RunConfig) -> None:
    known = nodes.known_types()
    if known is None:
        return
    for name in config.prices:
        if name not in (*known, nodes.HEAD):
            raise ValueError(
                f"prices names the node type {name!r}, which the cluster has not."
                f"{nearest(name, known)} It has {_listed(known)}"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "it has no node types"
