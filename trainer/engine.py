"""The DeepSpeed engine: process group, precision, optimizer and one optimizer step.

Owns everything that is DeepSpeed's way of doing things. Does not own the loop
(`trainer.loop`) or what a checkpoint holds (`trainer.checkpoint`).
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.models.dense import VECTOR
from trainer.one_rank import can_step_in_one_pass, in_one_pass, take_gradients_whole
from trainer.options import (
    DeepSpeedConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)
from trainer.refusal import combined_norm, refusing, refusing_on_device

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None
    """Process group for what lies on the host, so that no rank waits for its GPU to
    agree on it; None: the default one, where that is gloo."""

    @property
    def first(self) -> bool:
        """Rank 0: the one that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over ranks, in place, wherever they lie."""
        if self.size > 1:
            on_host = values.device.type == "cpu"
            dist.all_reduce(values, group=self.host_group if on_host else None)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every rank, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The plain value of rank 0, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def together(self, make: Callable[[], Item]) -> Item:
        """What `make` gives on this rank. When it fails on any, that rank raises and
        the others exit, instead of waiting for it in a collective.

        Raises:
            ValueError, OSError: what `make` raised here.
        """
        return self.attempt(make).result()

    def attempt(self, make: Callable[[], Item]) -> Attempt[Item]:
        """`together` in two parts: what is left to do before the run ends over a
        failure is done between them, by every rank.
        """
        failure: ValueError | OSError | None = None
        found = None
        try:
            found = make()
        except (ValueError, OSError) as error:
            failure = error
        failed = torch.tensor([failure is not None], dtype=torch.int64)
        return Attempt(self, found, failure, failed=bool(self.sum(failed).item()))

    def stop(self, error: ValueError) -> NoReturn:
        """End the run over what every rank has found alike: rank 0 raises it, and the
        others exit.
        """
        self.leave()
        if self.first:
            raise error
        sys.exit(1)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def settle(self) -> None:
        """Wait for what this rank's device has been given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def leave(self) -> None:
        """Leave the process group together, before an exit that every rank agreed on:
        one that is left by a peer's exit alone may abort instead.
        """
        # Every rank has queued the same: no collective is cut off on its way.
        self.settle()
        self.barrier()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Attempt(Generic[Item]):
    """What came of something that every rank tried."""

    _world: World
    _found: Item | None
    _failure: ValueError | OSError | None
    failed: bool
    """On some rank; all ranks know it."""

    def result(self) -> Item:
        """What this rank has got; or, where any failed, it raises what it failed with
        and the others exit.

        Raises:
            ValueError, OSError: what was raised here.
        """
        if self.failed:
            self._world.leave()
            if self._failure:
                raise self._failure
            sys.exit(1)
        return cast(Item, self._found)


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) that the launcher set; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_world() -> World:
    """Join the process group: NCCL on GPUs, gloo on CPUs. Works without a launcher."""
    quiet_deepspeed()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    rank, size = world_from_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    host_group = None
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _join("nccl")
        host_group = dist.new_group(backend="gloo")
    else:
        device = torch.device("cpu")
        _skip_shared_memory_op()
        _join("gloo")
        if "OMP_NUM_THREADS" not in os.environ:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    return World(rank=rank, size=size, device=device, host_group=host_group)


def _join(backend: str) -> None:
    import deepspeed

    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"port {os.environ['MASTER_PORT']} is taken, by another run perhaps: give "
            "the launcher another, deepspeed --master_port 29501 ..."
        ) from error


def quiet_deepspeed() -> None:
    """Leave the terminal to the run: DeepSpeed logs warnings and worse only."""
    # Told which accelerator, it does not warn about having found none.
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    # DeepSpeed calls collectives by names that this torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.dist")
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


def chosen_precision(config: PretrainConfig) -> str:
    """`bf16` or `fp32`, from the hardware unless the recipe says which.

    Raises:
        ValueError: bf16 with ZeRO stage 0, which DeepSpeed trains with a first Adam
            step on zero gradients (0.19.8), and whose checkpoints hold no fp32 weights.
    """
    chosen = config.deepspeed.precision
    if chosen == "auto":
        # Emulated bf16 would be slow, and the attention kernel refuses the hardware.
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        chosen = "bf16" if native else "fp32"
    if chosen == "bf16" and config.deepspeed.zero_stage == 0:
        raise ValueError(
            "bf16 needs deepspeed.zero_stage 1 or more, which keeps the fp32 master "
            "weights; or take deepspeed.precision fp32"
        )
    return chosen


