"""What the commands say of a corpus and a recipe, as nodes, hours and bytes.

Owns asking `pipeline.preprocess --dry_run` and `trainer.plan`, and what follows from
their answers without preemptions. Does not own how they know (`pipeline.estimate`,
`trainer.plan_run`), preemptions (`cluster.plan_sweep`), or prices
(`cluster.plan_run`).
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from typing import Any

from cluster.checks import read_manifest, valid_nodes
from cluster.commands import (
    PREPROCESS,
    lanes_of,
    preprocess_words,
    pretrain_words,
    printed,
    trainer_config,
)
from cluster.options import PreprocessStage, PretrainStage
from cluster.plan_options import NO_OUTPUT, Assumptions, PlanConfig
from trainer.contract import micro_batch_size

PLAN = "trainer.plan"
_COPY_BYTES_S = 2e9
_STOP_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Making the shards."""

    inputs: int
    pairs: dict[str, float]
    """Samples to be expected in each split."""
    bytes: float
    ranges: int
    core_s: float
    """Of a core like this machine's."""
    nodes: int
    """In use at once: no more than have a range to work on."""
    wall_s: float
    """With starting the nodes."""
    node_s: float
    """That nodes are up, until they are idle for long enough to be let go."""
    tokens: float | None
    """Tokens of a text, special ones included; None where the sample has none."""
    vocab_size: int
    sampled: int
    """Inputs that this is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Training on a number of nodes, undisturbed."""

    nodes: int
    ranks: int
    micro_batch: int
    accumulation: int
    """Micro-batches of a rank in a step."""
    work_s: float
    """All steps, and nothing else."""
    slower: float
    """Times as long as on the largest number of nodes."""
    write_s: float
    """From stopping for a checkpoint until it exists."""
    read_mb_s: float | None
    """Each node reads; None where the size of a pair is not known."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Training, undisturbed."""

    gpu: str
    sizes: tuple[Size, ...]
    """From the fewest nodes to the most."""
    parameters: int
    steps: int
    step_s: float
    """On the most nodes."""
    pairs_per_s: float
    epochs: float | None
    checkpoint_bytes: int
    stall_s: float
    interval_s: float
    """Between two checkpoints, as the recipe has it."""
    tight: str | None
    """What does not fit into a GPU's memory, if anything."""

    @property
    def largest(self) -> Size:
        """On the most nodes."""
        return self.sizes[-1]


def preprocess(stage: PreprocessStage, assume: Assumptions) -> Preprocess:
    """Ask for a dry run, and cut it into nodes.

    Raises:
        ValueError: what the run would refuse, such as a corpus that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = preprocess_words(stage, output=f"{folder}/data")
        found = json.loads(printed(PREPROCESS, [*words, "--dry_run", "--json"]))
    core_s, ranges = found["seconds_of_one_core"], max(1, found["ranges"])
    # A core takes a range at a time.
    nodes = min(assume.cpu_nodes, math.ceil(ranges / assume.cpu_cores))
    rounds = math.ceil(ranges / (nodes * assume.cpu_cores))
    busy_s = rounds * core_s / ranges / assume.core_speed
    start_s = 60 * assume.node_minutes
    sample = found["sample"]
    share = found["inputs"] / sample["inputs"]
    splits = sample["splits"]
    captions = sum(split["captions"] for split in splits.values())
    tokens = sum(split["tokens"] for split in splits.values())
    return Preprocess(
        inputs=found["inputs"],
        pairs={name: share * split["samples"] for name, split in splits.items()},
        bytes=found["bytes"],
        ranges=found["ranges"],
        core_s=core_s,
        nodes=nodes,
        wall_s=start_s + busy_s,
        node_s=nodes * (start_s + busy_s + 60 * assume.idle_minutes),
        # Separators are counted, [CLS] is not.
        tokens=tokens / captions + 1 if captions else None,
        vocab_size=found["vocab_size"],
        sampled=sample["inputs"],
    )


def made_already(config: PlanConfig) -> bool:
    """Whether the run's shards are there and complete."""
    if config.output == NO_OUTPUT and not config.data:
        return False
    manifest = read_manifest(config.shards)
    if manifest is None and not config.preprocess:
        raise ValueError(
            f"{config.shards} has no manifest.json: correct `data`, or give a "
            "preprocess stage that makes it"
        )
    return manifest is not None and (manifest.complete or not config.preprocess)


