"""`python -m benchmarks.ablations SHARDS --work DIR`: masking, RECON and ITM compared.

Owns which variants of a recipe are compared, and the table. All are measured alike
after training, on held-out pairs with the masks of MAM's heavy modes and with RECON
over masked areas, whatever they were trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_runs import train_all
from pipeline.config import parse, run
from trainer.checkpoint import write_json
from trainer.contract import read_validation

PROG = "benchmarks.ablations"
DESCRIPTION = """\
Train variants of a recipe with several seeds and measure them on held-out pairs.

  python -m pipeline.preprocess --config examples/emoji.yaml --output runs/demo/shards
  python -m benchmarks.ablations runs/demo/shards --work runs/ablations --group base

Writes benchmarks/results/ablations.json and prints a table.
"""
RESULTS = Path(__file__).parent / "results" / "ablations.json"
VARIANTS: dict[str, tuple[str, ...]] = {
    "MAM, RECON over masked areas": (),
    "uniform 15 %": ("--mask.policy=uniform",),
    "no RECON": ("--model.recon_weight=0",),
    "RECON over whole images": ("--model.recon_region=whole",),
    "ITM besides": ("--model.itm_weight=1",),
    "ITM instead of RECON": ("--model.itm_weight=1", "--model.recon_weight=0"),
}
COLUMNS = {
    "mlm": "MLM, true image",
    "mlm_blank_gap": "worse without image",
    "mlm_shuffled_gap": "worse with another's",
    "recon": "RECON, true caption",
    "recon_shuffled_gap": "worse with another's caption",
}
ITM = "val_itm_accuracy"


@dataclass(frozen=True, kw_only=True)
class AblationsConfig:
    """What to train, how often, and where the result goes."""

    data: str
    """Dataset directory (the first word of the command)."""
    work: str
    """Directory for the runs."""
    recipe: str = "mlim-tiny"
    """Recipe."""
    seeds: int = 3
    """Runs of each variant: seeds 0, 1, ..."""
    jobs: int = 2
    """Runs at a time, each on one core."""
    group: str | None = None
    """As `group` of trainer.evaluate: pairs that are no strangers to each other."""
    output: str = str(RESULTS)
    """File of the results."""


def measured(run: Path, group: str | None) -> dict[str, float]:
    """`COLUMNS` of a trained run on its held-out pairs, and `ITM` where it has it."""
    import torch
    from tqdm import tqdm

    from trainer.dataset import Dataset
    from trainer.probes import load_pairs, measure, summarise
    from trainer.trained import load_trained

    trained = load_trained(run)
    config, model = trained.config, trained.model.eval()
    model.config = dataclasses.replace(model.config, recon_region="masked")
    dataset = Dataset(config.data, "val")
    pairs = load_pairs(dataset, config, seed=0, limit=None, group=group)
    losses = measure(
        model,
        config,
        pairs,
        seed=0,
        draws=2,
        batch=128,
        device=torch.device("cpu"),
        progress=tqdm(disable=True),
    )
    found = {}
    for name, values in losses.items():
        summary = summarise(values, pairs.groups, 0)
        found[name] = summary["conditions"]["true"]["mean"]
        for other, gap in summary["gaps"].items():
            found[f"{name}_{other}_gap"] = gap["mean"]
    own = read_validation(run)[-1]
    itm = {ITM: own[ITM]} if ITM in own else {}
    return {name: found[name] for name in COLUMNS} | itm


def table(variants: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    titles = {**COLUMNS, ITM: "ITM: pairs right"}
    lines = [f"| | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for name, found in variants.items():
        cells = []
        for column in titles:
            values = np.array([one[column] for one in found if column in one])
            if not len(values):
                cells.append("")
                continue
            digits = 3 if column.startswith("mlm") else 4
            cells.append(
                f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Train, measure, write."""
    config = parse(
        AblationsConfig, argv, prog=PROG, description=DESCRIPTION, positional="data"
    )
    words = (f"--config={config.recipe}", f"--data={config.data}")
    places = {
        (variant, seed): Path(config.work) / f"{number}-seed{seed}"
        for number, variant in enumerate(VARIANTS)
        for seed in range(config.seeds)
    }
    runs = {
        place: (*words, f"--seed={seed}", *VARIANTS[variant])
        for (variant, seed), place in places.items()
    }
    train_all(runs, jobs=config.jobs)
    found: dict[str, list[dict[str, float]]] = {
        variant: [
            measured(places[variant, seed], config.group)
            for seed in range(config.seeds)
        ]
        for variant in VARIANTS
    }
    group = f" --group {config.group}" if config.group else ""
    result: dict[str, Any] = {
        "command": f"python -m {PROG} SHARDS --work DIR --seeds {config.seeds}{group}",
        "recipe": config.recipe,
        "variants": found,
    }
    write_json(Path(config.output), result)
    print(table(found))


if __name__ == "__main__":
    run(main, PROG)
