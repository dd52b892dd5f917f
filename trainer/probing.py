"""`--task probes` of `trainer.evaluate`: what each modality is worth to the other.

Owns its keys, its table and what `probes.json` holds. Does not own the measurement
(`trainer.probes`), its figures (`trainer.figures`), the pairs on its page
(`trainer.probe_examples`) or the form of what is written (`trainer.tasks.results`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trainer.dataset import Dataset
    from trainer.figures import Artist
    from trainer.probes import Losses
    from trainer.tasks.results import Metric, Result
    from trainer.trained import Trained


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """What to measure, and on which pairs."""

    run: str
    """Run directory that trainer.pretrain wrote, or its URL (the first word of the
    command)."""
    task: Literal["probes"] = "probes"
    """What to measure."""
    data: str | None = None
    """Dataset directory; by default the one that the run was trained on."""
    split: str = "val"
    """Split to measure on."""
    seed: int = 0
    """Seed of the pairs' order, the masks, the partners and the bootstrap."""
    draws: int = 2
    """Mask draws of each pair."""
    max_pairs: int | None = 4096
    """Measure on at most this many pairs, drawn by the seed; null for all."""
    group: str | None = None
    """json key: pairs with the same value are resampled together in the bootstrap, and
    a pair's wrong partner has another value."""
    batch: int = 128
    """Pairs that go through the model at once."""
    text_rate: float | None = None
    """Share of words that are masked to measure their loss; null: that of the run's
    text-heavy mode."""
    image_rate: float | None = None
    """Share of image positions that are masked to measure theirs; null: that of the
    run's image-heavy mode."""
    examples: int = 6
    """Pairs shown in figures, and of each kind on the page."""

    def __post_init__(self) -> None:
        from trainer.options import at_least

        at_least("", self, draws=1, max_pairs=2, batch=1, examples=1, seed=0)
        for name in ("text_rate", "image_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1:
                raise ValueError(f"{name} is {rate}: above 0, at most 1")


def probes(folder: Path, config: ProbesConfig, *, command: str) -> dict[str, Any]:
    """Run the probes of the run that lies in `folder`, draw their figures and write
    `probes.json`, `.html` and `.npz`; what the first holds.

    Raises:
        ValueError: a model that restores nothing or diverged, or pairs that cannot be
            compared. The message has the cure.
    """
    from trainer.tasks.results import as_plain, require_name, write_result

    require_name(folder, "probes", task="probes", cure="move it away")
    trained, dataset = _trained(folder, config)
    artist = _artist(trained, dataset, config)
    losses = _measured(artist, config)
    facts = {
        "task": "probes",
        "step": trained.step,
        "seed": config.seed,
        "split": config.split,
        "data": dataset.name,
        "manifest_sha256": dataset.manifest_hash,
        "command": command,
    }
    result = _result(artist, losses, config, folder / "probes")
    write_result(folder, "probes", result, facts=facts)
    return as_plain(result, facts=facts)


def _trained(folder: Path, config: ProbesConfig) -> tuple[Trained, Dataset]:
    """The model on the device, and the split to measure on."""
    import torch

    from trainer.dataset import Dataset
    from trainer.tasks.tuned import is_tuned, read_keys
    from trainer.trained import load_trained

    if is_tuned(folder):
        raise ValueError(
            f"{config.run} was fine-tuned, and restores no words and pixels any more: "
            f"give the run that it came from, {read_keys(folder)['run']}"
        )
    trained = load_trained(folder, data=config.data)
    if not trained.config.model.restores:
        raise ValueError(
            f"{config.run} has no head that restores words or pixels: train one with "
            "--model.mlm_weight or --model.mim_weight above 0"
        )
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    keys = trained.config
    return trained, Dataset(keys.data, config.split, storage=keys.storage)


def _artist(trained: Trained, dataset: Dataset, config: ProbesConfig) -> Artist:
    """The model with the pairs that it is measured on, at the rates that are asked
    for.
    """
    import numpy as np
    from tokenizers import Tokenizer

    from trainer.figures import Artist
    from trainer.probes import load_pairs, with_rates

    pairs = load_pairs(
        dataset,
        trained.config,
        seed=config.seed,
        limit=config.max_pairs,
        group=config.group,
    )
    if len(pairs) < 2:
        raise ValueError(f"split {config.split!r} has fewer than two pairs to compare")
    if len(np.unique(pairs.groups)) < 2:
        raise ValueError(
            f"--group {config.group} puts all {len(pairs):,} pairs into one group, "
            "which leaves no other partner and nothing to resample: take another key"
        )
    return Artist(
        model=trained.model,
        config=with_rates(
            trained.config, text=config.text_rate, image=config.image_rate
        ),
        pairs=pairs,
        tokenizer=Tokenizer.from_file(str(dataset.tokenizer_file)),
        seed=config.seed,
        device=next(trained.model.parameters()).device,
        examples=config.examples,
    )


def _measured(artist: Artist, config: ProbesConfig) -> dict[str, dict[str, Losses]]:
    """Losses of every pair by probe and condition."""
    from tqdm import tqdm

    from trainer.probes import measure
    from trainer.tasks.numbers import require_numbers

    passes = 3 * len(artist.config.model.restores) * config.draws
    with tqdm(total=passes * len(artist.pairs), desc="probes", unit="pair") as bar:
        losses = measure(
            artist.model,
            artist.config,
            artist.pairs,
            seed=config.seed,
            draws=config.draws,
            batch=config.batch,
            device=artist.device,
            progress=bar,
        )
    for probe, conditions in losses.items():
        for found in conditions.values():
            require_numbers(found.sums)
        if not conditions["true"].counts.any():
            raise ValueError(
                f"nothing is masked that the {probe} loss could be of in any of "
                f"{len(artist.pairs):,} pairs: raise --text_rate or --image_rate, or "
                "--draws"
            )
    return losses


def _result(
    artist: Artist,
    losses: Mapping[str, Mapping[str, Losses]],
    config: ProbesConfig,
    pictures: Path,
) -> Result:
    """What is written; figures go to the folder `pictures`."""
    from trainer.mask_config import Mode
    from trainer.probe_examples import examples
    from trainer.probes import summarise
    from trainer.tasks.results import Result

    pairs, mask = artist.pairs, artist.config.mask
    summaries = {
        probe: summarise(conditions, pairs.groups, config.seed)
        for probe, conditions in losses.items()
    }
    measured = {
        probe: int((conditions["true"].counts > 0).sum())
        for probe, conditions in losses.items()
    }
    pictures.mkdir(exist_ok=True)
    return Result(
        metrics=_metrics(summaries, measured),
        details={
            "pairs": len(pairs),
            "draws": config.draws,
            "text_rate": mask.text_rates[Mode.TEXT_HEAVY],
            "image_rate": mask.image_rates[Mode.IMAGE_HEAVY],
            "group": config.group,
            "groups": len(set(pairs.groups.tolist())),
            **summaries,
            **_shown(artist, pictures),
        },
        examples=examples(artist, losses, count=config.examples, batch=config.batch),
        kept={"uids": pairs.uids, "groups": pairs.groups}
        | {
            f"{probe}_{condition}": found.means
            for probe, conditions in losses.items()
            for condition, found in conditions.items()
        },
    )


def _metrics(
    summaries: Mapping[str, Any], measured: Mapping[str, int]
) -> dict[str, Metric]:
    """By name, how much worse wrong partners are at the top: a model that does not look
    at the other modality is at 0.

    Args:
        measured: pairs with anything masked, by probe.
    """
    from trainer.tasks.results import Metric

    found = {
        f"{probe}_{partner}_gap": Metric(gap["mean"], gap["ci95"], 0.0, measured[probe])
        for probe, summary in summaries.items()
        for partner, gap in summary["gaps"].items()
    }
    return found | {
        f"{probe}_{partner}": Metric(loss["mean"], loss["ci95"], None, measured[probe])
        for probe, summary in summaries.items()
        for partner, loss in summary["conditions"].items()
    }


def _shown(artist: Artist, folder: Path) -> dict[str, Any]:
    """Pictures and likely words of some pairs, as far as the model restores them."""
    keys = artist.config.model
    found: dict[str, Any] = {"figures": [], "top_words": []}
    if keys.image_loss in keys.restores:
        name = f"{keys.image_loss}.png"
        artist.reconstructions(folder / name)
        found["figures"] = [
            {
                "file": f"{folder.name}/{name}",
                "title": "Reconstructions",
                "caption": "Held-out pairs, the first of a drawn order. Masked squares "
                "are filled by the model, the rest is the original.",
            }
        ]
    if keys.word_loss in keys.restores:
        found["top_words"] = artist.top_words(folder)
    return found


def print_probes(result: dict[str, Any]) -> None:
    """The probes, for a terminal."""
    from trainer.probe_examples import unit_of
    from trainer.probes import probes_in

    for probe, of in probes_in(result).items():
        print(f"{probe} loss, {unit_of(probe)}, {result['pairs']} held-out pairs")
        for name, row in of["conditions"].items():
            low, high = row["ci95"]
            line = f"  {name:9s} {row['mean']:.4f}  [{low:.4f}, {high:.4f}]"
            if name in of["gaps"]:
                gap = of["gaps"][name]
                low, high = gap["ci95"]
                line += f"   worse by {gap['mean']:.4f}  [{low:.4f}, {high:.4f}]"
            print(line)
