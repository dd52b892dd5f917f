"""A model's parameters wherever ZeRO has put them: their norm, and all of them at once.

Owns what ZeRO 3, which takes parameters apart, asks of whoever wants to see them all.
Does not own the engine (`trainer.engine`) or weights on disk (`trainer.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engine import World


def parameter_norm(model: nn.Module, world: World) -> float:
    """L2 norm of all parameters, as the model computes with them (bf16 on GPUs), for
    any ZeRO stage. Every rank calls this.
    """
    parameters: list[Any] = [p.detach() for p in model.parameters()]
    apart = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    if apart:
        parameters = [_own_part(p, world) for p in apart]
    norms = torch._foreach_norm(parameters, 2, dtype=torch.float32)
    square = torch.stack(norms).double().square().sum()
    if apart:
        square = world.sum(square)
    return float(square.sqrt())


def whole_model(
    model: nn.Module, build: Callable[[], nn.Module], *, first: bool
) -> nn.Module | None:
    """The model that an engine trains with all its parameters in place, on the `first`
    rank; None on others. Where ZeRO 3 has taken them apart it is a copy: the engine's
    own would ask the other ranks for them in every layer. Every rank calls this.

    Args:
        build: makes a model like it.
    """
    if not any(hasattr(p, "ds_tensor") for p in model.parameters()):
        return model if first else None
    whole = gathered(model, keep=first)
    if not first:
        return None
    # A model is made with numbers that the run must not miss.
    with torch.random.fork_rng():
        copy = build()
    for name, parameter in copy.named_parameters():
        parameter.data = whole[name]
    return copy.to(next(iter(whole.values())).device).train(model.training)


def gathered(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Copies of all parameters by name, gathered one at a time; empty on ranks that do
    not `keep` them. Every rank calls this.
    """
    from deepspeed.runtime.zero import GatheredParameters

    whole = {}
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter]):
            if keep:
                whole[name] = parameter.detach().clone()
    return whole


def _own_part(parameter: Any, world: World) -> Tensor:
    """What this rank holds of a parameter: equal parts, the last one filled up with
    whatever was in memory.
    """
    part: Tensor = parameter.ds_tensor.detach().flatten()
    real = parameter.ds_numel - world.rank * part.numel()
    return part[: max(real, 0)].to(world.device)
