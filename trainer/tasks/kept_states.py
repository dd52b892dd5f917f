"""Images and texts after their own encoders, each encoded once for all that needs them.

Owns what is encoded when, and how much of it is kept: features of an image and all its
pairs are made of one pass. Does not own the models (`trainer.tasks.retrievers`) or what
states are for (`trainer.tasks.pair_scores`).

States lie in the host's memory. Those of no more than two batches of images lie on the
device too: they are asked for in ascending order.

Shapes: N images, S side of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.tasks.retrievers import RetrievalModel, TextState

# States beyond these are made again whenever they are needed.
MOST_IMAGE_BYTES = 4 << 30
MOST_TEXT_BYTES = 4 << 30


class KeptStates:
    """States of a gallery, made when they are first asked for.

    Args:
        pixels: (N, S, S, 3) uint8.
        images: which of them are asked for, by their places in this array.
        texts: token ids of each.
        batch: images that are encoded at once.
        keep_images: they are asked for a second time, after all others.
        keep_texts: they are asked for more than once.
    """

    def __init__(
        self,
        model: RetrievalModel,
        pixels: np.ndarray,
        images: np.ndarray,
        texts: Sequence[np.ndarray],
        *,
        batch: int,
        keep_images: bool,
        keep_texts: bool,
    ) -> None:
        self._model, self._pixels, self._ids = model, pixels, texts
        self._numbers, self._batch = images, batch
        self._room_for_images = MOST_IMAGE_BYTES if keep_images else 0
        self._room_for_texts = MOST_TEXT_BYTES if keep_texts else 0
        self._keep_texts = keep_texts
        self._shown: dict[int, Tensor] = {}
        self._images: dict[int, Tensor] = {}
        self._texts: dict[int, TextState] = {}

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self._numbers)

    @property
    def texts(self) -> int:
        """How many there are."""
        return len(self._ids)

    def keep_no_more_images(self) -> None:
        """Those that are asked for from now on are not asked for again."""
        self._room_for_images = 0

    def of_images(self, wanted: np.ndarray) -> Tensor:
        """(len(wanted), ...) of the images of these numbers, on the device."""
        numbers = wanted.tolist()
        missing = [one for one in numbers if one not in self._shown]
        if missing:
            ahead = range(missing[0], min(missing[0] + self._batch, self.images))
            # Clones: a part of a batch would hold the whole of it.
            kept = {
                one: self._shown[one].clone() for one in numbers if one in self._shown
            }
            self._shown = kept
            fetched = sorted({*missing, *ahead} - kept.keys())
            for first in range(0, len(fetched), self._batch):
                kept |= self._fetched(fetched[first : first + self._batch])
        return torch.stack([self._shown[one] for one in numbers])

    def of_texts(self, wanted: np.ndarray) -> list[TextState]:
        """Of each text of these numbers, which may repeat; on the host where texts are
        kept.
        """
        different = dict.fromkeys(wanted.tolist())
        missing = [one for one in different if one not in self._texts]
        made: dict[int, TextState] = {}
        if missing:
            found = self._model.text_states([self._ids[one] for one in missing])
            if self._keep_texts:
                found = _on_host(found)
            made = dict(zip(missing, found, strict=True))
        for number, state in made.items():
            if state.nbytes <= self._room_for_texts:
                self._texts[number] = state
                self._room_for_texts -= state.nbytes
        return [
            made[one] if one in made else self._texts[one] for one in wanted.tolist()
        ]

    def _fetched(self, numbers: list[int]) -> dict[int, Tensor]:
        """States on the device by number: kept ones, and others in one pass."""
        found: dict[int, Tensor] = {}
        known = [one for one in numbers if one in self._images]
        if known:
            states = torch.stack([self._images[one] for one in known])
            found |= zip(known, states.to(self._model.device), strict=True)
        new = [one for one in numbers if one not in self._images]
        if new:
            made = self._model.image_states(self._pixels[self._numbers[new]])
            found |= zip(new, made, strict=True)
            each = made[0].nbytes
            kept = new[: self._room_for_images // each]
            if kept:
                self._images |= zip(kept, made[: len(kept)].cpu(), strict=True)
                self._room_for_images -= each * len(kept)
        return found


def _on_host(states: Sequence[TextState]) -> Sequence[TextState]:
    """States of several texts, moved in one copy."""
    tensors = [state for state in states if isinstance(state, Tensor)]
    if len(tensors) < len(states):
        return states
    return torch.cat(tensors).cpu().split([len(state) for state in tensors])