def pretrain(
    config: PlanConfig, stage: PretrainStage, *, made: Preprocess | None
) -> Pretrain:
    """Ask for a plan of the largest and the smallest number of nodes.

    Args:
        made: what preprocessing will make; None where the shards are there.

    Raises:
        ValueError: an unknown recipe, key or GPU, or no valid number of nodes.
    """
    given = trainer_config(stage, data=config.shards, output=config.trained)
    lanes = lanes_of(given)
    counts = valid_nodes(stage, lanes)
    most = _planned(config, stage, nodes=counts[-1], made=made)
    least = _planned(config, stage, nodes=counts[0], made=made)
    pair_bytes, pairs = most["read_bytes_per_pair"], float(most["pairs"] or 0)
    if made:
        pairs = made.pairs.get(given["split"], 0.0)
        pair_bytes = made.bytes / max(1.0, sum(made.pairs.values()))
    size = most["checkpoint_bytes"]
    stall_s = config.assume.stall_seconds
    if stall_s is None:
        stall_s = _STOP_S + size / (counts[-1] * stage.ranks) / _COPY_BYTES_S

    def step_s(nodes: int) -> float:
        computing = most["step_s"] * counts[-1] / nodes
        return max(computing, config.assume.least_step_ms / 1000)

    def on(nodes: int) -> Size:
        ranks, pairs_per_s = nodes * stage.ranks, lanes.global_batch / step_s(nodes)
        micro = micro_batch_size(
            global_batch=lanes.global_batch,
            world_size=ranks,
            ceiling=given["micro_batch"],
            group=lanes.group,
        )
        # It is written after it was copied.
        write_s = stall_s + size / (nodes * config.assume.write_mb_s * 1e6)
        return Size(
            nodes=nodes,
            ranks=ranks,
            micro_batch=micro,
            accumulation=lanes.global_batch // ranks // micro,
            work_s=most["steps"] * step_s(nodes),
            slower=step_s(nodes) / step_s(counts[-1]),
            write_s=write_s,
            read_mb_s=pair_bytes and pair_bytes * pairs_per_s / nodes / 1e6,
        )

    return Pretrain(
        gpu=most["gpu"]["name"],
        sizes=tuple(map(on, counts)),
        parameters=most["parameters_total"],
        steps=most["steps"],
        step_s=step_s(counts[-1]),
        pairs_per_s=lanes.global_batch / step_s(counts[-1]),
        epochs=most["steps"] * lanes.global_batch / pairs if pairs else None,
        checkpoint_bytes=size,
        stall_s=stall_s,
        interval_s=_interval(given["checkpoint"], step_s(counts[-1])),
        tight=_tight(given, most, counts[-1]) or _tight(given, least, counts[0]),
    )


def _planned(
    config: PlanConfig, stage: PretrainStage, *, nodes: int, made: Preprocess | None
) -> dict[str, Any]:
    data = "none" if made else config.shards
    words = pretrain_words(stage, data=data, output=NO_OUTPUT)
    words += [f"--gpu={config.gpu}", f"--gpus={nodes * stage.ranks}", "--json"]
    words += [f"--mfu={config.assume.mfu}", "--decode=0"]
    if made:
        words.append(f"--vocab_size={made.vocab_size}")
        if made.tokens is not None:
            words.append(f"--text_tokens={max(3, round(made.tokens))}")
    found: dict[str, Any] = json.loads(printed(PLAN, words))
    return found


def _interval(checkpoint: dict[str, Any], step_s: float) -> float:
    by_steps = checkpoint["every_steps"] * step_s
    minutes = checkpoint["every_minutes"]
    return by_steps if minutes is None else min(by_steps, 60 * minutes)


def _tight(given: dict[str, Any], planned: dict[str, Any], nodes: int) -> str | None:
    """What to do where the recipe does not fit into memory on so many nodes."""
    keys = given["deepspeed"]
    stage = planned["stages"][keys["zero_stage"]]
    fits = stage["fits"] or (
        keys["activation_checkpointing"] and stage["fits_checkpointed"]
    )
    if fits and not stage["refused"]:
        return None
    cause = stage["refused"] or "it does not fit into a GPU's memory"
    better = planned["recommended_stage"]
    if better is None:
        cure = "take a smaller micro_batch, or GPUs with more memory (trainer.plan)"
    else:
        cure = f"take deepspeed.zero_stage {better}"
        if planned["recommended_checkpointing"]:
            cure += " with deepspeed.activation_checkpointing"
    return f"on {nodes} nodes with ZeRO {keys['zero_stage']}: {cause}; {cure}"
