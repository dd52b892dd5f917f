"""ZeRO 1 on one rank, whose gradients are whole once the backward pass has ended.

Owns two shortcuts: gradients as they are, and AdamW in one pass. Does not own the
engine or which steps take them (`trainer.engine`), when an update is not wanted
(`trainer.refusal`) or AdamW (`trainer.kernels.adamw`).

DeepSpeed (0.19.8) copies every parameter's gradient into a buffer, reduces the buffer
over one rank, copies each gradient back, and once more, and widens each to measure it:
some six launches a parameter, for which the host takes longer than a GPU for a whole
backward pass of a model of BERT-base's size. None of it changes a bit of a gradient.

Then it widens the gradients to fp32, multiplies them by the clip factor, has AdamW
update the fp32 master, and rounds that to the weights: each a pass over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.kernels.adamw import adamw


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


def can_step_in_one_pass(zero: Any) -> bool:
    """Whether ZeRO's optimizer is what `in_one_pass` is for: of stage 1 on one rank,
    with AdamW on an fp32 master of bf16 weights, all on a CUDA device.
    """
    inner = zero.optimizer
    return (
        isinstance(inner, torch.optim.AdamW)
        and not any(g["amsgrad"] or g["maximize"] for g in inner.param_groups)
        and not (zero.partition_gradients or zero.cpu_offload)
        and dist.get_world_size(zero.dp_process_group) == 1
        and all(
            master.is_cuda
            and master.dtype == torch.float32
            and weights.dtype == torch.bfloat16
            for master, weights in _flat_groups(zero)
        )
    )


@contextmanager
def in_one_pass(zero: Any, update: Callable[..., Any] = adamw) -> Iterator[None]:
    """While it lasts, a step of `zero` is one pass over each parameter group. Only
    inside `trainer.refusal.refusing_on_device`, which says whether it is wanted.

    Args:
        update: `trainer.kernels.adamw.adamw`, or the like.
    """

    def step(closure: None = None) -> None:
        with torch.no_grad():
            _step(zero, update)

    zero.step = step
    try:
        yield
    finally:
        del zero.step


def _step(zero: Any, update: Callable[..., Any]) -> None:
    """What DeepSpeed's step does here, to the same states."""
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    zero.micro_step_id, zero.overflow = INITIAL_MICRO_STEP_ID, False
    norm = zero.scaled_global_norm()
    zero._global_grad_norm = norm / zero.loss_scale
    factor = torch.ones_like(norm, dtype=torch.float32)
    zero.unscale_and_clip_grads([factor], norm)
    inner = zero.optimizer
    for number, (master, weights) in enumerate(_flat_groups(zero)):
        gradients = zero.flatten_dense_tensors_aligned(
            zero.averaged_gradients[number], int(zero.partition_size[number])
        )
        zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        group, state = inner.param_groups[number], inner.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        update(
            *(gradients, master, state["exp_avg"], state["exp_avg_sq"], weights),
            *(state["step"], factor, inner.found_inf),
            *(group["lr"], group["betas"], group["eps"], group["weight_decay"]),
        )
    zero._lazy_init_hp_params_optimizer_state()


def _flat_groups(zero: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Master and weights of each parameter group, whole on one rank."""
    for master, parts in zip(
        zero.single_partition_of_fp32_groups,
        zero.parallel_partitioned_bit16_groups,
        strict=True,
    ):
        yield master, parts[0].data
