"""Pictures of what a model restores: pixels from words, words from pixels.

Owns what a model puts where something is hidden, and the figures of
`trainer.evaluate`, whose pairs are the first of a drawn order, never chosen by result.
Does not own pairs that are (`trainer.probe_examples`).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from trainer.masking import Masks, Mode
from trainer.models.base import Inputs, Restoring
from trainer.options import PretrainConfig
from trainer.probes import Pairs, make_inputs, partners
from trainer.tasks.texts import text_of

GREY = 200
_WRAP = 24
_MAX_CAPTION = 90


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A model and the held-out pairs to show it on."""

    model: Restoring
    config: PretrainConfig
    pairs: Pairs
    tokenizer: Tokenizer
    seed: int
    device: torch.device
    examples: int

    @cached_property
    def partners(self) -> np.ndarray:
        """Another pair for each (N,)."""
        return partners(self.pairs, seed=self.seed)

    def reconstructions(self, path: Path) -> None:
        """Write a panel: original, masked, restored with its and another caption."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        count = min(self.examples, len(self.pairs))
        own = np.arange(count)
        wrong = self.partners[:count]
        with_own, masks = self.restore(own, own)
        with_wrong, _ = self.restore(own, wrong)
        figure, axes = plt.subplots(
            count, 4, figsize=(8.4, 2.35 * count), squeeze=False
        )
        for row in range(count):
            original = self.pairs.pixels[row]
            hidden = pixel_mask(masks, row, self.config)
            share = f"{masks.image[row].float().mean():.0%} masked"
            shown = [
                (original, "original", ""),
                (np.where(hidden, np.uint8(GREY), original), share, ""),
                (with_own[row], "with its caption", self.caption(row)),
                (with_wrong[row], "with another", self.caption(int(wrong[row]))),
            ]
            for axis, (image, title, caption) in zip(axes[row], shown, strict=True):
                axis.imshow(np.where(hidden, image, original))
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(caption, fontsize=7)
                if row == 0:
                    axis.set_title(title, fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)

    def top_words(self, folder: Path) -> list[dict[str, Any]]:
        """The five likeliest words at each masked place of the first pairs, given the
        image; writes each image to `folder`.
        """
        found = []
        for row in range(min(self.examples, len(self.pairs))):
            name = f"pair-{row:03d}.png"
            Image.fromarray(self.pairs.pixels[row]).save(folder / name)
            found.append(
                {
                    "uid": f"{int(self.pairs.uids[row]) % (1 << 64):016x}",
                    "image": f"{folder.name}/{name}",
                    "tokens": self._tokens(row),
                }
            )
        return found

    def filled(self, row: int, *, image: int) -> tuple[str, str] | None:
        """What a pair's text says, masked words in brackets, and the same with the
        likeliest ones in their place, given the image of the pair `image`; None where
        no word is masked.
        """
        best = {place: ids[0] for place, (ids, _) in self._likely(row, image).items()}
        hidden, filled = [], []
        own = enumerate(self.pairs.texts[row][1:-1].tolist(), start=1)
        for masked, words in groupby(own, key=lambda word: word[0] in best):
            places, ids = zip(*words, strict=True)
            if masked:
                hidden.append(f"[{text_of(self.tokenizer, ids)}]")
                likely = text_of(self.tokenizer, (best[one] for one in places))
                filled.append(f"[{likely}]")
            else:
                hidden.append(text_of(self.tokenizer, ids))
                filled.append(hidden[-1])
        return (" ".join(hidden), " ".join(filled)) if best else None

    def _tokens(self, row: int) -> list[dict[str, Any]]:
        """Each word of a pair, and for masked ones what the model would put there."""
        best = {
            place: [
                (self._word(number), share)
                for number, share in zip(ids, shares, strict=True)
            ]
            for place, (ids, shares) in self._likely(row, row).items()
        }
        return [
            {"text": self._word(int(token)), "masked": place in best}
            | ({"top5": best[place]} if place in best else {})
            for place, token in enumerate(self.pairs.texts[row][1:-1], start=1)
        ]

    def _likely(self, row: int, image: int) -> dict[int, tuple[list[int], list[float]]]:
        """The five likeliest words at each masked place of a pair, and their shares,
        given the image of the pair `image`.
        """
        one = np.array([row])
        inputs, masks = self._inputs(one, one, Mode.TEXT_HEAVY, shown=np.array([image]))
        with torch.inference_mode():
            hidden_td = self.model.encode(inputs, masks)
            scores = self.model.score_words(hidden_td, inputs, masks)
        found = {}
        for place, logits in list(
            zip(scores.text.tolist(), scores.logits, strict=True)
        )[: int(masks.text.sum())]:
            shares, ids = logits.float().softmax(0).topk(5)
            found[place] = ids.tolist(), shares.tolist()
        return found

    def restore(
        self, images: np.ndarray, texts: np.ndarray
    ) -> tuple[np.ndarray, Masks]:
        """Restored pixels (n, S, S, 3) uint8 of `images`, told captions `texts`."""
        inputs, masks = self._inputs(images, texts, Mode.IMAGE_HEAVY)
        with torch.inference_mode():
            rows = torch.arange(len(images), device=self.device)
            hidden_td = self.model.encode(inputs, masks)
            decoded = self.model.decode_images(hidden_td, inputs, rows)
        pixels = (decoded * 255).round().byte().permute(0, 2, 3, 1)
        return pixels.cpu().numpy(), masks

    def _inputs(
        self,
        rows: np.ndarray,
        texts: np.ndarray,
        mode: Mode,
        *,
        shown: np.ndarray | None = None,
    ) -> tuple[Inputs, Masks]:
        """Pairs with the masks of `rows`, texts of others, and images of `shown`, or
        their own.
        """
        return make_inputs(
            self.config,
            uids=self.pairs.uids[rows],
            pixels=self.pairs.pixels[rows if shown is None else shown],
            texts=[self.pairs.texts[int(row)] for row in texts],
            seed=self.seed,
            draw_number=0,
            mode=mode,
            device=self.device,
        )

    def _word(self, token: int) -> str:
        return self.tokenizer.id_to_token(token) or "?"

    def words(self, row: int) -> str:
        """What a pair's text says."""
        return text_of(self.tokenizer, self.pairs.texts[row][1:-1])

    def caption(self, row: int) -> str:
        """The words that a pair shows, wrapped."""
        short = textwrap.shorten(self.words(row), _MAX_CAPTION, placeholder=" ...")
        # Dollars would start mathematics.
        return textwrap.fill(short, _WRAP).replace("$", r"\$")


def pixel_mask(masks: Masks, row: int, config: PretrainConfig) -> np.ndarray:
    """Mask (S, S, 1) of the pixels that row's masked tokens cover."""
    side = config.model.patch_size
    grid = config.image.size // side
    mask = masks.image[row].cpu().numpy().reshape(grid, grid)
    return mask.repeat(side, 0).repeat(side, 1)[..., None]
