"""The part of the training state that lies on this rank, in every ZeRO stage.

Owns DeepSpeed's partitions seen as pieces of named parameters: fp32 weights and both
moments of Adam, as views that can be read and written. Does not own the files that they
go to (`trainer.checkpoint`) or the engine (`trainer.engine`).

Pieces do not depend on how many ranks there are, so neither does what is saved of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.engine import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive elements of one parameter, flattened."""

    name: str
    start: int
    """Position of the first in the whole parameter."""
    tensors: dict[str, Tensor]
    """1-D fp32 views of what the optimizer holds, by kind."""

    def narrowed(self, first: int, size: int) -> Piece:
        """`size` of its elements from the one numbered `first`."""
        tensors = {
            kind: tensor.narrow(0, first, size) for kind, tensor in self.tensors.items()
        }
        return Piece(name=self.name, start=self.start + first, tensors=tensors)


def pieces(engine: Any) -> list[Piece]:
    """Everything that this rank holds; moments are made, as zeros, where no step has
    been taken.
    """
    find = (_whole, _flat, _flat, _partitioned)[engine.zero_optimization_stage()]
    return list(find(engine))


def shares(engine: Any, world: World) -> list[Piece]:
    """What this rank has to save for all ranks together to save everything once."""
    held = pieces(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    # Every rank holds all of it: each saves an equal part.
    parts = []
    for piece in held:
        size = piece.tensors["weight"].numel()
        first, last = (size * n // world.size for n in (world.rank, world.rank + 1))
        if first < last:
            parts.append(piece.narrowed(first, last - first))
    return parts


def shapes(engine: Any) -> dict[str, list[int]]:
    """Shape of every parameter by name, taken apart or not."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def adam_steps(engine: Any) -> int:
    """Steps that Adam has taken, which its bias correction depends on."""
    states = _torch_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_adam_steps(engine: Any, steps: int) -> None:
    """Tell Adam how many steps are behind it."""
    optimizer = _torch_optimizer(engine)
    for weight, state in optimizer.state.items():
        state["step"] = _step_count(optimizer, weight, steps)


def publish(engine: Any) -> None:
    """Give the model, on all ranks, the fp32 weights that were written to pieces."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage < 3:
        return
    optimizer.checkpoint_event_prologue()
    pairs = zip(
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp32_partitioned_groups_flat,
        strict=True,
    )
    for working, master in pairs:
        working.data.copy_(master.data)
    # Gathers the small parameters that are never taken apart between steps.
    optimizer.checkpoint_event_epilogue()


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    bare = isinstance(optimizer, torch.optim.Optimizer)
    return optimizer if bare else optimizer.optimizer


def _tensors(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """A tensor of the optimizer's and its moments, flat."""
    state = optimizer.state[weight]
    if not state:
        state["step"] = _step_count(optimizer, weight, 0)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    values = (weight.data, state["exp_avg"], state["exp_avg_sq"])
    return {k: value.view(-1) for k, value in zip(KINDS, values, strict=True)}


def _step_count(optimizer: torch.optim.Optimizer, weight: Tensor, steps: int) -> Tensor:
    """Where torch has it: a fused kernel reads it, so it lies beside the weights."""
    fused = optimizer.param_groups[0]["fused"]
    return torch.tensor(float(steps), device=weight.device if fused else "cpu")


def _whole(engine: Any) -> Iterator[Piece]:
    """Stage 0 in fp32 is a bare torch optimizer."""
    optimizer = _torch_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        yield Piece(name=name, start=0, tensors=_tensors(optimizer, parameter))


def _flat(engine: Any) -> Iterator[Piece]:
    """Stages 1 and 2: a group's parameters are laid end to end and cut anywhere."""
    optimizer = _torch_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        group = optimizer.param_groups[mapping.param_group_index]
        tensors = _tensors(optimizer, group["params"][0])
        held, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        whole = Piece(name=name, start=start - held.start, tensors=tensors)
        yield whole.narrowed(held.start, held.numel)


def _partitioned(engine: Any) -> Iterator[Piece]:
    """Stage 3: each parameter is cut into equal parts, the last ones padded."""
    zero, optimizer = engine.optimizer, _torch_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = zero._get_param_partition_rank(parameter) * size
        real = min(size, parameter.ds_numel - start)
        if real <= 0:
            continue
        flat = zero.fp32_partitioned_groups_flat[group]
        tensors = _tensors(optimizer, flat)
        whole = Piece(name=name, start=start - offset, tensors=tensors)
        yield whole.narrowed(offset, real)
