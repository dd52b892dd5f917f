"""Probes and pictures of held-out pairs while a run trains, on one rank.

Owns the panel of reconstructions, RUN/panels/step-XXXXXXXX.png, and the names of probe
results in `validation.jsonl`. Does not own what the probes measure (`trainer.probes`),
what a model restores (`trainer.figures`) or when it is asked (`trainer.validation`).

Pairs and masks depend on `eval.seed` alone, so panels of two steps or runs show the
same squares.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from trainer.contract import panel_path, panels
from trainer.dataset import Dataset
from trainer.figures import GREY, Artist, pixel_mask
from trainer.files import write_with
from trainer.folder import DamagedError
from trainer.options import PretrainConfig
from trainer.probes import Pairs, drawn_places, measure, read_pairs, summarise

_SIDE_INCHES = 1.7
_CAPTION_INCHES = 0.95
_DPI = 110


@dataclass(frozen=True, kw_only=True)
class Panels:
    """The pairs that probes and panels are made of, in memory."""

    config: PretrainConfig
    pairs: Pairs
    tokenizer: Tokenizer
    device: torch.device
    batch: int
    """Pairs that go through the model at once."""

    @staticmethod
    def read(
        dataset: Dataset,
        config: PretrainConfig,
        *,
        device: torch.device,
        batch: int,
        left_out: Collection[int],
        damage: list[DamagedError],
    ) -> Panels:
        """The first pairs of the order that `trainer.evaluate` draws.

        Args:
            left_out, damage: as in `read_pairs`.

        Raises:
            ValueError: fewer than two are left for the probes.
        """
        keys = config.eval
        pairs = read_pairs(
            dataset,
            config,
            drawn_places(dataset, seed=keys.seed, limit=pairs_wanted(config)),
            seed=keys.seed,
            left_out=left_out,
            damage=damage,
        )
        if len(first_pairs(pairs, keys.probe_pairs)) < 2:
            sound = " sound" if left_out else ""
            raise ValueError(
                f"split {dataset.folders[0].split!r} has fewer than two{sound} pairs "
                "to compare: hold more out, or set eval.probes_every_steps 0"
            )
        tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
        return Panels(
            config=config,
            pairs=pairs,
            tokenizer=tokenizer,
            device=device,
            batch=batch,
        )

    def make(self, model: nn.Module, step: int) -> tuple[dict[str, Any], Path | None]:
        """Measure the probes and draw the panel of a step; results by name and the
        panel's file, if the model restores images.
        """
        training = model.training
        model.eval()
        try:
            return self._probes(model), self._panel(model, step)
        finally:
            model.train(training)

    def _probes(self, model: nn.Module) -> dict[str, Any]:
        pairs = first_pairs(self.pairs, self.config.eval.probe_pairs)
        with tqdm(disable=True) as silent:
            losses = measure(
                model,  # type: ignore[arg-type]
                self.config,
                pairs,
                seed=self.config.eval.seed,
                draws=1,
                batch=self.batch,
                device=self.device,
                progress=silent,
            )
        seed = self.config.eval.seed
        row = probe_row(
            {name: summarise(of, pairs.groups, seed) for name, of in losses.items()}
        )
        return row | {"probe_pairs": len(pairs)}

    def _panel(self, model: nn.Module, step: int) -> Path | None:
        pairs = first_pairs(self.pairs, self.config.eval.panel_pairs)
        # All of so few may be damaged.
        restores = self.config.model.image_loss in self.config.model.restores
        if not (restores and len(pairs)):
            return None
        artist = Artist(
            model=model,  # type: ignore[arg-type]
            config=self.config,
            pairs=pairs,
            tokenizer=self.tokenizer,
            seed=self.config.eval.seed,
            device=self.device,
            examples=self.config.eval.panel_pairs,
        )
        path = panel_path(self.config.run, step)
        path.parent.mkdir(exist_ok=True)
        draw_panel(artist, path, title=f"step {step:,}")
        return path


def probe_row(probes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Flat names of `trainer.probes.summarise` of each probe: `probe_mlm_true` and, for
    each wrong partner, `probe_mlm_blank_gap` with `probe_mlm_blank_gap_ci95`.
    """
    row: dict[str, Any] = {}
    for probe, found in probes.items():
        row[f"probe_{probe}_true"] = found["conditions"]["true"]["mean"]
        for partner, gap in found["gaps"].items():
            row[f"probe_{probe}_{partner}_gap"] = gap["mean"]
            row[f"probe_{probe}_{partner}_gap_ci95"] = gap["ci95"]
    return row


def pairs_wanted(config: PretrainConfig) -> int:
    """How many held-out pairs probes and panels ask for."""
    return max(config.eval.probe_pairs, config.eval.panel_pairs)


def first_pairs(pairs: Pairs, count: int) -> Pairs:
    """Those of some pairs that are among the first `count` drawn: none comes in for one
    that is left out.
    """
    until = int(np.searchsorted(pairs.numbers, count))
    return replace(
        pairs,
        uids=pairs.uids[:until],
        pixels=pairs.pixels[:until],
        texts=pairs.texts[:until],
        groups=pairs.groups[:until],
        numbers=pairs.numbers[:until],
        drawn=min(count, pairs.drawn),
    )


def draw_panel(artist: Artist, path: Path, *, title: str) -> None:
    """Write a PNG with a column for each pair: the original, what the model sees, what
    it restores of it, and the caption that it is told.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    own = np.arange(len(artist.pairs))
    restored, masks = artist.restore(own, own)
    height = 3 * _SIDE_INCHES + _CAPTION_INCHES
    figure, axes = plt.subplots(
        3,
        len(own),
        figsize=(_SIDE_INCHES * len(own), height),
        squeeze=False,
        gridspec_kw={"wspace": 0.04, "hspace": 0.04},
    )
    figure.subplots_adjust(
        left=0.25 / (_SIDE_INCHES * len(own)),
        right=1 - 0.05 / (_SIDE_INCHES * len(own)),
        top=1 - 0.3 / height,
        bottom=(_CAPTION_INCHES - 0.15) / height,
    )
    for column in own:
        original = artist.pairs.pixels[column]
        hidden = pixel_mask(masks, int(column), artist.config)
        shown = (
            original,
            np.where(hidden, np.uint8(GREY), original),
            np.where(hidden, restored[column], original),
        )
        _column(axes[:, column], shown, artist.caption(int(column)))
    for axis, name in zip(axes[:, 0], ("original", "masked", "restored"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    with warnings.catch_warnings():
        # Captions may have characters that the font lacks; they become boxes.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        write_with(path, functools.partial(figure.savefig, dpi=_DPI))
    plt.close(figure)


def drop_panels(run: Path, last: int) -> None:
    """Delete panels of later steps than `last`, which will be taken again."""
    for step, path in panels(run):
        if step > last:
            path.unlink()


def _column(axes: Any, images: Sequence[np.ndarray], caption: str) -> None:
    for axis, image in zip(axes, images, strict=True):
        # Squares of a few pixels must not be smoothed into each other.
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(color="0.8", linewidth=0.5)
    axes[-1].set_xlabel(caption, fontsize=7)
