"""Images and texts after their own encoders, each encoded once for all its pairs.

Owns what is encoded when, and how much of it is kept. Does not own the models
(`trainer.tasks.retrievers`) or what states are for (`trainer.tasks.pair_scores`).

Pairs come ordered by image, so an image's state is needed for a while and then no more:
no more than two batches of them lie on the device. Any text may come again with the
next image: their states lie in the host's memory.

Shapes: S side of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.tasks.retrievers import RetrievalModel, TextState

# States of texts beyond this are made again whenever they are needed.
MOST_TEXT_BYTES = 4 << 30


class KeptStates:
    """States of a gallery, made when they are first asked for.

    Args:
        pixels: (images, S, S, 3) uint8.
        texts: token ids of each.
        images: numbers of the images that will be asked for, ascending.
        batch: images that are encoded at once.
    """

    def __init__(
        self,
        model: RetrievalModel,
        pixels: np.ndarray,
        texts: Sequence[np.ndarray],
        *,
        images: np.ndarray,
        batch: int,
    ) -> None:
        self._model, self._pixels, self._ids = model, pixels, texts
        self._images, self._batch = images, batch
        self._held = images[:0]
        self._states: Tensor | None = None
        self._texts: dict[int, TextState] = {}
        self._text_bytes = 0

    def of_images(self, wanted: np.ndarray) -> Tensor:
        """(len(wanted), ...) of some images, ascending, none before those of the last
        call and none of `images` left out.
        """
        missing = np.setdiff1d(wanted, self._held)
        if len(missing):
            ahead = self._images[np.searchsorted(self._images, missing[0]) :]
            ahead = ahead[: max(self._batch, len(missing))]
            made = self._model.image_states(self._pixels[ahead])
            if self._states is not None:
                first = int(np.searchsorted(self._held, wanted[0]))
                made = torch.cat([self._states[first:], made])
                ahead = np.concatenate([self._held[first:], ahead])
            self._held, self._states = ahead, made
        assert self._states is not None
        place = np.searchsorted(self._held, wanted)
        return self._states[torch.from_numpy(place).to(self._states.device)]

    def of_texts(self, wanted: np.ndarray) -> list[TextState]:
        """Of each text of these numbers, which may repeat."""
        different = dict.fromkeys(wanted.tolist())
        missing = [one for one in different if one not in self._texts]
        made: dict[int, TextState] = {}
        if missing:
            found = self._model.text_states([self._ids[one] for one in missing])
            made = dict(zip(missing, found, strict=True))
        for number, state in made.items():
            if self._text_bytes + state.nbytes <= MOST_TEXT_BYTES:
                self._texts[number] = state
                self._text_bytes += state.nbytes
        return [
            made[one] if one in made else self._texts[one] for one in wanted.tolist()
        ]
