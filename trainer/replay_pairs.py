"""Pairs of a replayed step: all that one asks for about a pair, out of a micro-batch.

Owns collecting it. Does not own what it is: captions, crops and masks are the loader's
own (`trainer.loader`), bytes the dataset's (`trainer.dataset`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from trainer.dataset import Dataset
from trainer.figures import pixel_mask
from trainer.geometry import Box, box_of, flipped
from trainer.loader import Loader, MicroBatch
from trainer.masking import Masks, Mode
from trainer.matching import Matching
from trainer.order import Drawn
from trainer.replacement import random_words
from trainer.rows import crop_draws, flip_draws
from trainer.tasks.texts import text_of


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair of the step, with its masks. Everything of it is text or numbers."""

    lane: int
    source: str
    epoch: int
    """Of its source, from 0."""
    shard: str
    sample: int
    """Its number in the shard, from 0."""
    stands_in_for: str
    """Shard and sample that are damaged and had this place, if so."""
    key: str | None
    """Key in the tar; unknown where json is damaged or anybody's."""
    uid: str
    """16 hex digits."""
    captions: Sequence[str]
    chosen: int
    """Which of its captions the model is shown."""
    tokens: Sequence[str]
    """The text as the model gets it, but for the masks: [CLS] words [SEP]."""
    masked: Sequence[bool]
    """Which of `tokens` are masked."""
    shown: Mapping[int, str]
    """Token that the model is shown instead of the mask, at such of their places: the
    same (`mask.keep_share`) or a random one (`mask.random_share`)."""
    cut: int
    """Tokens of the caption that `text.max_tokens` cut off."""
    size: tuple[int, int]
    """Width and height of the stored image."""
    box: Box
    """Part of it that the model is shown, in its pixels."""
    flip: bool
    """The model is shown it mirrored."""
    mode: Mode
    squares: Sequence[bool]
    """Which image positions are masked, row by row."""
    image_of: str | None
    """Uid of the sample whose image the text is matched with, 16 hex digits; None
    without an ITM head."""
    pixels: np.ndarray | None
    """(S, S, 3) uint8 as the model gets them; None unless pictures were asked for."""
    hidden: np.ndarray
    """(S, S, 1) bool: pixels of masked squares."""

    @property
    def words(self) -> int:
        """Tokens that may be masked: all but [CLS] and [SEP]."""
        return len(self.tokens) - 2


