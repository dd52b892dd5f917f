"""The step with one thing taken away, or added, at a time.

Owns what each variant changes. Does not own the step (`benchmarks.gpu.training`) or
which variants are measured (`benchmarks.gpu.steps`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainer.kernels
from benchmarks.gpu import batches, training
from benchmarks.gpu.record import Setting
from trainer import engine, loop
from trainer.kernels import layer_norm
from trainer.kernels.pixels import normalised
from trainer.loader import Loader, MicroBatch, StepBatch
from trainer.models import dense, layers
from trainer.models.mlim import MlimEncoder

_FUSED = "_fused"
_KEPT = {"adamw", "attention", "dropout"}
"""Modules whose references say nothing of a step: torch has a kernel for AdamW, and
"optimizer apart" takes it; of attention it goes from segment to segment, and
FlashAttention is the other choice; and the recipes drop nothing."""


class Calls:
    """How often what a variant replaces was called."""

    def __init__(self) -> None:
        self.count = 0

    def through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return function(*arguments, **named)

        return counted


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is other than in the step that `trainer.pretrain` takes."""

    name: str
    what: str
    around: Callable[[Calls], AbstractContextManager[object]] | None = None
    """Replaces something, which it counts the calls of, while a step is taken."""
    batch: Callable[[Loader, StepBatch], StepBatch] | None = None
    """The other form of a batch, made before it is copied to the device."""
    model: Callable[[nn.Module], None] | None = None
    """Done to the model before its engine is built."""
    recompute: bool = False

    def entered(self, calls: Calls) -> AbstractContextManager[object]:
        """Where the engine is built and steps are taken."""
        return nullcontext() if self.around is None else self.around(calls)


def variants(setting: Setting) -> list[Variant]:
    """All of them; the first changes nothing."""
    backend = "inductor" if setting.cuda else "eager"
    return [
        Variant(name="as trained", what="what trainer.pretrain does"),
        *_without_kernels(),
        Variant(
            name="residual gradients added apart",
            what="autograd adds the gradients of a layer's input, of its first product "
            "and of the residual, instead of the product",
            around=_added_apart,
        ),
        Variant(
            name="bias sums apart",
            what="the bias of a branch's last layer added by its product, and its "
            "gradient summed from the table that the norm's backward pass wrote, "
            "instead of both by the norm; and that of queries, keys and values summed "
            "from the table that attention's wrote, instead of by attention",
            around=_biased_apart,
        ),
        *_without_pruning(),
        Variant(
            name="FlashAttention",
            what="torch.nn.attention.varlen instead of our kernel for short segments",
            around=_flash,
        ),
        Variant(
            name="embedder by convolutions",
            what="convolutions of 2 x 2 on images as they lie, instead of matrix "
            "products on pixels in nested order",
            around=_convolved,
        ),
        Variant(
            name="gradients reduced",
            what="DeepSpeed copies and reduces each gradient, though there is one rank",
            around=_reduced,
        ),
        Variant(
            name="parameters unaligned",
            what="parameters laid end to end in the model's order, so that most biases "
            "begin at no multiple of 16 bytes",
            around=_unaligned,
        ),
        Variant(
            name="text padded",
            what="every text padded to text.max_tokens, as others do",
            batch=batches.padded,
        ),
        Variant(
            name="heads everywhere",
            what="MLM head at every text row, every image decoded",
            batch=batches.heads_everywhere,
        ),
        Variant(
            name="masks on the host",
            what="masks drawn on the CPU by the thread that copies batches, and copied "
            "with them, as the data loaders of others do",
            batch=batches.masked_on_host,
            around=_carried_masks,
        ),
        Variant(
            name="host decides",
            what="the host reads losses and gradient norm before it takes a step, and "
            "DeepSpeed reads the norm again",
            around=_read_by_the_host,
        ),
        Variant(
            name="optimizer: foreach",
            what="torch.optim.AdamW(foreach=True), and so the host waits for the "
            "gradient norm",
            around=functools.partial(_optimizer, foreach=True),
        ),
        Variant(
            name="optimizer apart",
            what="torch.optim.AdamW(fused=True), and gradients widened and clipped "
            "before it and the master rounded after it, each in a pass of its own",
            around=_apart,
        ),
        Variant(
            name="recomputed",
            what="activation checkpointing of every layer",
            recompute=True,
        ),
        Variant(
            name="layers compiled",
            what="torch.compile of each transformer layer, embedder and decoder",
            model=functools.partial(_compile_layers, backend=backend),
        ),
        Variant(
            name="layers compiled, without layer_norm",
            what="the same with plain norms, which the compiler may fuse with what "
            "stands beside them, as it does with GELU",
            around=_norms_for_the_compiler,
            model=functools.partial(_compile_layers, backend=backend),
        ),
        Variant(
            name="model compiled",
            what="torch.compile of the whole model",
            model=functools.partial(_compile_model, backend=backend),
        ),
    ]


def kernel_modules() -> list[ModuleType]:
    """The modules of kernels that the step may use."""
    names = [found.name for found in pkgutil.iter_modules(trainer.kernels.__path__)]
    loaded = [importlib.import_module(f"trainer.kernels.{name}") for name in names]
    return [
        module
        for module in loaded
        if _pairs(module) and module.__name__.rpartition(".")[2] not in _KEPT
    ]


