"""A training step as `trainer.pretrain` takes it, on batches that are there already.

Owns the engine of a benchmark: DeepSpeed's, or a plain one where that is not installed;
and the clock around steps. Does not own the step: `trainer.loop` and `trainer.engine`
take it, and `trainer.feed` copies batches to the device meanwhile.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Setting
from trainer.build import build_model
from trainer.engine import (
    World,
    apply_step,
    build_engine,
    chosen_precision,
    decides_on_device,
    parameter_groups,
    start_world,
)
from trainer.feed import Feed
from trainer.flops import step_flops
from trainer.gpus import known_peak
from trainer.loader import Loader, StepBatch
from trainer.loop import global_counts, run_micro_batches
from trainer.options import PretrainConfig
from trainer.profiling import peak_memory_gib
from trainer.update import Result, step_on_device

ROUNDS = 3


def has_deepspeed() -> bool:
    """DeepSpeed can be imported."""
    return importlib.util.find_spec("deepspeed") is not None


def world_of(setting: Setting) -> World:
    """This process alone. With DeepSpeed, in a process group; one is enough."""
    if not has_deepspeed():
        return World(rank=0, size=1, device=setting.device)
    if torch.distributed.is_initialized():
        device = torch.device("cuda", 0) if setting.cuda else setting.device
        return World(rank=0, size=1, device=device)
    return start_world()


class Plain:
    """What `trainer.loop` and `apply_step` ask of an engine, in plain torch: one
    micro-batch a step; with bf16, fp32 master weights, as DeepSpeed's ZeRO 1 has them.
    """

    def __init__(self, model: nn.Module, config: PretrainConfig, *, bf16: bool) -> None:
        self.module = model.to(torch.bfloat16) if bf16 else model
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._bf16 = bf16
        groups = parameter_groups(model, config.optimizer)
        if bf16:
            self._masters = {
                p: p.detach().float().requires_grad_() for p in self._weights
            }
            for group in groups:
                group["params"] = [self._masters[p] for p in group["params"]]
        fused = self._weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=fused,
        )

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def step(self) -> None:
        """Update the weights, and drop the gradients."""
        if self._bf16:
            for weight, master in self._masters.items():
                assert weight.grad is not None
                master.grad = weight.grad.float()
        self.optimizer.step()
        if self._bf16:
            masters = [m.detach() for m in self._masters.values()]
            torch._foreach_copy_([w.detach() for w in self._weights], masters)
        self.module.zero_grad()


@dataclass(kw_only=True)
class Trainee:
    """A model with its engine, that takes steps."""

    loader: Loader
    engine: Any
    world: World
    kind: str
    """Which engine."""
    lr: float
    pending: Result | list[float] | None = None
    """What the last step came to."""

    def step(self, batch: StepBatch) -> None:
        """One whole step, as in `trainer.loop`: where the device decides whether it is
        taken, what the step before came to is read once both passes of this one are
        queued.
        """
        config = self.loader.config
        totals = global_counts(batch.counts, self.world)
        sums = run_micro_batches(self.engine, self.loader, batch, totals, self.world)
        self.sums()
        if decides_on_device(self.engine):
            terms = len(config.model.terms)
            result = step_on_device(self.engine, sums, terms, self.world, lr=self.lr)
            self.pending = result
        else:
            self.pending = sums.tolist()
            apply_step(self.engine, lr=self.lr, clip=config.optimizer.clip)

    def sums(self) -> list[float]:
        """The sums of the last step's losses, once; empty where they have been read."""
        pending, self.pending = self.pending, None
        return pending.read()[0] if isinstance(pending, Result) else pending or []

    def close(self) -> None:
        """Let go of memory."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()
        self.engine = None


def trainee(
    loader: Loader,
    setting: Setting,
    *,
    recompute: bool = False,
    change: Callable[[nn.Module], None] | None = None,
) -> Trainee:
    """A fresh model of the loader's recipe on the device, weights from its seed.

    Args:
        change: done to the model before the engine is built.
    """
    config, world = loader.config, world_of(setting)
    torch.manual_seed(config.seed)
    # Drawn on the host, so that every device and precision begins alike.
    model = build_model(config, loader.dataset.tokenizer).to(setting.device)
    model.recompute = recompute
    if change is not None:
        change(model)
    bf16 = chosen_precision(config) == "bf16"
    if has_deepspeed():
        pairs = config.micro_batch
        engine = build_engine(model, config, world=world, micro_batch=pairs)
        kind = f"deepspeed ZeRO {config.deepspeed.zero_stage}"
    else:
        engine, kind = Plain(model, config, bf16=bf16), "plain torch"
    return Trainee(
        loader=loader,
        engine=engine,
        world=world,
        kind=f"{kind}, {'bf16' if bf16 else 'fp32'}",
        lr=config.optimizer.lr,
    )


def repeated(batches: Sequence[StepBatch], steps: int) -> Iterator[StepBatch]:
    """The batches over and over, `steps` in all."""
    return itertools.islice(itertools.cycle(batches), steps)


def timed_steps(
    one: Trainee,
    batches: Iterator[StepBatch],
    setting: Setting,
    *,
    warmup: int,
    steps: int,
) -> dict[str, Any]:
    """Take `warmup` steps and then `ROUNDS` rounds of `steps`, of batches that suffice.
    What the median round says; waits for data are of all rounds.
    """
    seconds, deliveries, counted = [], [], []
    with Feed(batches, setting.device) as feed:
        for _ in range(warmup):
            one.step(feed.next())
            feed.ended()
        for _ in range(ROUNDS):
            setting.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                batch = feed.next()
                one.step(batch)
                deliveries.append(feed.ended())
                counted.append(batch.counts)
            one.sums()
            setting.synchronize()
            seconds.append(time.perf_counter() - began)
    step_s = statistics.median(seconds) / steps
    waits = sum(delivery.waited() for delivery in deliveries)
    return {
        "engine": one.kind,
        "step_s": step_s,
        "slowest_round_s": max(seconds) / steps,
        "fastest_round_s": min(seconds) / steps,
        "data_wait": waits / sum(seconds),
        "peak_memory_gib": peak_memory_gib(setting.device),
        **speed(one.loader, counted, step_s, setting),
    }


def speed(
    loader: Loader, counted: Sequence[Any], step_s: float, setting: Setting
) -> dict[str, float]:
    """Pairs/s, real tokens/s, padding and MFU of steps with these counts that took
    `step_s` on average.
    """
    config = loader.config
    steps = len(counted)
    flops = sum(
        step_flops(
            config.model,
            each,
            vocab_size=loader.dataset.tokenizer.vocab_size,
            image_size=config.image.size,
        )
        for each in counted
    )
    pairs, tokens, rows = (
        sum(getattr(each, name) for each in counted)
        for name in ("pairs", "tokens", "rows")
    )
    found = {
        "pairs_per_s": pairs / steps / step_s,
        "tokens_per_s": tokens / steps / step_s,
        "tokens_of_a_pair": tokens / pairs,
        "padding": 1 - tokens / rows,
        "model_tflops": flops / steps / step_s / 1e12,
    }
    if setting.cuda and (peak := known_peak(torch.cuda.get_device_name())):
        found["mfu"] = flops / steps / step_s / peak
    return found
