"""`python -m benchmarks.curves SHARDS --work DIR`: losses of a normal run.

Owns the reference curves of `mlim-tiny` on the bundled corpus: the mean and the spread
over seeds of each loss, in windows of steps, with which users (and a test) compare
theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_runs import train_all
from pipeline.config import parse, run
from trainer.checkpoint import write_json
from trainer.contract import read_metrics

PROG = "benchmarks.curves"
DESCRIPTION = """\
Train a recipe with several seeds; write the mean and the spread of its losses.

  python -m pipeline.preprocess --config examples/emoji.yaml --output runs/demo/shards
  python -m benchmarks.curves runs/demo/shards --work runs/curves

Writes benchmarks/results/curves.json and .png.
"""
RESULTS = Path(__file__).parent / "results" / "curves.json"
LOSSES = ("loss", "mlm_loss", "recon_loss", "mlm_accuracy")
WINDOW = 20
"""Steps that a point of a curve is the mean of."""
_DEVIATIONS = 5.0
# Of five seeds, now and then all lie close together by chance.
_LEAST_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """What to train, how often, and where the result goes."""

    data: str
    """Dataset directory (the first word of the command)."""
    work: str
    """Directory for the runs."""
    recipe: str = "mlim-tiny"
    """Recipe."""
    seeds: int = 5
    """Runs: seeds 0, 1, ..."""
    jobs: int = 2
    """Runs at a time, each on one core."""
    output: str = str(RESULTS.with_suffix(""))
    """Path of the results, without suffix."""


def windows(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Means (W,) of a metric over whole windows of `WINDOW` steps."""
    values = np.array([row[name] for row in rows])
    whole = len(values) // WINDOW
    return values[: whole * WINDOW].reshape(whole, WINDOW).mean(1)


def band(curve: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest (W,) that a window of a normal run has: the mean over
    seeds, five standard deviations to either side, and at least 2 % of the mean.
    """
    mean, std = np.array(curve["mean"]), np.array(curve["std"])
    reach = np.maximum(_DEVIATIONS * std, _LEAST_SPREAD * np.abs(mean))
    return mean - reach, mean + reach


def curves_of(runs: Sequence[Path]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over runs of each loss, by window."""
    rows = [list(read_metrics(run)) for run in runs]
    found = {}
    for name in LOSSES:
        each = np.stack([windows(one, name) for one in rows])
        found[name] = {
            "mean": each.mean(0).tolist(),
            "std": each.std(0, ddof=1).tolist(),
        }
    return found


def draw(curves: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Each curve with its band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, name in zip(axes, LOSSES, strict=True):
        mean, std = (np.array(curves[name][key]) for key in ("mean", "std"))
        steps = WINDOW * (np.arange(len(mean)) + 0.5)
        low, high = band(curves[name])
        axis.fill_between(steps, low, high, color="#0072b2", alpha=0.12, lw=0)
        axis.fill_between(
            steps, mean - std, mean + std, color="#0072b2", alpha=0.35, lw=0
        )
        axis.plot(steps, mean, color="#0072b2", lw=1.6)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    """Train, write, draw."""
    config = parse(
        CurvesConfig, argv, prog=PROG, description=DESCRIPTION, positional="data"
    )
    words = (f"--config={config.recipe}", f"--data={config.data}")
    runs = {
        Path(config.work) / f"seed{seed}": (*words, f"--seed={seed}")
        for seed in range(config.seeds)
    }
    train_all(runs, jobs=config.jobs)
    curves = curves_of(list(runs))
    output = Path(config.output)
    result = {
        "command": f"python -m {PROG} SHARDS --work DIR --seeds {config.seeds}",
        "recipe": config.recipe,
        "seeds": config.seeds,
        "window": WINDOW,
        "curves": curves,
    }
    write_json(output.with_suffix(".json"), result)
    draw(curves, output.with_suffix(".png"))
    for name, curve in curves.items():
        print(f"{name:13s} ends at {curve['mean'][-1]:.4f} +- {curve['std'][-1]:.4f}")


if __name__ == "__main__":
    run(main, PROG)
