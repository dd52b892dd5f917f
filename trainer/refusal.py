"""How DeepSpeed is made to drop a step: gradients go, nothing else changes.

Owns the way into each optimizer that `trainer.engine` builds. Does not own when a step
is dropped (`trainer.safety`).

DeepSpeed's ZeRO optimizers refuse a step whose gradient norm is not finite, on every
rank alike, in fp32 and in bf16, and release what they had accumulated. A step that is
dropped for another reason takes the same way: the norm that they see is not a number.

They read the norm to decide that, and the host waits for the device. A fused AdamW can
be told by a number on the device instead (torch made that for GradScaler), and nothing
is read (`refusing_on_device`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def refusing(optimizer: Any) -> Iterator[list[Tensor]]:
    """While it lasts, a step of `optimizer` drops the gradients and leaves weights,
    moments and step counts as they are. Gives the norms that it has measured, which
    stay on their way here: one a parameter group, -1 for one that is not finite.
    """
    measured: list[Tensor] = []
    with ExitStack() as stack:
        if isinstance(optimizer, torch.optim.Optimizer):
            # DeepSpeed clears the gradients behind it (stage 0 in fp32).
            stack.enter_context(_shadowed(optimizer, "step", lambda: None))
        elif hasattr(optimizer, "scaled_global_norm"):
            norm = _unmeasurable(optimizer.scaled_global_norm, measured)
            stack.enter_context(_shadowed(optimizer, "scaled_global_norm", norm))
            # bf16 asks for it before it looks at the norm.
            stack.enter_context(_shadowed(optimizer, "check_grad_overflow", True))
            stack.enter_context(_shadowed(optimizer, "check_overflow", _not_yet))
        else:
            norms = _unmeasurable(optimizer._get_norm_groups, measured)
            stack.enter_context(
                _shadowed(optimizer, "_get_norm_groups", lambda: [norms()])
            )
        yield measured


@contextmanager
def refusing_on_device(optimizer: Any, unwanted: Tensor) -> Iterator[None]:
    """While it lasts, a step of `optimizer`, ZeRO 1 or 2 around a fused AdamW, leaves
    weights, moments and step counts as they are where the gradient norm is not finite
    or `unwanted`, a number on the device, is not 0. No value is read to know that.
    """
    from deepspeed.runtime.zero import stage_1_and_2 as zero

    inner, measure = optimizer.optimizer, optimizer.scaled_global_norm

    def norm() -> Tensor:
        found = measure()
        inner.found_inf = (~found.isfinite() | (unwanted != 0)).float()
        return found

    with ExitStack() as stack:
        for thing, name, value in (
            (inner, "found_inf", None),
            (optimizer, "scaled_global_norm", norm),
            # What reads the norm, or copies a number to the device to mark one with.
            (optimizer, "check_grad_overflow", False),
            (zero, "is_invalid_grad_norm", lambda norm: False),
            (zero, "mask_nan_or_inf_with_val_inplace", lambda norm, device: None),
        ):
            stack.enter_context(_shadowed(thing, name, value))
        yield


def combined_norm(measured: list[Tensor]) -> float:
    """The norm over all parameter groups of what `refusing` gave; infinite where one
    is not finite.
    """
    norms = torch.stack([torch.as_tensor(norm).float() for norm in measured])
    if not norms.isfinite().all() or (norms < 0).any():
        return math.inf
    return float(torch.linalg.vector_norm(norms))


def _unmeasurable(measure: Callable[[], Any], into: list[Tensor]) -> Callable[[], Any]:
    def norm() -> Tensor:
        found = measure()
        into.extend(found if isinstance(found, list) else [found])
        return torch.full_like(torch.as_tensor(into[-1]), float("nan"))

    return norm


def _not_yet(partition_gradients: bool = True) -> None:
    """The norm decides."""


@contextmanager
def _shadowed(thing: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(thing)
    had, before = name in own, own.get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if had:
            setattr(thing, name, before)
        else:
            delattr(thing, name)
