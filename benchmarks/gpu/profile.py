"""Where the time of a training step goes: by kind of kernel, and the longest of them.

Owns the kinds and the sums. Does not own the step (`benchmarks.gpu.training`) or what
is measured of it (`benchmarks.gpu.steps`).

`torch.profiler` slows the host down, not the device: times of kernels are those of a
step without it, the share in which the device is idle may be less there.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.gpu.batches import Drawn, recipe
from benchmarks.gpu.record import Record, Setting
from benchmarks.gpu.steps import best_size, drawn, models, sizes
from benchmarks.gpu.training import trainee
from trainer.feed import Feed

_WARMUP, _STEPS = 6, 4
_LONGEST = 40
_NAME_LETTERS = 160
KINDS = (
    ("attention", r"flash|fmha|attention"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("fused kernels", r"^(_|layer_norm_)\w+_kernel$|^triton_"),
    ("convolutions", r"conv|dgrad|wgrad|fprop|implicit|nchwToNhwc|nhwcToNchw|cudnn"),
    ("matrix products", r"gemm|nvjet|cutlass|splitK|cublas"),
    ("copies", r"^mem(cpy|set)|copy|CatArray"),
    ("reductions", r"reduce"),
    ("element by element", r"elementwise|vectorized"),
)
"""Kinds of kernels by what is in their names; the first that fits."""
OTHER = "other"


@dataclass(frozen=True)
class Span:
    """A kernel's run on the device, in microseconds."""

    name: str
    begin: float
    end: float


def profile(setting: Setting, record: Record) -> None:
    """Steps of every model at the micro-batch that `steps` found best, else the
    second smallest.
    """
    known = Record(setting, "steps").entries if not setting.again else {}
    for name in models(setting):
        pairs = best_size(known, name) or sizes(setting, name)[1]
        key = f"{name} | {pairs} pairs"
        record.measure(key, functools.partial(profiled, setting, name, pairs))


def profiled(setting: Setting, name: str, pairs: int) -> dict[str, Any]:
    """Where the time of some steps went, milliseconds a step."""
    config = recipe(name, pairs=pairs, tiny=setting.tiny)
    loader = Drawn(config, tiny=setting.tiny)
    one = trainee(loader, setting)
    warmup, steps = (1, 1) if setting.tiny else (_WARMUP, _STEPS)
    activity = ProfilerActivity.CUDA if setting.cuda else ProfilerActivity.CPU
    with Feed(drawn(loader, setting, warmup + steps), setting.device) as feed:
        for _ in range(warmup):
            one.step(feed.next())
            feed.ended()
        setting.synchronize()
        with torch.profiler.profile(activities=[activity]) as found:
            for _ in range(steps):
                one.step(feed.next())
                feed.ended()
            setting.synchronize()
    one.close()
    device = DeviceType.CUDA if setting.cuda else DeviceType.CPU
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == device and not event.is_user_annotation
    ]
    return {"pairs": pairs, "steps": steps, **summary(spans, steps)}


def summary(spans: Iterable[Span], steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind, of the longest kernels, and in which none ran.

    Raises:
        ValueError: nothing ran.
    """
    spans = sorted(spans, key=lambda span: span.begin)
    if not spans:
        raise ValueError("the profiler saw no kernel")
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append((span.end - span.begin) / 1e3)
    by_kind: dict[str, float] = defaultdict(float)
    for name, times in by_name.items():
        by_kind[kind_of(name)] += sum(times) / steps
    longest = sorted(by_name, key=lambda name: -sum(by_name[name]))[:_LONGEST]
    whole = (max(span.end for span in spans) - spans[0].begin) / 1e3 / steps
    busy = _covered(spans) / 1e3 / steps
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    return {
        "step_ms": whole,
        "busy_ms": busy,
        "idle_share": 1 - busy / whole if whole else 0.0,
        "kernels": len(spans) / steps,
        "ms_by_kind": {kind: by_kind[kind] for kind in kinds},
        "longest": [
            {
                "name": name[:_NAME_LETTERS],
                "kind": kind_of(name),
                "ms": sum(by_name[name]) / steps,
                "calls": len(by_name[name]) / steps,
            }
            for name in longest
        ],
    }


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return OTHER


def _covered(spans: list[Span]) -> float:
    """Time in which at least one of the spans, sorted by their beginning, ran."""
    total, until = 0.0, spans[0].begin
    for span in spans:
        total += max(span.end - max(span.begin, until), 0.0)
        until = max(until, span.end)
    return total
