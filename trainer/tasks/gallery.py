"""The images of a split with all their captions, for retrieval.

Owns reading them, which of them are the same to a model, and what their columns say.
Does not own features (`trainer.tasks.bodies`) or ranks (`trainer.tasks.ranking`).

What is the same is computed once, so that equal captions, and images that decode to the
same pixels, have the same scores to the last bit: a tie, which `trainer.tasks.ranking`
counts against the model.

Shapes: N images, C captions, S side of an image, U different images, V different texts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer.dataset import Dataset
from trainer.geometry import box_of, decode_into
from trainer.options import ImageConfig, PretrainConfig
from trainer.philox import signed_uids

# Scores of all images by all captions lie in memory.
MOST_SCORES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images and captions in memory."""

    places: np.ndarray
    """(N, 2) of (shard, sample)."""
    uids: np.ndarray
    """(N,) int64."""
    pixels: np.ndarray
    """(N, S, S, 3) uint8, without augmentation."""
    texts: list[np.ndarray]
    """C times [CLS] words [SEP]."""
    owner: np.ndarray
    """(C,) image of each caption, ascending."""
    image_of: np.ndarray
    """(N,) which of the U different images each is."""
    text_of: np.ndarray
    """(C,) which of the V different texts each is."""
    images: np.ndarray
    """(U,) the first of each."""
    different: np.ndarray
    """(V,) the first of each."""

    def captions_of(self, image: int) -> np.ndarray:
        """Numbers of the captions of an image."""
        return np.flatnonzero(self.owner == image)

    @property
    def copies(self) -> dict[str, int]:
        """How many images, and captions, are also another image's."""
        shared_images = np.bincount(self.image_of) > 1
        own = np.unique(np.stack([self.text_of, self.owner]), axis=1)
        shared_texts = np.bincount(own[0]) > 1
        return {
            "images": int(shared_images[self.image_of].sum()),
            "captions": int(shared_texts[self.text_of].sum()),
        }


def read_gallery(
    dataset: Dataset, config: PretrainConfig, places: np.ndarray, *, progress: tqdm[Any]
) -> Gallery:
    """The images at `places` (N, 2) with all their captions, as the model of `config`
    sees them.

    Raises:
        ValueError: a damaged sample, or more of them than scores of all images by all
            captions find room for, before any is read.
        OSError: storage failed.
    """
    records = dataset.records(places)
    _require_size(len(places), int(records["n_captions"].sum()))
    was_read = dataset.ahead_in_order(places[:, 0])
    side = config.image.size
    pixels = np.empty((len(places), side, side, 3), dtype=np.uint8)
    plain = config.image.geometry == "resize"
    geometry = ImageConfig(size=side, geometry="resize" if plain else "center_crop")

    def read(row: int) -> list[np.ndarray]:
        record, shard = records[row], int(places[row, 0])
        size = int(record["width"]), int(record["height"])
        box = box_of(geometry, *size, np.zeros(4))
        decode_into(pixels[row], dataset.jpeg(shard, record), size, box)
        texts = [
            dataset.text(shard, record, number, max_tokens=config.text.max_tokens)[0]
            for number in range(int(record["n_captions"]))
        ]
        was_read(row)
        progress.update()
        return texts

    with ThreadPoolExecutor(2) as pool:
        texts_of = list(pool.map(read, range(len(places))))
    texts = [text for found in texts_of for text in found]
    images, image_of = first_and_which([image.tobytes() for image in pixels])
    different, text_of = first_and_which([text.tobytes() for text in texts])
    return Gallery(
        places=places,
        uids=signed_uids(records["uid"]),
        pixels=pixels,
        texts=texts,
        owner=np.repeat(np.arange(len(places)), [len(found) for found in texts_of]),
        image_of=image_of,
        text_of=text_of,
        images=images,
        different=different,
    )


def _require_size(images: int, captions: int) -> None:
    """Raise ValueError for a gallery whose scores do not fit into memory."""
    total = images * captions
    if total > MOST_SCORES:
        raise ValueError(
            f"{images:,} images by {captions:,} captions are "
            f"{total:,} scores, more than the {MOST_SCORES:,} that are kept in memory: "
            "lower --max_images"
        )


def first_and_which(values: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (U,) of the first of each different value, ascending, and which of them
    (N,) each value is.
    """
    known: dict[bytes, int] = {}
    first: list[int] = []
    which = np.empty(len(values), dtype=np.int64)
    for place, value in enumerate(values):
        key = blake2b(value, digest_size=16).digest()
        if key not in known:
            known[key] = len(first)
            first.append(place)
        which[place] = known[key]
    return np.array(first, dtype=np.int64), which


def column_of(
    dataset: Dataset, places: np.ndarray, column: str, *, flag: str
) -> list[str]:
    """What the json of each sample at `places` (N, 2) has under `column`; empty where
    it has null there.

    Args:
        flag: that gave the column, for the error.

    Raises:
        ValueError: no such key.
    """
    found = []
    records = dataset.records(places)
    for (shard, _), record in zip(places, records, strict=True):
        sample = dataset.json(int(shard), record)
        if column not in sample:
            raise ValueError(
                f"{flag} {column!r} is not in the samples' json of {dataset.name}, "
                f"which has {', '.join(sample)}: preprocess with --columns.keep "
                f"[{column}]"
            )
        value = sample[column]
        found.append("" if value is None else str(value))
    return found


@dataclass(frozen=True, kw_only=True)
class Classed:
    """Samples that have a class."""

    places: np.ndarray
    """(N, 2) of (shard, sample)."""
    values: list[str]
    """N class names."""
    without_class: int
    """Samples that have none, and are left out."""


def classed(dataset: Dataset, places: np.ndarray, column: str) -> Classed:
    """Those of the samples at `places` whose `--column` is not empty: to have no value
    is no class, as `pipeline.pairs` has it, too.

    Raises:
        ValueError: no such key, or none of them has a value.
    """
    values = column_of(dataset, places, column, flag="--column")
    kept = [row for row, value in enumerate(values) if value.strip()]
    if not kept:
        raise ValueError(
            f"--column {column} is empty in all {len(values):,} samples of "
            f"{dataset.name}: take another one"
        )
    return Classed(
        places=places[kept],
        values=[values[row] for row in kept],
        without_class=len(values) - len(kept),
    )
