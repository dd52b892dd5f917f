"""Images and texts of a batch, either of which may be absent.

Owns the container on the host. Does not own reading samples (`trainer.tasks.samples`)
or what a model makes of them (`trainer.tasks.bodies`).

Shapes: N items, S pixels on a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Items:
    """N items on the host, each an image, a text, or both.

    Raises:
        ValueError: an item with neither, or parts of different lengths.
    """

    pixels: np.ndarray
    """(N, S, S, 3) uint8; anything where there is no image."""
    texts: Sequence[np.ndarray]
    """[CLS] words [SEP] of each, int64; anything where there is no text."""
    has_image: np.ndarray
    """(N,) bool."""
    has_text: np.ndarray
    """(N,) bool."""

    def __post_init__(self) -> None:
        parts = (self.pixels, self.texts, self.has_image, self.has_text)
        if len({len(part) for part in parts}) != 1:
            raise ValueError("images, texts and their presence are of different length")
        nothing = np.flatnonzero(~(self.has_image | self.has_text))
        if len(nothing):
            raise ValueError(f"item {nothing[0]} has neither image nor text")

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def of(
        cls, pixels: np.ndarray, texts: Sequence[np.ndarray], *, show: str = "both"
    ) -> Items:
        """Items that all show the same.

        Args:
            show: "both", "text" or "image".
        """
        return cls(
            pixels=pixels,
            texts=texts,
            has_image=np.full(len(pixels), show != "text"),
            has_text=np.full(len(pixels), show != "image"),
        )

    def rows(self, numbers: np.ndarray) -> Items:
        """Some of them, in the order of `numbers` (n,)."""
        return Items(
            pixels=self.pixels[numbers],
            texts=[self.texts[int(number)] for number in numbers],
            has_image=self.has_image[numbers],
            has_text=self.has_text[numbers],
        )

    def shown(self, has_image: np.ndarray, has_text: np.ndarray) -> Items:
        """The same, of which each shows only some (N,) of what it has."""
        return replace(
            self,
            has_image=self.has_image & has_image,
            has_text=self.has_text & has_text,
        )

    @staticmethod
    def joined(parts: Sequence[Items]) -> Items:
        """Items one after the other."""
        return Items(
            pixels=np.concatenate([part.pixels for part in parts]),
            texts=[text for part in parts for text in part.texts],
            has_image=np.concatenate([part.has_image for part in parts]),
            has_text=np.concatenate([part.has_text for part in parts]),
        )
