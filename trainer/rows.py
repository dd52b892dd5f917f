"""What is known of samples before a byte of them is read: index records and draws.

Owns which caption, crop and flip a sample gets, and working that out, with how it is
read, for several steps at once: numpy costs the same for a hundred samples as for a
thousand. Does not own which samples those are (`trainer.order`), boxes
(`trainer.geometry`) or reads (`trainer.reading`).

Shapes: B pairs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from trainer.dataset import Dataset
from trainer.options import PretrainConfig
from trainer.order import Drawn, SampleOrder
from trainer.philox import Use, below, draw, signed_uids
from trainer.reading import give_way, reads_of

_SAMPLES_AHEAD = 2048
# One that is being read, one that is looked into.
_BLOCKS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Rows:
    """B samples and what was drawn for them."""

    places: np.ndarray
    """(B, 2) int64 of (shard, sample)."""
    epochs: np.ndarray
    """(B,) epoch of each one's source."""
    records: np.ndarray
    """(B,) index records."""
    reads: np.ndarray
    """(B, 9), `trainer.reading.reads_of` them."""
    uids: np.ndarray
    """(B,) int64, the bits of the uint64 uids."""
    captions: np.ndarray
    """(B,) which of its captions each shows."""
    crops: np.ndarray
    """(B, 4) words of each one's crop."""
    flips: np.ndarray
    """(B,) words of each one's flip."""

    def __len__(self) -> int:
        return len(self.places)

    def part(self, rows: slice) -> Rows:
        """Some of them."""
        return Rows(
            places=self.places[rows],
            epochs=self.epochs[rows],
            records=self.records[rows],
            reads=self.reads[rows],
            uids=self.uids[rows],
            captions=self.captions[rows],
            crops=self.crops[rows],
            flips=self.flips[rows],
        )


def rows_of(
    dataset: Dataset, config: PretrainConfig, places: np.ndarray, epochs: np.ndarray
) -> Rows:
    """Samples at `places` (B, 2), each in its epoch (B,).

    Raises:
        OSError: storage failed.
    """
    records = dataset.records(places)
    give_way()
    uids = signed_uids(records["uid"])
    return Rows(
        places=places,
        epochs=epochs,
        records=records,
        reads=reads_of(
            records, config.image, id_bytes=dataset.tokenizer.dtype.itemsize
        ),
        uids=uids,
        captions=caption_choice(records, uids, seed=config.seed, epoch=epochs),
        crops=crop_draws(config, uids, epochs),
        flips=flip_draws(config, uids, epochs),
    )


class RowsAhead:
    """The samples of every step of some lanes, for several threads at once."""

    def __init__(
        self, dataset: Dataset, config: PretrainConfig, order: SampleOrder, lanes: range
    ) -> None:
        self._dataset, self._config = dataset, config
        self._order, self._lanes = order, lanes
        self._share = len(lanes) * order.per_lane
        self._blocks: list[tuple[int, Drawn, Rows]] = []
        self._lock = threading.Lock()

    def of(self, step: int) -> tuple[Drawn, Rows]:
        """What a step takes of the lanes.

        Raises:
            OSError: storage failed.
        """
        with self._lock:
            found = self._known(step) or self._block(step)
        first, drawn, rows = found
        start = (step - first) * self._share
        mine = slice(start, start + self._share)
        return drawn.rows(mine), rows.part(mine)

    def _known(self, step: int) -> tuple[int, Drawn, Rows] | None:
        for block in self._blocks:
            if 0 <= step - block[0] < len(block[1]) // self._share:
                return block
        return None

    def _block(self, step: int) -> tuple[int, Drawn, Rows]:
        # What an undecided step takes may change yet.
        kept = step < self._order.undecided
        most = max(_SAMPLES_AHEAD // self._share, 1)
        drawn = self._order.samples_ahead(step, self._lanes, most=most)
        give_way()
        rows = rows_of(self._dataset, self._config, drawn.places, drawn.epochs)
        block = step, drawn, rows
        if kept:
            self._blocks = [*self._blocks, block][-_BLOCKS_KEPT:]
        return block


def crop_draws(
    config: PretrainConfig, uids: np.ndarray, epochs: np.ndarray
) -> np.ndarray:
    """(B, 4) words of each sample's crop, zero where the geometry draws nothing."""
    if config.image.geometry != "random_resized_crop":
        return np.zeros((len(uids), 4), dtype=np.int64)
    words = draw(seed=config.seed, use=Use.CROP, epoch=epochs, uid=uids, index=0)
    return np.stack(words, axis=1)


def flip_draws(
    config: PretrainConfig, uids: np.ndarray, epochs: np.ndarray
) -> np.ndarray:
    """(B,) word of each sample's flip, zero where none is asked for."""
    if not config.image.flip:
        return np.zeros(len(uids), dtype=np.int64)
    return draw(seed=config.seed, use=Use.CROP, epoch=epochs, uid=uids, index=1)[0]


def caption_choice(
    records: np.ndarray, uids: np.ndarray, *, seed: int, epoch: int | np.ndarray
) -> np.ndarray:
    """Which of its captions (B,) each sample shows in an epoch, one or its own (B,)."""
    words = draw(seed=seed, use=Use.CAPTION, epoch=epoch, uid=uids, index=0)
    return below(words[0], records["n_captions"].astype(np.int64))
