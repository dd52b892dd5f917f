"""A plan: everything that `trainer.plan` says, as numbers.

Owns how its parts are put together, and what is recommended. Does not own any of the
parts: data (`trainer.plan_data`), memory (`trainer.plan_memory`), FLOPs
(`trainer.flops`), GPUs (`trainer.gpus`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.manifest import TokenizerInfo
from trainer.build import build_model, model_sizes
from trainer.contract import check_world_size, micro_batch_size
from trainer.engine import chosen_precision
from trainer.flops import step_flops
from trainer.gpus import Gpu, gpu_named
from trainer.loader import STEPS_HELD
from trainer.options import PretrainConfig
from trainer.plan_data import Facts, expected, facts_of, facts_without_data, shapes
from trainer.plan_memory import Activations, States, states
from trainer.plan_options import NO_DATA, PlanConfig

GIB = 1 << 30
STAGES = (0, 1, 2, 3)
# Steps on the device: computed, queued behind it, waiting, on its way
# (`trainer.feed`).
_DEVICE_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Memory of a GPU under one ZeRO stage, in bytes, at the planned micro-batch."""

    stage: int
    refused: str | None
    """Why pretrain would not start with it, if so."""
    states: States
    inputs: int
    """Images that lie on the device, of this step and those to come."""
    peak: int
    peak_checkpointed: int
    """With activation checkpointing."""
    fits: bool
    fits_checkpointed: bool
    largest: int | None
    """Largest micro-batch that fits; None where none does."""
    largest_checkpointed: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says. None stands for what is not known."""

    config: PlanConfig
    gpu: Gpu
    facts: Facts
    bf16: bool
    parameters: dict[str, int]
    micro_batch: int
    accumulation: int
    usable: int
    """Bytes of a GPU's memory, less headroom."""
    activations: Activations
    stages: tuple[Stage, ...]
    recommended: Stage | None
    """The lowest stage that fits; without activation checkpointing if there is one."""
    host_buffers: int
    """Bytes of images that a rank keeps on the host."""
    forward_flops: dict[str, float]
    """Of a step, by part."""
    step_flops: float
    peak_tflops: float
    """Of one GPU, which the assumed utilisation is a share of."""
    step_s: float
    steps: int
    checkpoint: int
    """Bytes of one checkpoint, all ranks together."""

    @property
    def pairs_per_s(self) -> float:
        """Over all GPUs."""
        return self.config.global_batch / self.step_s

    @property
    def hours(self) -> float:
        """Of all steps, without starting, checkpoints and validation."""
        return self.steps * self.step_s / 3600

    @property
    def cost(self) -> float | None:
        """Of all GPUs, if the price is known."""
        price = self.config.price
        return None if price is None else self.hours * self.config.gpus * price

    @property
    def epochs(self) -> float | None:
        """Passes over the data, where that means something."""
        per_epoch = self.facts.steps_per_epoch
        return self.steps / per_epoch if per_epoch else None

    @property
    def read_rate(self) -> float | None:
        """Bytes a second over all GPUs."""
        size = self.facts.read_bytes
        return None if size is None else size * self.pairs_per_s

    @property
    def cores(self) -> float | None:
        """Cores like this machine's that decode as fast as the GPUs train."""
        seconds = self.facts.decode_s
        return None if seconds is None else seconds * self.pairs_per_s