def build_engine(
    model: nn.Module, config: PretrainConfig, *, world: World, micro_batch: int
) -> Any:
    """The DeepSpeed engine around `model`, with AdamW on it."""
    import deepspeed

    _import_muon_uncompiled()
    bf16 = chosen_precision(config) == "bf16"
    accumulation = config.global_batch // world.size // micro_batch
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        # One kernel for all parameters; on CPUs the curves of before.
        fused=world.device.type == "cuda",
    )
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.optimizer.clip,
            "zero_optimization": zero_optimization(config.deepspeed),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16},
            # Sums of bf16 gradients would depend on how many ranks share them.
            **({"communication_data_type": "fp32"} if bf16 else {}),
            "steps_per_print": 1 << 40,
            # It waits for the device twice a micro-batch, to say how fast that was.
            "timers": {"throughput": {"enabled": False}},
        },
    )
    chosen = config.deepspeed
    if world.size == 1 and chosen.zero_stage == 1 and chosen.offload == "none":
        take_gradients_whole(engine)
    return engine


def _import_muon_uncompiled() -> None:
    """Import an optimizer that `deepspeed.initialize` imports unasked, without
    `torch.compile` on its functions: that imports all of Inductor, a second a start.
    """
    from deepspeed.runtime import compiler

    decorate = compiler.compile
    compiler.compile = lambda *args, **keys: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorate


def zero_optimization(config: DeepSpeedConfig) -> dict[str, Any]:
    """What is sharded and where it lies, in DeepSpeed's words."""
    found: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload == "cpu":
        pinned = torch.cuda.is_available()
        found["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return found


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; norms and biases without. ZeRO lays a
    group's parameters end to end, so those that fill no whole vectors come last in it:
    behind one of 30,522 words' biases every other begins at an address that cuBLAS has
    only slow kernels for.
    """
    last = sorted(model.parameters(), key=lambda p: p.numel() % VECTOR > 0)
    decay = [p for p in last if p.ndim > 1]
    plain = [p for p in last if p.ndim <= 1]
    return [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(
    step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """Learning rate of the step numbered `step` from 0: a pure function of it."""
    if step < schedule.warmup:
        return optimizer.lr * (step + 1) / schedule.warmup
    down = schedule.warmup
    if schedule.shape == "wsd":
        down = max(down, round(schedule.steps * (1 - schedule.decay_share)))
    progress = (step - down) / max(schedule.steps - down, 1)
    progress = min(max(progress, 0.0), 1.0)
    left = 1 - progress
    if schedule.shape == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    floor = schedule.final_lr_fraction
    return optimizer.lr * (floor + (1 - floor) * left)


def apply_step(engine: Any, *, lr: float, clip: float, take: bool = True) -> float:
    """Take the optimizer step at the end of accumulation; the gradient norm before
    clipping. Where that is not finite, or unless `take`, the gradients are dropped and
    weights, moments and Adam's count of steps stay as they are on every rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    own_norm = isinstance(engine.optimizer, torch.optim.Optimizer)
    if own_norm:
        # Stage 0 in fp32 is a bare torch optimizer; DeepSpeed keeps no norm there.
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), clip)
        take = take and bool(norm.isfinite())
    if take:
        # ZeRO optimizers refuse a norm that is not finite by themselves.
        engine.step()
        return float(norm if own_norm else engine.get_global_grad_norm())
    with refusing(engine.optimizer) as measured:
        engine.step()
    return float(norm) if own_norm else combined_norm(measured)


def decides_on_device(engine: Any) -> bool:
    """Whether `apply_step_on_device` can be had: ZeRO 1 and 2 without offload, on GPUs,
    where AdamW is fused.
    """
    zero = engine.optimizer
    return (
        hasattr(zero, "scaled_global_norm")
        and not zero.cpu_offload
        and bool(zero.optimizer.param_groups[0]["fused"])
    )


def apply_step_on_device(engine: Any, *, lr: float, unwanted: Tensor) -> Tensor:
    """As `apply_step`, without waiting for the device: it finds out itself whether the
    norm is finite and `unwanted`, a number on it, is 0. The norm, on the device.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    zero = engine.optimizer
    one_pass = in_one_pass(zero) if can_step_in_one_pass(zero) else nullcontext()
    with refusing_on_device(zero, unwanted), one_pass:
        engine.step()
    norm: Tensor = engine.get_global_grad_norm()
    return norm


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an extension, for which it needs a C++ compiler and
    half a minute, that only its inference uses.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