def _pairs(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The reference of each kernel that a module dispatches to, by the kernel's name.
    Both take the same arguments: `x_fused` and `x_ref`, `reference` or `x`.
    """
    found = {}
    for name in [name for name in vars(module) if name.endswith(_FUSED)]:
        base = name.removesuffix(_FUSED)
        for other in (f"{base}_ref", f"{base}_reference", "reference", base):
            if callable(getattr(module, other, None)):
                found[name] = getattr(module, other)
                break
    return found


def _without_kernels() -> list[Variant]:
    made = []
    modules = kernel_modules()
    for module in modules:
        short = module.__name__.rpartition(".")[2]
        made.append(
            Variant(
                name=f"without {short}",
                what=f"the plain reference instead of the kernel of {short}",
                around=functools.partial(_plain, [module]),
            )
        )
    if len(modules) > 1:
        made.append(
            Variant(
                name="without kernels",
                what="plain references instead of all kernels",
                around=functools.partial(_plain, modules),
            )
        )
    return made


@contextlib.contextmanager
def _plain(modules: list[ModuleType], calls: Calls) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            for name, reference in _pairs(module).items():
                plain = calls.through(reference)
                stack.enter_context(patch.object(module, name, plain))
        yield


@contextlib.contextmanager
def _read_by_the_host(calls: Calls) -> Iterator[None]:
    asked = calls.through(lambda engine: False)
    with patch.object(training, "decides_on_device", asked):
        yield


@contextlib.contextmanager
def _norms_for_the_compiler(calls: Calls) -> Iterator[None]:
    # A count in each call would be traced too, and every step compiled anew.
    calls.count += 1
    plain = layer_norm.add_layer_norm_ref
    with patch.object(layer_norm, "add_layer_norm_fused", plain):
        yield


@contextlib.contextmanager
def _added_apart(calls: Calls) -> Iterator[None]:
    def apart(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return F.linear(x, weight, bias), x

    with patch.object(dense, "linear_beside", calls.through(apart)):
        yield


@contextlib.contextmanager
def _biased_apart(calls: Calls) -> Iterator[None]:
    def whole(layer: dense.Linear, x: Tensor) -> dense.Unbiased:
        return dense.Unbiased(layer(x))

    product = calls.through(lambda *_: False)
    with (
        patch.object(dense.Linear, "unbiased", calls.through(whole)),
        patch.object(layers, "sums_bias", product),
    ):
        yield


@contextlib.contextmanager
def _flash(calls: Calls) -> Iterator[None]:
    taken = calls.through(layers._varlen)
    with patch.object(layers, "SHORT", 0), patch.object(layers, "_varlen", taken):
        yield


@contextlib.contextmanager
def _convolved(calls: Calls) -> Iterator[None]:
    def embedded(model: MlimEncoder, pixels: Tensor) -> Tensor:
        given = normalised(pixels, model.words.weight.dtype)
        return model.embedder(given).flatten(2).transpose(1, 2)

    with patch.object(MlimEncoder, "embed_nested", calls.through(embedded)):
        yield


@contextlib.contextmanager
def _reduced(calls: Calls) -> Iterator[None]:
    with patch.object(engine, "take_gradients_whole", calls.through(lambda _: None)):
        yield


@contextlib.contextmanager
def _apart(calls: Calls) -> Iterator[None]:
    asked = calls.through(lambda zero: False)
    with patch.object(engine, "can_step_in_one_pass", asked):
        yield


@contextlib.contextmanager
def _unaligned(calls: Calls) -> Iterator[None]:
    calls.count += 1
    with patch.object(engine, "VECTOR", 1):
        yield


def _without_pruning() -> list[Variant]:
    try:
        module = importlib.import_module("trainer.models.scored_rows")
    except ModuleNotFoundError:
        return []

    def whole(calls: Calls) -> AbstractContextManager[object]:
        def keep(*_: Any, **__: Any) -> None:
            """All rows are kept."""

        return patch.object(module, "keep", calls.through(keep))

    return [
        Variant(
            name="last layer whole",
            what="queries and feed-forward of the last layer at every row",
            around=whole,
        )
    ]


@contextlib.contextmanager
def _optimizer(calls: Calls, **chosen: bool) -> Iterator[None]:
    adamw = torch.optim.AdamW

    class Chosen(adamw):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            calls.count += 1
            super().__init__(*arguments, **(_no_choice(named) | chosen))

    with patch.object(torch.optim, "AdamW", Chosen):
        yield


def _no_choice(named: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in named.items() if k not in ("fused", "foreach")}


@contextlib.contextmanager
def _carried_masks(calls: Calls) -> Iterator[None]:
    given = loop.model_inputs

    def inputs(loader: Loader, micro: MicroBatch) -> Any:
        assert isinstance(micro, batches.MaskedOnHost)

        def carried(*_: Any, **__: Any) -> Any:
            calls.count += 1
            return micro.masks

        with patch.object(loader, "masks", carried):
            return given(loader, micro)

    with patch.object(loop, "model_inputs", inputs):
        yield


def _compile_layers(model: Any, *, backend: str) -> None:
    model.compile_layers(backend)


def _compile_model(model: nn.Module, *, backend: str) -> None:
    model.compile(backend=backend)