@dataclass(frozen=True, kw_only=True)
class Made:
    """A micro-batch and its masks, to take single pairs from."""

    loader: Loader
    tokenizer: Tokenizer
    ordered: Drawn
    """The B samples as the sample order has them."""
    places: np.ndarray
    """(B, 2) places with what stands in for damaged samples."""
    batch: MicroBatch
    masks: Masks
    matching: Matching | None

    @classmethod
    def of(
        cls,
        loader: Loader,
        tokenizer: Tokenizer,
        ordered: Drawn,
        places: np.ndarray,
        batch: MicroBatch,
    ) -> Self:
        """The micro-batch with the masks that the model draws for it."""
        return cls(
            loader=loader,
            tokenizer=tokenizer,
            ordered=ordered,
            places=places,
            batch=batch,
            masks=loader.masks(
                batch.uids,
                batch.stream,
                batch.epochs,
                batch.text_capacity,
                step=batch.step,
            ),
            matching=loader.matching(batch),
        )

    def pair(self, row: int, *, pictures: bool) -> Pair:
        """The pair at `row`, with copies of what it needs of the micro-batch."""
        dataset, config = self.loader.dataset, self.loader.config
        record = dataset.records(self.places[row : row + 1])[0]
        shard, chosen = int(self.places[row, 0]), int(self.batch.captions[row])
        size = int(record["width"]), int(record["height"])
        uids = self.batch.uids[row : row + 1].numpy()
        epochs = self.batch.epochs[row : row + 1].numpy()
        crop = crop_draws(config, uids, epochs)[0]
        stream = self.batch.stream
        mine = stream.text_pair[: stream.text_used] == row
        ids = self.batch.token_ids[: stream.text_used][mine].tolist()
        n_words = len(ids) - 2
        stored = dataset.captions(shard, record)
        key, captions = _from_json(dataset, shard, record)
        if len(captions) != len(stored):
            captions = [text_of(self.tokenizer, text[:-1]) for text in stored]
        return Pair(
            lane=int(self.ordered.lanes[row]),
            source=self.loader.order.sources[int(self.ordered.sources[row])].name,
            epoch=int(epochs[0]),
            shard=dataset.shard(shard).name,
            sample=int(self.places[row, 1]),
            stands_in_for=self._stood(row),
            key=key,
            uid=f"{int(record['uid']):016x}",
            captions=captions,
            chosen=chosen,
            tokens=[self.tokenizer.id_to_token(token) or "?" for token in ids],
            masked=[False, *self.masks.text[row, :n_words].tolist(), False],
            shown=self._shown(row, ids),
            cut=len(stored[chosen]) - 1 - n_words,
            size=size,
            box=box_of(config.image, *size, crop),
            flip=bool(flipped(flip_draws(config, uids, epochs))[0]),
            mode=Mode(int(self.masks.mode[row])),
            squares=self.masks.image[row].tolist(),
            hidden=pixel_mask(self.masks, row, config),
            image_of=self._image_of(row),
            pixels=self.batch.pixels[row].numpy().copy() if pictures else None,
        )

    def _image_of(self, row: int) -> str | None:
        # MaskVLM's is drawn on the device, by similarity: no step without its weights.
        image_of = getattr(self.matching, "image_of", None)
        if image_of is None:
            return None
        uid = int(self.batch.uids[image_of[row]])
        return f"{uid % (1 << 64):016x}"

    def _shown(self, row: int, ids: list[int]) -> dict[int, str]:
        replacement = self.masks.replacement
        if replacement is None:
            return {}
        info = self.loader.dataset.tokenizer
        kept, swapped, word = (part[row] for part in replacement)
        special = info.special_ids.values()
        random = random_words(word, info.vocab_size, special).tolist()
        places = (kept | swapped).nonzero().flatten().tolist()
        shown = {n + 1: random[n] if swapped[n] else ids[n + 1] for n in places}
        return {n: self.tokenizer.id_to_token(i) or "?" for n, i in shown.items()}

    def _stood(self, row: int) -> str:
        first = self.ordered.places[row]
        if (first == self.places[row]).all():
            return ""
        shard, sample = first.tolist()
        return f"{self.loader.dataset.shard(shard).name} sample {sample}"


def mode_name(mode: Mode) -> str:
    """`image-heavy`, as people write it."""
    return mode.name.lower().replace("_", "-")


def pair_as_json(pair: Pair) -> dict[str, Any]:
    return {
        "lane": pair.lane,
        "source": pair.source,
        "epoch": pair.epoch,
        "shard": pair.shard,
        "sample": pair.sample,
        "stands_in_for": pair.stands_in_for or None,
        "key": pair.key,
        "uid": pair.uid,
        "captions": list(pair.captions),
        "chosen": pair.chosen,
        "tokens": list(pair.tokens),
        "cut_tokens": pair.cut,
        "size": list(pair.size),
        "box": list(pair.box),
        "flip": pair.flip,
        "mode": mode_name(pair.mode),
        "words": pair.words,
        "masked_tokens": np.flatnonzero(pair.masked).tolist(),
        "shown_tokens": dict(pair.shown),
        "squares": len(pair.squares),
        "masked_squares": np.flatnonzero(pair.squares).tolist(),
        "image_of": pair.image_of,
    }


def _from_json(
    dataset: Dataset, shard: int, record: np.void
) -> tuple[str | None, list[str]]:
    """A sample's key and captions as the pipeline wrote them; nothing from tars that it
    only indexed, where json is anybody's.
    """
    if dataset.indexed(shard):
        return None, []
    sample = dataset.json(shard, record)
    return sample["key"], sample["captions"]
