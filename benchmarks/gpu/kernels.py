"""Every kernel of `trainer.kernels` against its reference, and how fast it is.

Owns discovery, the comparison and the table of times. Does not own cases, tolerances or
their reasons (`trainer.kernels`), or the clock (`benchmarks.gpu.timing`).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import trainer.kernels
from benchmarks.gpu.record import CEILINGS, Record, Setting
from benchmarks.gpu.timing import (
    ceilings,
    graph_seconds,
    median_seconds,
    rotating,
    sets_needed,
    tensor_bytes,
)
from trainer.kernels.case import Case

_CHECK_SEED = 1000
_NEAR_ZERO = 1e-30


def all_cases() -> list[Case]:
    """The cases of every module that has some, in the order of modules' names."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(trainer.kernels.__path__):
        loaded = importlib.import_module(f"trainer.kernels.{module.name}")
        found += getattr(loaded, "CASES", ())
    return found


def dtypes(case: Case) -> tuple[torch.dtype, ...]:
    """The types that a case has a tolerance for; a kernel of integers alone has none,
    and is run once.
    """
    return tuple(case.tolerances) or (torch.float32,)


def name_of(case: Case, dtype: torch.dtype) -> str:
    """`kernel | shape | dtype`."""
    return f"{case.kernel} | {case.shape} | {str(dtype).removeprefix('torch.')}"


def checks(
    setting: Setting, record: Record, cases: Sequence[Case] | None = None
) -> None:
    """Compare every case in each of its types; on a CPU the small ones, whose kernels
    then run under Triton's interpreter.
    """
    for case in all_cases() if cases is None else cases:
        if not (setting.cuda or case.small):
            continue
        for dtype in dtypes(case):
            record.measure(
                name_of(case, dtype),
                lambda case=case, dtype=dtype: check(case, setting.device, dtype),
            )


def check(
    case: Case, device: torch.device, dtype: torch.dtype, seed: int = _CHECK_SEED
) -> dict[str, Any]:
    """Relative errors of outputs and gradients of a case against its reference in
    float64 on the same values, and whether all of them are inside its tolerance. What
    the kernel allocates is filled with NaN before, so nothing left unwritten passes.

    On a CPU, 16-bit errors may be twice as large: Triton's interpreter cuts a number
    that it stores off where a GPU rounds it.
    """
    inputs = case.inputs(device, dtype, seed)
    exact = tree_map(_double, inputs)
    with poisoned(), without_tf32():
        found = _tensors(case.fused(*inputs))
    wanted = _tensors(case.reference(*exact))
    if len(found) != len(wanted):
        raise ValueError(
            f"{case.kernel} gives {len(found)} tensors and its reference {len(wanted)}"
        )
    errors = {
        f"output {number}": _error(*pair)
        for number, pair in enumerate(zip(found, wanted, strict=True))
    }
    errors |= _gradient_errors(inputs, exact, found, wanted, seed)
    tolerance = case.tolerances.get(dtype, 0.0)
    if device.type == "cpu" and dtype.itemsize == 2:
        tolerance *= 2
    return {
        "passed": all(error <= tolerance for error in errors.values()),
        "largest_error": max(errors.values(), default=0.0),
        "tolerance": tolerance,
        "errors": errors,
        "reason": case.reason,
    }


def without_tf32() -> AbstractContextManager[None]:
    """Convolutions of fp32 are fp32 inside, as products are: cuDNN would round what
    they are given to ten bits.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )
    return flags


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated inside, and not set, is NaN or the largest integer."""
    modes = torch.are_deterministic_algorithms_enabled()
    quietly = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes, warn_only=quietly)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def times(
    setting: Setting, record: Record, cases: Sequence[Case] | None = None
) -> None:
    """Time every case of a real shape in each of its types: fused, eager and compiled;
    on a CPU the small ones, for a rehearsal.
    """
    best = record.measure(CEILINGS, lambda: ceilings(setting))
    for case in all_cases() if cases is None else cases:
        if case.small == setting.cuda:
            continue
        for dtype in dtypes(case):
            record.measure(
                name_of(case, dtype),
                lambda case=case, dtype=dtype: timed(case, setting, dtype, best),
            )


