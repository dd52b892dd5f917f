"""Samples of a dataset by their uid, as items for tasks.

Owns finding them, reading them once, and which of its captions a sample shows. Does not
own the dataset (`trainer.dataset`) or the items (`trainer.tasks.items`).

Shapes: N samples, U different ones, S pixels on a side.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np

from trainer.dataset import Dataset
from trainer.geometry import box_of, decode_into
from trainer.options import ImageConfig, PretrainConfig
from trainer.philox import Use, below, draw, signed_uids
from trainer.tasks.items import Items

DRAWN = -1
"""Caption number for one that is drawn, in each epoch anew."""
_KEPT_BYTES = 1 << 30


class Samples:
    """Some splits of a dataset, read by uid.

    Args:
        datasets: one a split.
        config: keys of pretraining, which say how images are cut and texts end.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        config: PretrainConfig,
        *,
        seed: int,
        threads: int = 2,
    ) -> None:
        self._datasets = datasets
        self._max_tokens = config.text.max_tokens
        side = config.image.size
        plain = config.image.geometry == "resize"
        self._geometry = ImageConfig(
            size=side, geometry="resize" if plain else "center_crop"
        )
        self._seed = seed
        self._pool = ThreadPoolExecutor(threads)
        self._places = [dataset.places() for dataset in datasets]
        records = [
            dataset.records(places)
            for dataset, places in zip(datasets, self._places, strict=True)
        ]
        self._records = np.concatenate(records)
        self._owner = np.repeat(np.arange(len(datasets)), [len(r) for r in records])
        self._within = np.concatenate([np.arange(len(r)) for r in records])
        self._order = np.argsort(self._records["uid"], kind="stable")
        self._sorted = self._records["uid"][self._order]
        self._pixels: dict[int, np.ndarray] = {}
        self._kept = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The dataset, as the user gave it."""
        return ", ".join(dict.fromkeys(dataset.name for dataset in self._datasets))

    @property
    def manifest_hash(self) -> str:
        """The manifest hash of law 1; of several directories, that of their hashes."""
        hashes = list(dict.fromkeys(one.manifest_hash for one in self._datasets))
        if len(hashes) == 1:
            return hashes[0]
        return sha256("\n".join(hashes).encode()).hexdigest()

    def rows(self, uids: np.ndarray) -> np.ndarray:
        """Row (N,) of each uid (N,) uint64, which other methods take.

        Raises:
            ValueError: a uid that is not in the dataset.
        """
        uids = np.asarray(uids, dtype=np.uint64)
        place = np.searchsorted(self._sorted, uids).clip(max=len(self._sorted) - 1)
        wrong = np.flatnonzero(self._sorted[place] != uids)
        if len(wrong):
            splits = ", ".join(dataset.folders[0].split for dataset in self._datasets)
            raise ValueError(
                f"{len(wrong)} of {len(uids)} uids are not in {self.name} (split "
                f"{splits}), the first is {int(uids[wrong[0]]):016x}: give the dataset "
                "that they were made of with --data, or make the pairs anew (python -m "
                "pipeline.pairs)"
            )
        return self._order[place]

    def uids(self, rows: np.ndarray) -> np.ndarray:
        """(N,) uint64."""
        uids: np.ndarray = self._records["uid"][rows]
        return uids

    def n_captions(self, rows: np.ndarray) -> np.ndarray:
        """Captions (N,) that samples have."""
        return self._records["n_captions"][rows].astype(np.int64)

    def items(
        self,
        rows: np.ndarray,
        *,
        captions: np.ndarray,
        epoch: int = 0,
        images: np.ndarray | None = None,
    ) -> Items:
        """Samples with image and text.

        Args:
            rows: (N,).
            captions: (N,) number of the caption that each shows, or `DRAWN`.
            images: (N,) bool, which images to read; others are black. None: all.

        Raises:
            ValueError: a damaged sample.
            OSError: storage failed.
        """
        wanted = np.ones(len(rows), bool) if images is None else images
        choice = self.chosen(rows, captions, epoch=epoch)
        side = self._geometry.size
        pixels = np.zeros((len(rows), side, side, 3), dtype=np.uint8)

        def read(number: int) -> np.ndarray:
            row = int(rows[number])
            if wanted[number]:
                pixels[number] = self.image(row)
            return self.text(row, int(choice[number]))

        texts = list(self._pool.map(read, range(len(rows))))
        present = np.ones(len(rows), bool)
        return Items(
            pixels=pixels, texts=texts, has_image=wanted.copy(), has_text=present
        )

    def chosen(
        self, rows: np.ndarray, captions: np.ndarray, *, epoch: int
    ) -> np.ndarray:
        """Caption number (N,) of each, those that are `DRAWN` by Philox."""
        have = self.n_captions(rows)
        uids = signed_uids(self.uids(rows))
        words = draw(seed=self._seed, use=Use.CAPTION, epoch=epoch, uid=uids, index=0)
        return np.where(captions == DRAWN, below(words[0], have), captions)

    def image(self, row: int) -> np.ndarray:
        """(S, S, 3) uint8, cut or squeezed as in pretraining, without augmentation."""
        kept = self._pixels.get(row)
        if kept is not None:
            return kept
        dataset, place, record = self._at(row)
        side = self._geometry.size
        pixels = np.empty((side, side, 3), dtype=np.uint8)
        size = int(record["width"]), int(record["height"])
        box = box_of(self._geometry, *size, np.zeros(4))
        decode_into(pixels, dataset.jpeg(place, record), size, box)
        with self._lock:
            if self._kept + pixels.nbytes <= _KEPT_BYTES:
                self._pixels[row] = pixels
                self._kept += pixels.nbytes
        return pixels

    def text(self, row: int, caption: int) -> np.ndarray:
        """[CLS] words [SEP] of a caption."""
        dataset, place, record = self._at(row)
        text, _ = dataset.text(place, record, caption, max_tokens=self._max_tokens)
        return text

    def jpeg(self, row: int) -> bytes:
        """The image as it is stored, for people."""
        dataset, place, record = self._at(row)
        return bytes(dataset.jpeg(place, record))

    def json(self, row: int) -> dict[str, Any]:
        """What is known of a sample, for people."""
        dataset, place, record = self._at(row)
        return dataset.json(place, record)

    def _at(self, row: int) -> tuple[Dataset, int, np.void]:
        owner = int(self._owner[row])
        place = self._places[owner][self._within[row]]
        return self._datasets[owner], int(place[0]), self._records[row]
