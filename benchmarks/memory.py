"""`python -m benchmarks.memory DATASET`: the loader's memory over many epochs, plotted.

Owns measuring the resident memory of a process that only loads (images, texts, streams
and mask counts of every step, thrown away), and the picture. Memory that grows from
epoch to epoch would show as a slope; it is fitted over all epochs but the first ones.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import parse, run
from trainer.checkpoint import write_json

PROG = "benchmarks.memory"
DESCRIPTION = """\
Load a dataset for many epochs and plot the process's memory.

  python -m benchmarks.memory SHARDS --size 224

Writes benchmarks/results/loader-memory.json and .png, the results that come with the
code: a trial belongs elsewhere, --output /tmp/trial.
"""
_MIB = 1 << 20
# Windows and buffers come to their size in the first epochs.
_WARM_EPOCHS = 2


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What to load, how long, and where the result goes."""

    data: str
    """Dataset directory (the first word of the command)."""
    epochs: int = 20
    """Epochs to load."""
    size: int = 224
    """Side of the images in pixels."""
    geometry: str = "random_resized_crop"
    """As `image.geometry` of trainer.pretrain."""
    lanes: int = 48
    """Lanes of the order."""
    batch: int = 192
    """Samples of a step."""
    threads: int = 2
    """Decoding threads."""
    output: str = "benchmarks/results/loader-memory"
    """Path of the results, without suffix."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Memory after every step."""

    epochs: np.ndarray
    """(N,) epochs loaded, with fractions."""
    mib: np.ndarray
    """(N,) unique resident memory of the process, in MiB."""

    @property
    def slope(self) -> float:
        """MiB that an epoch adds, once the loader is warm: the least-squares fit."""
        warm = self.epochs > _WARM_EPOCHS
        return float(np.polyfit(self.epochs[warm], self.mib[warm], 1)[0])

    @property
    def spread(self) -> float:
        """MiB between the smallest and the largest value, once the loader is warm."""
        warm = self.mib[self.epochs > _WARM_EPOCHS]
        return float(warm.max() - warm.min())


def measure(config: MemoryConfig) -> Curve:
    """Load `config.epochs` epochs in this process."""
    import psutil
    import torch

    from trainer.dataset import Dataset
    from trainer.loader import Loader
    from trainer.options import ImageConfig, PretrainConfig

    torch.set_num_threads(1)
    keys = PretrainConfig(
        data=config.data,
        output="",
        mixture="none",
        lanes=config.lanes,
        global_batch=config.batch,
        micro_batch=config.batch,
        threads=config.threads,
        image=ImageConfig(size=config.size, geometry=config.geometry),  # type: ignore[arg-type]
    )
    loader = Loader(Dataset(config.data, "train"), keys, rank=0, world_size=1)
    found = loader.order.epoch_steps(0)
    assert found
    per_epoch, process = found[1], psutil.Process()
    epochs, mib = [], []
    for batch in loader.steps(0, config.epochs * per_epoch):
        epochs.append((batch.step + 1) / per_epoch)
        mib.append(process.memory_full_info().uss / _MIB)
    return Curve(epochs=np.array(epochs), mib=np.array(mib))


def plot(curve: Curve, path: Path, *, title: str) -> None:
    """Memory over epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(curve.epochs, curve.mib, linewidth=0.8, color="#1f6f8b")
    axes.set(xlabel="epochs loaded", ylabel="unique memory, MiB", title=title)
    axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Measure, plot, write."""
    config = parse(
        MemoryConfig, argv, prog=PROG, description=DESCRIPTION, positional="data"
    )
    begun = time.perf_counter()
    curve = measure(config)
    title = (
        f"{config.epochs} epochs, {config.size} px, batches of {config.batch}: "
        f"{curve.slope:+.3f} MiB an epoch"
    )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(curve, output.with_suffix(".png"), title=title)
    result: dict[str, Any] = {
        "command": f"python -m {PROG} DATASET --epochs {config.epochs} "
        f"--size {config.size} --geometry {config.geometry} --batch {config.batch}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "seconds": round(time.perf_counter() - begun, 1),
        "steps": len(curve.mib),
        "first_mib": round(float(curve.mib[0]), 1),
        "peak_mib": round(float(curve.mib.max()), 1),
        "last_mib": round(float(curve.mib[-1]), 1),
        "slope_mib_an_epoch": round(curve.slope, 4),
        "spread_mib": round(curve.spread, 2),
    }
    write_json(output.with_suffix(".json"), result)
    print(f"{title}; spread {curve.spread:.1f} MiB, peak {curve.mib.max():.0f} MiB")
    print(output.with_suffix(".png"))


if __name__ == "__main__":
    run(main, PROG)