def timed(
    case: Case, setting: Setting, dtype: torch.dtype, best: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a forward pass, and of one with its backward pass, of the kernel, its
    reference and its compiled reference; what the kernel's are as shares of `best`.
    """
    first = case.inputs(setting.device, dtype, 0)
    count = sets_needed(tensor_bytes(first), setting)
    sets = [first, *(case.inputs(setting.device, dtype, n) for n in range(1, count))]
    backend = "inductor" if setting.cuda else "aot_eager"
    contenders: dict[str, Callable[..., Any]] = {
        "fused": case.fused,
        "eager": case.reference,
        "compiled": torch.compile(case.reference, dynamic=False, backend=backend),
    }
    found: dict[str, Any] = {"input_sets": count}
    for name, function in contenders.items():
        try:
            found |= _seconds(name, function, sets, setting, case)
        except Exception as error:  # what the compiler cannot do, eager may
            if name == "fused":
                raise
            found[f"{name}_error"] = f"{type(error).__name__}: {error}"[:500]
    torch._dynamo.reset()
    _shares(found, case, dtype, best)
    return found


def _seconds(
    name: str,
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    setting: Setting,
    case: Case,
) -> dict[str, float]:
    forward = rotating(torch.no_grad()(function), sets)
    found = {f"{name}_forward_s": median_seconds(forward, setting)}
    replayed = graph_seconds(forward, setting)
    if replayed is not None:
        found[f"{name}_forward_graph_s"] = replayed
    if case.backward_bytes is not None:
        gradients = _output_gradients(_tensors(function(*sets[0])), seed=0)

        def both(*inputs: Any) -> None:
            outputs = _differentiable(_tensors(function(*inputs)))
            torch.autograd.grad(outputs, _wanting(inputs), gradients, allow_unused=True)

        step = rotating(both, sets)
        found[f"{name}_step_s"] = median_seconds(step, setting)
        replayed = graph_seconds(step, setting)
        if replayed is not None:
            found[f"{name}_step_graph_s"] = replayed
    return found


def _shares(
    found: dict[str, Any], case: Case, dtype: torch.dtype, best: dict[str, Any]
) -> None:
    """Bytes/s and FLOP/s that the kernel achieves, and shares of what can be had."""
    moved = {"forward": case.forward_bytes(dtype)}
    computed = {"forward": case.forward_flops}
    if case.backward_bytes is not None:
        moved["step"] = moved["forward"] + case.backward_bytes(dtype)
        computed["step"] = case.forward_flops + case.backward_flops
    for name, count in moved.items():
        # Replayed from a graph where that could be: launches are the step's matter.
        seconds = _device_seconds(found, "fused", name)
        found[f"{name}_bytes"] = count
        found[f"{name}_bytes_per_s"] = count / seconds
        found[f"{name}_share_of_copy"] = count / seconds / best["copy_bytes_per_s"]
        if computed[name]:
            rate = computed[name] / seconds
            found[f"{name}_flops_per_s"] = rate
            found[f"{name}_share_of_gemm"] = rate / best["gemm_flops_per_s"]
        for other in ("eager", "compiled"):
            if f"{other}_{name}_s" in found:
                ratio = _device_seconds(found, other, name) / seconds
                found[f"{name}_times_faster_than_{other}"] = ratio


def _device_seconds(found: dict[str, Any], function: str, part: str) -> float:
    """Of a replayed graph where that could be: a host can be slower than the device."""
    seconds: float = found[f"{function}_{part}_s"]
    return found.get(f"{function}_{part}_graph_s") or seconds


def _gradient_errors(
    inputs: Any,
    exact: Any,
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    seed: int,
) -> dict[str, float]:
    leaves, exact_leaves = _wanting(inputs), _wanting(exact)
    outputs, exact_outputs = _differentiable(found), _differentiable(wanted)
    if not (leaves and exact_outputs):
        return {}
    given = _output_gradients(found, seed=seed)
    with poisoned(), without_tf32():
        ours = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    theirs = torch.autograd.grad(
        exact_outputs,
        exact_leaves,
        [gradient.double().to(x) for gradient, x in zip(given, exact_outputs)],  # noqa: B905
        allow_unused=True,
    )
    errors = {}
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        like = exact_leaves[number]
        zero = torch.zeros_like(like)
        one, other = (zero if x is None else x for x in (one, other))  # noqa: PLW2901
        errors[f"gradient {number}"] = _error(one, other)
    return errors


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of floating-point numbers, infinite where one is NaN; of integers
    0 or infinite.
    """
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    found, wanted = found.detach().double(), wanted.detach().double()
    difference = (found - wanted).norm()
    error = float(difference / wanted.norm().clamp(min=_NEAR_ZERO))
    return float("inf") if math.isnan(error) else error


def _double(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def _wanting(inputs: Any) -> list[Tensor]:
    return [x for x in _tensors(inputs) if x.requires_grad]


def _differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in outputs if x.requires_grad]


def _output_gradients(outputs: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    made = []
    for number, output in enumerate(_differentiable(outputs)):
        generator = torch.Generator(output.device).manual_seed(seed + number)
        drawn = torch.randn(output.shape, generator=generator, device=output.device)
        # In the order of memory that what follows would give it.
        made.append(torch.empty_like(output).copy_(drawn))
    return made
