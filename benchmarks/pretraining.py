"""`python -m benchmarks.pretraining RUN`: what a longer run has learned, in pictures.

Owns one page of curves and probes of a run, and a picture of what its model draws where
squares are masked. No pixel of the dataset is in them: what it may be trained on need
not be what may be shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import parse, run
from trainer.checkpoint import write_json
from trainer.contract import ENVIRONMENT, read_metrics, read_validation

PROG = "benchmarks.pretraining"
DESCRIPTION = """\
Draw the curves and probes of a run, and what its model restores of held-out pairs.

  python -m trainer.pretrain --config mlim-photos --data SHARDS --output runs/photos
  python -m benchmarks.pretraining runs/photos

Writes benchmarks/results/photos.json, photos.png and photos-restored.png.
"""
RESULTS = Path(__file__).parent / "results" / "photos"
WINDOW = 50
"""Steps that a point of a training curve is the mean of."""
_TRAINING = ("mlm_loss", "recon_loss", "mlm_accuracy", "psnr", "step_s", "pairs_per_s")
_GREY = 225
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"
# Title, training metric, held-out metric.
_CURVES = (
    ("MLM: nats a masked word", "mlm_loss", "val_mlm_loss"),
    ("RECON: squared error a masked pixel", "recon_loss", "val_recon_loss"),
    ("Share of masked words right", "mlm_accuracy", "val_mlm_accuracy"),
)
# Title, and for each wrong partner what it is called.
_PROBES = (
    ("MLM: nats that a wrong image costs", "mlm", ("shuffled", "blank")),
    ("RECON: error that a wrong caption costs", "recon", ("shuffled", "empty")),
)


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Which run to show, and where."""

    run: str
    """Run directory (the first word of the command)."""
    examples: int = 8
    """Held-out pairs whose masked squares are drawn."""
    output: str = str(RESULTS)
    """Path of the results, without suffix."""


def windows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Means of the training metrics over whole windows of `WINDOW` steps."""
    whole = len(rows) // WINDOW * WINDOW
    found = {"step": [float(row["step"]) for row in rows[WINDOW - 1 : whole : WINDOW]]}
    for name in _TRAINING:
        values = np.array([row.get(name, np.nan) for row in rows[:whole]])
        found[name] = np.nanmean(values.reshape(-1, WINDOW), 1).tolist()
    return found


def summary(run: Path) -> dict[str, Any]:
    """Everything that the pictures are drawn from, and what it was measured on."""
    rows, held_out = read_metrics(run), read_validation(run)
    found = {name for row in held_out for name in row}
    if len(rows) < WINDOW or not {"val_loss", "probe_mlm_true"} <= found:
        raise ValueError(
            f"{run} is no run of {WINDOW} steps or more that looked at held-out pairs: "
            "train one with --eval.every_steps and --eval.probes_every_steps above 0"
        )
    environment = json.loads((run / ENVIRONMENT).read_text())
    return {
        "command": f"python -m {PROG} RUN",
        "steps": rows[-1]["step"],
        "hours": sum(row["step_s"] for row in rows) / 3600,
        "environment": {
            key: value for key, value in environment.items() if key != "command"
        },
        "training": windows(rows),
        "held_out": [row for row in held_out if "val_loss" in row],
        "probes": [row for row in held_out if "probe_mlm_true" in row],
    }


def draw_curves(found: Mapping[str, Any], path: Path) -> None:
    """Losses of training and of held-out pairs, and both probes, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    training, held_out = found["training"], found["held_out"]
    for axis, (title, mine, others) in zip(axes, _CURVES, strict=False):
        axis.plot(training["step"], training[mine], color=_BLUE, label="training")
        steps = [row["step"] for row in held_out]
        values = [row[others] for row in held_out]
        axis.plot(steps, values, color=_ORANGE, marker=".", label="held out")
        axis.set_title(title, loc="left", fontsize=10)
    for axis, (title, probe, partners) in zip(axes[3:], _PROBES, strict=False):
        for partner, colour in zip(partners, (_BLUE, _GREEN), strict=True):
            _gap(axis, found["probes"], f"probe_{probe}_{partner}_gap", colour, partner)
        axis.axhline(0, color="0.4", lw=0.8)
        axis.set_title(f"{title} (95 %)", loc="left", fontsize=10)
    axes[5].plot(training["step"], training["psnr"], color=_BLUE, label="training")
    axes[5].set_title("PSNR of restored squares, dB", loc="left", fontsize=10)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def _gap(
    axis: Any, rows: Sequence[Mapping[str, Any]], name: str, colour: str, label: str
) -> None:
    """One gap of a probe with its interval."""
    steps = [row["step"] for row in rows]
    low, high = np.array([row[f"{name}_ci95"] for row in rows]).T
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    values = [row[name] for row in rows]
    axis.plot(steps, values, color=colour, marker=".", label=label)


def draw_restored(run: Path, examples: int, path: Path) -> None:
    """Masked squares of held-out pairs as the model restores them, told the pair's own
    caption and another's; what was not masked is grey.
    """
    import torch
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer

    from trainer.dataset import Dataset
    from trainer.figures import Artist, pixel_mask
    from trainer.probes import load_pairs, partners
    from trainer.trained import load_trained

    trained = load_trained(run)
    config, seed = trained.config, trained.config.eval.seed
    dataset = Dataset(config.data, config.eval.split)
    pairs = load_pairs(dataset, config, seed=seed, limit=4 * examples, group=None)
    artist = Artist(
        model=trained.model.eval(),
        config=config,
        pairs=pairs,
        tokenizer=Tokenizer.from_file(str(dataset.tokenizer_file)),
        seed=seed,
        device=torch.device("cpu"),
        examples=examples,
    )
    own, wrong = np.arange(examples), partners(pairs, seed=seed)[:examples]
    figure = Figure(figsize=(1.5 * examples, 3.6), layout="constrained")
    axes = figure.subplots(2, examples, squeeze=False)
    names = ("its own caption", "another's caption")
    for line, (name, texts) in enumerate(zip(names, (own, wrong), strict=True)):
        restored, masks = artist.restore(own, texts)
        for column in own:
            hidden = pixel_mask(masks, int(column), config)
            true = pairs.pixels[column].astype(float) / 255
            error = np.square(restored[column] / 255 - true)[hidden[..., 0]].mean()
            axis = axes[line, column]
            axis.imshow(np.where(hidden, restored[column], np.uint8(_GREY)))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{-10 * np.log10(error):.1f} dB", fontsize=8)
        axes[line, 0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> None:
    """Summarise and draw."""
    config = parse(
        PretrainingConfig, argv, prog=PROG, description=DESCRIPTION, positional="run"
    )
    folder, output = Path(config.run), Path(config.output)
    found = summary(folder)
    write_json(output.with_suffix(".json"), found)
    draw_curves(found, output.with_suffix(".png"))
    draw_restored(
        folder, config.examples, output.parent / f"{output.name}-restored.png"
    )
    last = found["held_out"][-1]
    print(
        f"{found['steps']} steps in {found['hours']:.2f} h: held-out MLM "
        f"{last['val_mlm_loss']:.3f}, RECON {last['val_recon_loss']:.4f}"
    )


if __name__ == "__main__":
    run(main, PROG)
