"""ZeRO 1 on one rank, whose gradients are whole once the backward pass has ended.

Owns the shortcut. Does not own the engine (`trainer.engine`) or the step.

DeepSpeed (0.19.8) copies every parameter's gradient into a buffer, reduces the buffer
over one rank, copies each gradient back, and once more, and widens each to measure it:
some six launches a parameter, for which the host takes longer than a GPU for a whole
backward pass of a model of BERT-base's size. None of it changes a bit of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def take_gradients_whole(engine: Any) -> None:
    """Have an engine of ZeRO 1 on one rank, without offload, take each parameter's
    gradient as the backward pass leaves it. Only `engine.backward` may run one.
    """
    zero = engine.optimizer
    # They fill a buffer of a gigabyte; each costs the host time in a backward pass.
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero.reduce_gradients = MethodType(_reduce_gradients, zero)
    zero.get_grad_norm_direct = MethodType(_gradient_norm, zero)


def _reduce_gradients(zero: Any, pipeline_parallel: bool = False) -> None:
    for number, group in enumerate(zero.bit16_groups):
        found = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in group
        ]
        padding = int(zero.partition_size[number]) - sum(x.numel() for x in found)
        if padding:
            found.append(group[0].new_zeros(padding))
        zero.averaged_gradients[number] = found
    zero._clear_param_grad_only()
    zero._epilogue_ran_this_backward = True


def _gradient_norm(
    zero: Any, gradients: Iterable[Tensor], params: Any, norm_type: float = 2
) -> Tensor:
    """Of all gradients as one vector, by sums in fp64, in a few launches."""
    from deepspeed.runtime.zero import stage_1_and_2

    norms = torch._foreach_norm(list(gradients), norm_type, dtype=torch.float64)
    total = torch.stack(norms).pow(norm_type).sum().float().pow(1 / norm_type)
    stage_1_and_2.mask_nan_or_inf_with_val_inplace(total, device=zero.device)
    return total