def plan(config: PlanConfig) -> Plan:
    """Make the plan of a run.

    Raises:
        ValueError: what `trainer.pretrain` would refuse, or an unknown GPU.
    """
    gpu = gpu_named(config.gpu)
    check_world_size(config.gpus, lanes=config.lanes)
    micro_batch = micro_batch_size(
        global_batch=config.global_batch,
        world_size=config.gpus,
        ceiling=config.micro_batch,
        group=config.model.group,
    )
    if config.global_batch % config.lanes:
        raise ValueError(
            f"global_batch {config.global_batch} is not a multiple of the "
            f"{config.lanes} lanes"
        )
    if config.data == NO_DATA:
        facts = facts_without_data(
            config, vocab_size=config.vocab_size, text_tokens=config.text_tokens
        )
    else:
        facts = facts_of(config, ranks=config.gpus, decode=config.decode)
    bf16 = config.deepspeed.precision != "fp32"
    peak = config.log.peak_tflops or (gpu.bf16_tflops if bf16 else None)
    if peak is None:
        raise ValueError(
            f"the peak that is known of a {gpu.name} is that of bf16: give that of "
            "fp32 by --log.peak_tflops, or plan with --deepspeed.precision bf16"
        )
    parameters = parameters_by_part(config, facts.tokenizer)
    total = sum(parameters.values())
    usable = int(gpu.memory_gib * GIB * (1 - config.headroom))
    budget = Budget(
        config=config,
        facts=facts,
        ranks=config.gpus,
        parameters=total,
        bf16=bf16,
        usable=usable,
    )
    stages = tuple(budget.stage(number, micro_batch) for number in STAGES)
    sizes = {"vocab_size": facts.tokenizer.vocab_size, "image_size": config.image.size}
    work = expected(config, facts, config.global_batch)
    flops = step_flops(config.model, work, **sizes)
    return Plan(
        config=config,
        gpu=gpu,
        facts=facts,
        bf16=bf16,
        parameters=parameters,
        micro_batch=micro_batch,
        accumulation=config.global_batch // config.gpus // micro_batch,
        usable=usable,
        activations=budget.activations(micro_batch),
        stages=stages,
        recommended=recommended(stages),
        host_buffers=STEPS_HELD * budget.images,
        forward_flops=config.model.forward_flops(work, **sizes),
        step_flops=flops,
        peak_tflops=peak,
        step_s=flops / (config.gpus * peak * 1e12 * config.mfu),
        steps=config.last_step,
        checkpoint=checkpoint_bytes(total),
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory of a rank for any micro-batch and ZeRO stage."""

    config: PretrainConfig
    facts: Facts
    ranks: int
    parameters: int
    bf16: bool
    usable: int
    lazy: bool = False
    """On a CPU (`trainer.plan_memory.states`)."""

    @property
    def images(self) -> int:
        """Bytes of a rank's images of one step, uint8."""
        side = self.config.image.size
        return self.config.global_batch // self.ranks * side * side * 3

    def activations(self, micro_batch: int) -> Activations:
        """Of one micro-batch."""
        sizes = shapes(self.config, self.facts, micro_batch)
        if self.lazy:
            # Attention on a CPU takes no table.
            sizes = dataclasses.replace(sizes, table=sizes.rows)
        return self.config.model.activations(
            sizes,
            sizes=model_sizes(self.config, self.facts.tokenizer),
            bf16=self.bf16,
        )

    def states(self, stage: int) -> States:
        """Under a ZeRO stage."""
        return states(
            self.parameters,
            stage=stage,
            ranks=self.ranks,
            bf16=self.bf16,
            lazy=self.lazy,
        )

    def peak(self, stage: int, micro_batch: int, *, checkpointing: bool) -> int:
        """Bytes at the worst moment of a step."""
        kept = self.activations(micro_batch).total(checkpointing=checkpointing)
        steps = STEPS_HELD if self.lazy else _DEVICE_STEPS
        return self.states(stage).peak(kept) + steps * self.images

    def largest(self, stage: int, *, checkpointing: bool) -> int | None:
        """Largest micro-batch that fits, a divisor of a rank's share of a step."""
        share = self.config.global_batch // self.ranks
        group, fitting = self.config.model.group, None
        for size in (n for n in range(group, share + 1, group) if share % n == 0):
            if self.peak(stage, size, checkpointing=checkpointing) > self.usable:
                break
            fitting = size
        return fitting

    def stage(self, number: int, micro_batch: int) -> Stage:
        """Everything about one ZeRO stage."""
        peak = self.peak(number, micro_batch, checkpointing=False)
        least = self.peak(number, micro_batch, checkpointing=True)
        return Stage(
            stage=number,
            refused=self._refusal(number),
            states=self.states(number),
            inputs=_DEVICE_STEPS * self.images,
            peak=peak,
            peak_checkpointed=least,
            fits=peak <= self.usable,
            fits_checkpointed=least <= self.usable,
            largest=self.largest(number, checkpointing=False),
            largest_checkpointed=self.largest(number, checkpointing=True),
        )

    def _refusal(self, stage: int) -> str | None:
        """What pretrain says to a stage and this precision, if it refuses them."""
        keys = dataclasses.replace(
            self.config.deepspeed,
            zero_stage=stage,  # type: ignore[arg-type]
            precision="bf16" if self.bf16 else "fp32",
        )
        try:
            chosen_precision(dataclasses.replace(self.config, deepspeed=keys))
        except ValueError as error:
            return str(error)
        return None


def recommended(stages: tuple[Stage, ...]) -> Stage | None:
    """The lowest stage that fits and starts, because each sends more than the one
    before; one that needs activation checkpointing only where no other does.
    """
    able = [one for one in stages if not one.refused]
    whole = [one for one in able if one.fits]
    return next(iter(whole or [one for one in able if one.fits_checkpointed]), None)


def parameters_by_part(
    config: PretrainConfig, tokenizer: TokenizerInfo
) -> dict[str, int]:
    """Parameters of each part of the model, of a real one without memory."""
    with torch.device("meta"):
        model = build_model(config, tokenizer)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        part = config.model.parts.get(first, first.replace("_", " "))
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def checkpoint_bytes(parameters: int) -> int:
    """Size of a checkpoint's tensors, all ranks together, in every ZeRO stage: fp32
    weights and two moments of AdamW.
    """
    return 12 * parameters


def as_json(found: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds and counts."""
    facts = found.facts
    work = expected(found.config, facts, 1)
    return {
        "gpu": dataclasses.asdict(found.gpu),
        "gpus": found.config.gpus,
        "precision": "bf16" if found.bf16 else "fp32",
        "parameters": found.parameters,
        "parameters_total": sum(found.parameters.values()),
        "global_batch": found.config.global_batch,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "usable_bytes": found.usable,
        "activations": dataclasses.asdict(found.activations),
        "stages": [dataclasses.asdict(stage) for stage in found.stages],
        "recommended_stage": found.recommended.stage if found.recommended else None,
        "recommended_checkpointing": (
            not found.recommended.fits if found.recommended else None
        ),
        "host_buffer_bytes": found.host_buffers,
        "mfu_assumed": found.config.mfu,
        "peak_tflops": found.peak_tflops,
        "forward_flops": found.forward_flops,
        "step_flops": found.step_flops,
        "step_s": found.step_s,
        "pairs_per_s": found.pairs_per_s,
        "pairs": facts.pairs,
        "sources": [
            {"name": name, "pairs": pairs, "share": share}
            for name, pairs, share in facts.sources
        ],
        "tokens_per_pair": work.tokens,
        "text_tokens_per_pair": float(facts.lengths.mean()),
        "masked_words_per_pair": work.masked_words,
        "cut_captions_frac": facts.cut,
        "steps_per_epoch": facts.steps_per_epoch,
        "steps": found.steps,
        "epochs": found.epochs,
        "hours": found.hours,
        "read_bytes_per_pair": facts.read_bytes,
        "read_bytes_per_s": found.read_rate,
        "decode_s_per_pair": facts.decode_s,
        "decode_cores": found.cores,
        "checkpoint_bytes": found.checkpoint,
        "cost": found.cost,
    }
