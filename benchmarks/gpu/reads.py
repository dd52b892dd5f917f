"""What a whole step asks of the device, DeepSpeed's part included, without a device.

Owns the count, on a CPU: of calls that give Python a value of a tensor, take a shape
from one, or make a tensor of a number on a named device (which copies it there and
waits for that), and of DeepSpeed's own waits for its accelerator. Does not own the step
(`benchmarks.gpu.training`), nor the proof that the model's two passes read nothing
(`benchmarks.gpu.syncs`).

AdamW is fused, as it is on GPUs: that is what decides whether the device is asked.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.batches import Drawn
from benchmarks.gpu.record import ROOT, Setting
from benchmarks.gpu.training import Trainee, has_deepspeed, trainee
from trainer.engine import decides_on_device

ONE_STEP_LATE = "trainer/update.py:read"
"""Where a step waits for the sums and the gradient norm of the one before, when both of
its own passes are queued."""
NOT_ON_A_GPU = {
    "trainer/loop.py:global_counts": "counts of the loader's, which lie on the host",
    "trainer/masking.py:drawn_modes": "the reference of the kernel that draws masks",
    "trainer/models/layers.py:_by_segment": "attention on a CPU",
}
"""What reads values on a CPU alone, or of tensors that are always there, and why."""
_READS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"} | {
    f"__{kind}__" for kind in ("bool", "float", "int", "index")
}
_MAKES = {"tensor", "as_tensor"}
_WARMUP = 3


def whole_step(loader: Drawn, setting: Setting) -> dict[str, Any]:
    """Waits of a step, by file and function: one, for the step before.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    if not has_deepspeed():
        raise ValueError("DeepSpeed is not installed: the step is not the trainer's")
    one = trainee(loader, setting)
    fuse(one)
    batches = [loader.step(number) for number in range(_WARMUP + 1)]
    for batch in batches[:-1]:
        one.step(batch)
    found = reads(lambda: one.step(batches[-1]))
    one.close()
    waits = {key: count for key, count in found.items() if key not in NOT_ON_A_GPU}
    return {"passed": waits == {ONE_STEP_LATE: 1}, "waits": waits}


def fuse(one: Trainee) -> None:
    """Update the weights as on a GPU, in one kernel."""
    for group in one.engine.optimizer.optimizer.param_groups:
        group["fused"] = True
    if not decides_on_device(one.engine):
        raise ValueError("the host decides whether this engine's step is taken")


def reads(run: Callable[[], object]) -> Counter[str]:
    """How often `run` would wait for a device, by file and function, the innermost
    outside torch.
    """
    from deepspeed.accelerator import get_accelerator

    found: Counter[str] = Counter()

    def waited(*_: Any, **__: Any) -> None:
        found[_caller()] += 1

    with patch.object(type(get_accelerator()), "synchronize", waited), _Reads(found):
        run()
    return found


class _Reads(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        if (
            name in _READS
            or (name in _MAKES and named.get("device") is not None)
            or (name == "__getitem__" and _chosen_by_values(args[1]))
        ):
            self._found[_caller()] += 1
        return func(*args, **named)


def _chosen_by_values(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, Tensor) and x.dtype is torch.bool for x in parts)


def _caller() -> str:
    frame: Any = sys._getframe(1)
    inside = (__file__, str(Path(torch.__file__).parent))
    while frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    short = "/".join(path.parts[-3:])
    with contextlib.suppress(ValueError):
        short = str(path.relative_to(ROOT))
    return f"{short}:{frame.f_code.co_name}"
