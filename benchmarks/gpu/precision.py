"""Does bf16 train like fp32? 500 steps of `mlim-base`, 128 pairs; bf16 with two seeds.

Owns the three curves and what their differences say. Does not own the step
(`benchmarks.gpu.training`) or the pairs (`benchmarks.gpu.batches`), which are the same
in all three; a seed is one of weights and masks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.batches import Drawn, recipe
from benchmarks.gpu.kernels import without_tf32
from benchmarks.gpu.record import Record, Setting
from benchmarks.gpu.training import trainee
from trainer.engine import learning_rate
from trainer.feed import Feed
from trainer.loader import StepBatch

PAIRS, STEPS, WINDOW = 128, 500, 25
TINY_PAIRS, TINY_STEPS, TINY_WINDOW = 4, 4, 2
CURVES = (("bf16", 0), ("fp32", 0), ("bf16", 1))
_WARMUP_SHARE = 10
_AHEAD = 4


def precision(setting: Setting, record: Record) -> None:
    """The three curves, and their comparison."""
    curves = {}
    for kind, seed in CURVES:
        # On a CPU bf16 would be emulated: the rehearsal trains fp32 alone.
        shown = kind if setting.cuda else "fp32"
        key = f"{kind}, seed {seed}"
        with without_tf32():
            run = functools.partial(curve, setting, shown, seed)
            found = record.measure(key, run)
        curves[key] = found.get("loss")
    if all(curves.values()):
        window = TINY_WINDOW if setting.tiny else WINDOW
        record.measure("comparison", lambda: compared(curves, window))


def curve(setting: Setting, kind: str, seed: int) -> dict[str, Any]:
    """Losses of every step of a run in a precision."""
    pairs, steps = (TINY_PAIRS, TINY_STEPS) if setting.tiny else (PAIRS, STEPS)
    words = (
        f"--deepspeed.precision={kind}",
        f"--schedule.steps={steps}",
        f"--schedule.warmup={max(steps // _WARMUP_SHARE, 1)}",
    )
    config = recipe("mlim-base", pairs=pairs, tiny=setting.tiny, words=words)
    config = dataclasses.replace(config, seed=seed)
    loader = Drawn(config, tiny=setting.tiny)
    one = trainee(loader, setting)
    mlm, recon = [], []
    began = time.perf_counter()
    with Feed(_ahead(loader, steps), setting.device) as feed:
        for step in range(steps):
            batch = feed.next()
            one.lr = learning_rate(step, config.optimizer, config.schedule)
            one.step(batch)
            feed.ended()
            sums = one.sums()
            mlm.append(sums[0] / max(batch.counts.masked_words, 1))
            recon.append(sums[1] / max(batch.counts.recon_pixels, 1))
    found = {
        "engine": one.kind,
        "pairs": pairs,
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "mlm": mlm,
        "recon": recon,
        "loss": [a + b for a, b in zip(mlm, recon, strict=True)],
    }
    one.close()
    if not np.isfinite(found["loss"]).all():
        raise ValueError(f"the {kind} run of seed {seed} diverged")
    return found


def compared(curves: dict[str, Sequence[float]], window: int) -> dict[str, Any]:
    """Differences of windowed losses, relative: between the precisions of one seed, and
    between two seeds of bf16. Within noise where, over the second half of the windows,
    the first are on average no larger than the second.
    """
    means = {key: _windows(values, window) for key, values in curves.items()}

    def apart(one: str, other: str) -> np.ndarray:
        return np.abs(means[one] - means[other]) / means[other]

    precision = apart("bf16, seed 0", "fp32, seed 0")
    noise = apart("bf16, seed 1", "bf16, seed 0")
    half = len(precision) // 2
    by_precision, by_seed = (float(part[half:].mean()) for part in (precision, noise))
    return {
        "window": window,
        "windows": {key: values.tolist() for key, values in means.items()},
        "difference_of_precisions": by_precision,
        "difference_of_seeds": by_seed,
        "last_window": {key: float(values[-1]) for key, values in means.items()},
        "within_noise": by_precision <= by_seed,
    }


def _windows(values: Sequence[float], window: int) -> np.ndarray:
    whole = len(values) // window * window
    return np.array(values[:whole]).reshape(-1, window).mean(1)


def _ahead(loader: Drawn, steps: int) -> Iterator[StepBatch]:
    """Every step's batch, a few drawn ahead, each by a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        made = [pool.submit(loader.step, n) for n in range(min(_AHEAD, steps))]
        for step in range(steps):
            batch = made.pop(0).result()
            if step + _AHEAD < steps:
                made.append(pool.submit(loader.step, step + _AHEAD))
            yield batch
