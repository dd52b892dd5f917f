"""Does a step make the host wait for the device?

Owns two proofs. On a GPU, every synchronisation that PyTorch sees is counted, and every
wait for an event, with the line that asks for it. Without one, both passes run on
`meta` tensors, which have shapes and no values: whatever would read a value, take a
shape from one or copy between host and device is found. A PyTorch that is built for
CUDA also runs the forward pass, on the path of CUDA tensors, on a device that is called
so and need not be there. Does not own the step, nor the count of a whole one without a
GPU (`benchmarks.gpu.reads`).

Not found without a GPU: what a library does inside an operator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.batches import Drawn, pinned, recipe
from benchmarks.gpu.reads import whole_step
from benchmarks.gpu.record import ROOT, Record, Setting
from benchmarks.gpu.training import has_deepspeed, trainee
from trainer.build import build_model
from trainer.engine import decides_on_device
from trainer.feed import Feed
from trainer.loader import Loader, MicroBatch
from trainer.loop import model_inputs
from trainer.models.base import Output
from trainer.models.mlim import MlimForPreTraining
from trainer.update import Result

_NAMES = ("mlim-base", "mlim-large-384")
_PAIRS = {"mlim-base": 96, "mlim-large-384": 24}
_WARMUP = 3
_OUTRIGHT = "synchronize"
# What the debug mode says of an operator; of itself it says that it is a prototype.
_ASKED = (_OUTRIGHT, "called a synchronizing CUDA operation")


def syncs(setting: Setting, record: Record) -> None:
    """All proofs for every model."""
    for name in _NAMES[:1] if setting.tiny else _NAMES:
        pairs = 4 if setting.tiny else _PAIRS[name]
        config = recipe(name, pairs=pairs, tiny=setting.tiny)
        loader = Drawn(config, tiny=setting.tiny)
        record.measure(
            f"{name} | without values",
            functools.partial(without_values, loader, loader.step(0).micro_batches[0]),
        )
        if setting.cuda:
            record.measure(
                f"{name} | on the device", functools.partial(counted, loader, setting)
            )
    for stage in (1, 2) if has_deepspeed() and not setting.cuda else ():
        words = ("--deepspeed.precision=bf16", f"--deepspeed.zero_stage={stage}")
        config = recipe(_NAMES[0], pairs=4, tiny=True, words=words)
        loader = Drawn(config, tiny=True)
        record.measure(
            f"whole step, ZeRO {stage}", functools.partial(whole_step, loader, setting)
        )


def counted(loader: Drawn, setting: Setting) -> dict[str, Any]:
    """Synchronisations of the model's forward and backward pass, of which there must be
    none, and of a whole step, of which there must be one, for what the step before came
    to, where the engine allows it; by the line that asks for them.
    """
    one = trainee(loader, setting)
    batches = [pinned(loader.step(number)) for number in range(_WARMUP + 3)]
    with Feed(iter(batches), setting.device) as feed:
        for _ in range(_WARMUP):
            one.step(feed.next())
            feed.ended()
        micro = feed.next().micro_batches[0]
        model = waits(functools.partial(forward_and_backward, one, micro))
        one.engine.step()
        one.step(feed.next())
        feed.ended()
        batch = feed.next()
        whole = waits(lambda: one.step(batch))
        one.sums()
    once = [*whole.elements()] == [late_line()] or not decides_on_device(one.engine)
    one.close()
    return {
        "passed": not model and once,
        "engine": one.kind,
        "forward_and_backward": sum(model.values()),
        "whole_step": sum(whole.values()),
        "forward_and_backward_lines": dict(model),
        "whole_step_lines": dict(whole),
    }


def late_line() -> str:
    """The line that waits for what the step before came to."""
    lines, first = inspect.getsourcelines(Result.read)
    waiting = next(n for n, line in enumerate(lines) if ".synchronize()" in line)
    return f"{_short(inspect.getsourcefile(Result) or '')}:{first + waiting}"


def forward_and_backward(one: Any, micro: MicroBatch) -> None:
    """Masks, losses and gradients of a micro-batch on the device."""
    inputs, masks = model_inputs(one.loader, micro)
    output = one.engine(inputs, masks)
    one.engine.backward(output.total)


def waits(run: Callable[[], object]) -> Counter[str]:
    """How often `run` makes this thread wait for the GPU, by file and line; for an
    event of it too, whether or not that has come to pass.
    """
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    here, for_event = threading.get_ident(), torch.cuda.Event.synchronize

    # The debug mode tells of neither.
    def outright(*_: object) -> None:
        warnings.warn(_OUTRIGHT, stacklevel=3)

    def event(one: torch.cuda.Event) -> None:
        # The feed's thread waits for its copies.
        if threading.get_ident() == here:
            warnings.warn(_OUTRIGHT, stacklevel=2)
        for_event(one)

    with (
        warnings.catch_warnings(record=True) as caught,
        patch.object(torch.cuda, "synchronize", outright),
        patch.object(torch.cuda.Event, "synchronize", event),
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Counter(
        f"{_short(each.filename)}:{each.lineno}"
        for each in caught
        if str(each.message).startswith(_ASKED)
    )


def without_values(loader: Loader, micro: MicroBatch) -> dict[str, Any]:
    """Run the model where nothing can be read: what it tries to copy or to read, which
    must be nothing.
    """
    found = {"backward": _tried(lambda: meta_backward(loader, micro))}
    if torch.backends.cuda.is_built():
        found["forward"] = _tried(lambda: fake_forward(loader, micro, "cuda"))
    return {"passed": not any(found.values()), **found}


def fake_forward(loader: Loader, micro: MicroBatch, device: str) -> Output:
    """Masks and losses of a micro-batch in bf16 on a device that need not be there.

    Raises:
        RuntimeError: it reads a value, or a shape depends on one.
        ValueError: it copies between host and device.
    """
    with torch.device("meta"):
        model = _model(loader)
    with FakeTensorMode(), torch.no_grad():
        # Not moved: a PyTorch without CUDA cannot copy to a device that is called so.
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                shape, kind = weight.shape, torch.bfloat16
                there = torch.empty(shape, dtype=kind, device=device)
                setattr(module, name, nn.Parameter(there))
        there = _like(micro, device)
        with NoCopies():
            output: Output = model(*model_inputs(loader, there))
    return output


def meta_backward(loader: Loader, micro: MicroBatch) -> None:
    """Forward and backward pass of a micro-batch on tensors without values.

    Raises:
        RuntimeError, NotImplementedError: it reads a value, or a shape depends on one.
        ValueError: it copies to or from the host.
    """
    with torch.device("meta"):
        model = _model(loader)
    there = _like(micro, "meta")
    with NoCopies():
        output = model(*model_inputs(loader, there))
        output.total.backward()


class NoCopies(TorchDispatchMode):
    """Refuses operators that mix the host's tensors with those of another device, but
    for single numbers that are arguments of a kernel.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        here = [x for x in given if x.device.type == "cpu" and x.dim()]
        if func is torch.ops.aten._to_copy.default:
            # Of a number too: that waits.
            here = [x for x in given if x.device.type == "cpu"]
        there = [x for x in (*given, *made) if x.device.type != "cpu"]
        back = any(x.device.type != "cpu" for x in given) and any(
            x.device.type == "cpu" for x in made
        )
        if (here and there) or back:
            raise ValueError(f"{func} copies between host and device")
        return result


def _tried(run: Callable[[], object]) -> str:
    try:
        run()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return ""


def _model(loader: Loader) -> MlimForPreTraining:
    return build_model(loader.config, loader.dataset.tokenizer)


def _like(micro: MicroBatch, device: str) -> MicroBatch:
    """The micro-batch with tensors that have no values."""

    def empty(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=device)

    def changed(owner: Any) -> Any:
        tensors = {
            field.name: empty(getattr(owner, field.name))
            for field in dataclasses.fields(owner)
            if isinstance(getattr(owner, field.name), Tensor)
        }
        return dataclasses.replace(owner, **tensors)

    return dataclasses.replace(changed(micro), stream=changed(micro.stream))


def _short(path: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(ROOT))
    return "/".join(Path(path).parts[-3:])
