"""Whole training steps of the two models, and what each design decision is worth.

Owns which micro-batches and variants are measured, and on how many steps. Does not own
the step or its clock (`benchmarks.gpu.training`), or what a variant changes
(`benchmarks.gpu.variants`).

The micro-batch of the table is the one of the most pairs a second among powers of two
times 48 that fit; larger ones are not tried once one did not fit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.batches import MODELS, Drawn, pinned, recipe
from benchmarks.gpu.record import Record, Setting
from benchmarks.gpu.training import ROUNDS, repeated, timed_steps, trainee
from benchmarks.gpu.variants import Calls, Variant, variants
from trainer.dataset import Dataset
from trainer.loader import Loader, StepBatch

SIZES = {"mlim-base": (96, 192, 384, 768), "mlim-large-384": (96, 192, 384)}
TINY_SIZES = (4, 8)
_BATCHES = 6
_WARMUP, _STEPS = 6, 8


def models(setting: Setting) -> tuple[str, ...]:
    """The recipes that are measured; a rehearsal takes one, at another size."""
    return MODELS[:1] if setting.tiny else MODELS


def sizes(setting: Setting, name: str) -> tuple[int, ...]:
    """The micro-batches that are tried of a model."""
    return TINY_SIZES if setting.tiny else SIZES[name]


def steps(setting: Setting, record: Record) -> None:
    """Pairs/s by micro-batch, as the recipe says it, and from shards if there are."""
    plain = variants(setting)[0]
    for name in models(setting):
        for pairs in sizes(setting, name):
            found = record.measure(
                f"{name} | {pairs} pairs",
                functools.partial(measured, setting, name, pairs, plain),
            )
            if "out_of_memory" in found:
                break
        pairs = sizes(setting, name)[0] if setting.tiny else 96
        again = Variant(
            name="as the recipe", what="96 pairs, layers recomputed", recompute=True
        )
        record.measure(
            f"{name} | {pairs} pairs, recomputed",
            functools.partial(measured, setting, name, pairs, again),
        )
        if setting.data:
            pairs = best_size(record.entries, name) or sizes(setting, name)[0]
            record.measure(
                f"{name} | from shards",
                functools.partial(from_shards, setting, name, pairs),
            )


def ablation(setting: Setting, record: Record) -> None:
    """Every variant of every model, at the micro-batch that `steps` found best."""
    known = Record(setting, "steps").entries if not setting.again else {}
    for name in models(setting):
        pairs = best_size(known, name) or sizes(setting, name)[0]
        for variant in variants(setting):
            record.measure(
                f"{name} | {variant.name}",
                functools.partial(measured, setting, name, pairs, variant),
            )


def best_size(entries: dict[str, Any], name: str) -> int | None:
    """The micro-batch of the most pairs a second among what `steps` has measured."""
    speeds = {
        entry["pairs"]: entry["pairs_per_s"]
        for key, entry in entries.items()
        if key.startswith(f"{name} | ")
        and key.endswith(" pairs")
        and "pairs_per_s" in entry
    }
    return max(speeds, key=speeds.__getitem__, default=None)


def measured(
    setting: Setting, name: str, pairs: int, variant: Variant
) -> dict[str, Any]:
    """Steps of a model on drawn batches in one variant; that they did not fit is an
    answer too.
    """
    config = recipe(name, pairs=pairs, tiny=setting.tiny)
    loader = Drawn(config, tiny=setting.tiny)
    head = {"what": variant.what, "pairs": pairs}
    calls = Calls()
    try:
        with variant.entered(calls):
            one = trainee(
                loader, setting, recompute=variant.recompute, change=variant.model
            )
            warmup, count = (1, 1) if setting.tiny else (_WARMUP, _STEPS)
            made = _made(loader, variant, setting, warmup + ROUNDS * count)
            found = timed_steps(one, made, setting, warmup=warmup, steps=count)
            one.close()
    except torch.OutOfMemoryError:
        return head | {"out_of_memory": True}
    finally:
        torch._dynamo.reset()
    if variant.around is not None:
        found["replaced_calls"] = calls.count
        if setting.cuda and not calls.count:
            raise ValueError(
                f"{variant.name}: the step does not use what this replaces"
            )
    return head | found


def from_shards(setting: Setting, name: str, pairs: int) -> dict[str, Any]:
    """Steps of a model on a dataset, read and decoded meanwhile, by as many threads as
    there are cores but two, at most 12. Of fewer pairs where the dataset has fewer.
    """
    threads = min(max((os.cpu_count() or 1) - 2, 1), 12)
    assert setting.data is not None
    words = (f"--data={setting.data}", f"--threads={threads}")
    dataset = Dataset(setting.data, "train", tokenizer=None)
    while pairs > len(dataset):
        pairs //= 2
    config = recipe(name, pairs=pairs, tiny=setting.tiny, words=words)
    loader = Loader(dataset, config, rank=0, world_size=1)
    one = trainee(loader, setting)
    warmup, count = (1, 1) if setting.tiny else (_WARMUP, _STEPS)
    batches = loader.steps(0, warmup + ROUNDS * count)
    found = timed_steps(one, batches, setting, warmup=warmup, steps=count)
    one.close()
    dataset.close()
    return {"pairs": pairs, "threads": threads, **found}


def _made(
    loader: Drawn, variant: Variant, setting: Setting, count: int
) -> Iterator[StepBatch]:
    """Drawn batches over and over; the variant's form of each is made anew when it is
    asked for, as a data loader would make it.
    """
    whole = drawn(loader, setting, count)
    if variant.batch is None:
        return whole
    change = variant.batch
    return (change(loader, each) for each in whole)


def drawn(loader: Drawn, setting: Setting, count: int) -> Iterator[StepBatch]:
    """Some drawn batches over and over, `count` in all."""
    some = [loader.step(number) for number in range(min(count, _BATCHES))]
    if setting.cuda:
        some = [pinned(each) for each in some]
    return repeated(some, count)
