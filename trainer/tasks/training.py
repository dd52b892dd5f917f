"""The loop of fine-tuning, on one device.

Owns the order of examples, the optimizer, when there is a checkpoint and which are
kept. Does not own the task (`trainer.tasks.base`), files of a checkpoint
(`trainer.tasks.tuned`) or the learning rate's way (`trainer.engine.learning_rate`).

A run is a pure function of (data, keys, seed): examples come in an order drawn by
Philox, so that of a resumed run goes on where it was. Nothing is drawn by torch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer.contract import METRICS
from trainer.engine import learning_rate, parameter_groups
from trainer.metrics import keep_steps
from trainer.options import OptimizerConfig, ScheduleConfig, at_least, finite
from trainer.philox import Use, permutation
from trainer.tasks import tuned
from trainer.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class LoopKeys:
    """Keys of the loop."""

    epochs: float = 5.0
    """Times that every example is seen."""
    batch: int = 32
    """Examples of a step."""
    lr: float = 2e-4
    """Peak learning rate, the same for body and head."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of Adam's two moments."""
    clip: float = 1.0
    """Largest global gradient norm; `.inf` for no limit."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then down by a cosine."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, each measured on the dev examples if there are any;
    null: one an epoch."""
    max_steps: int | None = None
    """Stop after this many steps; a later call with more continues."""

    def __post_init__(self) -> None:
        at_least("", self, batch=1, lr=0, weight_decay=0, warmup=0)
        finite("", self, "epochs", "lr", "weight_decay")
        at_least("", self, checkpoint_every=1, max_steps=1)
        if not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}: it must be more than 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}: give a positive norm, or .inf")
        if self.warmup > 1:
            raise ValueError(
                f"warmup is {self.warmup}: a share of the steps, at most 1"
            )

    def per_epoch(self, n_train: int) -> int:
        """Steps of an epoch: what is left over at its end is of another batch."""
        return max(n_train // self.batch, 1)

    def steps(self, n_train: int) -> int:
        """Steps of the whole schedule."""
        return max(math.ceil(self.epochs * self.per_epoch(n_train)), 1)


def train(
    task: Task, model: nn.Module, keys: LoopKeys, *, output: Path, seed: int
) -> int:
    """Fine-tune `model` in place from the newest checkpoint in `output`, if there is
    one, to the last step; the number of steps taken in all.

    Raises:
        ValueError: a loss that is not finite.
    """
    total = keys.steps(task.n_train)
    last = min(keys.max_steps or total, total)
    optimizer = _optimizer(model, keys)
    first = tuned.resume(output, model, optimizer)
    keep_steps(output / METRICS, first)
    bar = tqdm(total=total, initial=first, desc=output.name, unit="step", disable=None)
    every = keys.checkpoint_every or keys.per_epoch(task.n_train)
    model.train()
    with bar, open(output / METRICS, "a") as file:
        for step, batch in _batches(task, keys, seed, range(first, last)):
            row = _step(task, model, optimizer, batch, keys, step=step, total=total)
            done = step + 1
            saving = done % every == 0 or done == last
            if saving:
                row |= _measured(task, model)
            file.write(json.dumps(row) + "\n")
            bar.set_postfix(_shown(row), refresh=False)
            bar.update()
            if saving:
                file.flush()
                tuned.save(
                    output,
                    model,
                    optimizer,
                    step=done,
                    final=done == total,
                    measured=row.get(f"dev_{task.dev_metric}"),
                )
                if bar.disable:
                    print(f"step {done}/{total}  {_line(row)}", file=sys.stderr)
    return last


def order(n_train: int, *, seed: int, epoch: int) -> np.ndarray:
    """Examples (n_train,) in the order of an epoch."""
    return permutation(n_train, seed=seed, use=Use.FINETUNE, epoch=epoch, place=0)


def _batches(
    task: Task, keys: LoopKeys, seed: int, steps: range
) -> Iterator[tuple[int, Any]]:
    """Each step and its batch, the next one made while this one is used."""
    per_epoch = keys.per_epoch(task.n_train)
    orders: dict[int, np.ndarray] = {}

    def make(step: int) -> Any:
        epoch, place = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = order(task.n_train, seed=seed, epoch=epoch)
        start = place * keys.batch
        return task.batch(orders[epoch][start : start + keys.batch], epoch=epoch)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, steps.start) if len(steps) else None
        for step in steps:
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(make, step + 1) if step + 1 in steps else None
            yield step, batch


def _step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    keys: LoopKeys,
    *,
    step: int,
    total: int,
) -> dict[str, Any]:
    start = time.monotonic()
    lr = learning_rate(
        step,
        OptimizerConfig(lr=keys.lr),
        ScheduleConfig(
            steps=total, warmup=round(keys.warmup * total), final_lr_fraction=0
        ),
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss: Tensor = task.loss(model, batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), keys.clip)
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise ValueError(
            f"loss {value}, gradient norm {float(norm)} in step {step + 1}: lower --lr "
            f"(now {keys.lr}), or raise --warmup"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "loss": value,
        "lr": lr,
        "grad_norm": float(norm),
        "step_s": round(time.monotonic() - start, 4),
    }


def _measured(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    with torch.inference_mode():
        found = task.dev(model)
    model.train()
    return {f"dev_{name}": value for name, value in found.items()}


def _optimizer(model: nn.Module, keys: LoopKeys) -> torch.optim.AdamW:
    config = OptimizerConfig(weight_decay=keys.weight_decay)
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=keys.lr, betas=keys.betas, eps=config.eps)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{value:.4g}"
        for name, value in row.items()
        if name == "loss" or name.startswith("dev_")
    }


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in _shown(row).items())
