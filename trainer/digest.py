"""The digest of what a step consists of, whatever the order of its pairs.

Owns what is hashed, and how. Does not own the pairs (`trainer.rows`), their masks
(`trainer.masking`) or what they are matched with (`trainer.matching`).

A digest is the sum, wrapped to 64 bits, of a 64-bit hash of everything that was drawn
for each sample, so parts of a step, and ranks, add up to the whole.

Shapes: B pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.masking import Masks
from trainer.matching import Matching
from trainer.philox import philox
from trainer.rows import Rows

# What a hash is of; 0 and 1 are masked words and image positions.
_FLIPS, _KEPT, _SWAPPED = 2, 3, 4
_LOW = 0xFFFFFFFF
_DIGEST_KEY = (0x70616C69, 0x6D707365)


def digest_of(rows: Rows, *, flips: bool, masks: Masks | None, matching: Any) -> int:
    """Digest of B pairs: uid, caption and crop, and what else is given of them.

    Args:
        flips: images may be mirrored.
        matching: hashed where it says what texts are matched with.
    """
    total = _samples(rows.uids, rows.captions, rows.crops)
    if flips:
        total += _flips(rows.uids, rows.flips)
    if masks:
        total += _masked(rows.uids, masks)
    if isinstance(matching, Matching):
        total += _matched(rows.uids, matching)
    return wrap(total)


def _samples(uids: np.ndarray, caption: np.ndarray, crops: np.ndarray) -> int:
    """Of every sample's uid, caption index and augmentation draw."""
    mixed = _hash(uids, caption, crops[:, 0] ^ (crops[:, 1] >> 1))
    mixed = mixed + _hash(uids, crops[:, 2], crops[:, 3]) * 3
    return int(mixed.sum())


def _flips(uids: np.ndarray, flips: np.ndarray) -> int:
    """Of every sample's flip draw."""
    kind = np.full(len(uids), _FLIPS)
    return int(_hash(uids, flips, kind).sum())


def _masked(uids: np.ndarray, masks: Masks) -> int:
    """Of every masked position of every sample, and of the words that are shown at some
    of them.
    """
    total = 0
    for kind, mask in enumerate((masks.text, masks.image)):
        pair, position = np.nonzero(mask.numpy())
        total += int(_hash(uids[pair], position, np.full(len(pair), kind)).sum())
    if masks.replacement:
        kept, swapped, word = (part.numpy() for part in masks.replacement)
        pair, position = np.nonzero(kept)
        total += int(_hash(uids[pair], position, np.full(len(pair), _KEPT)).sum())
        pair, position = np.nonzero(swapped)
        shown = word[pair, position]
        total += int(_hash(uids[pair], shown, position << 8 | _SWAPPED).sum())
    return total


def _matched(uids: np.ndarray, matching: Matching) -> int:
    """Of the sample that each text is matched with."""
    of_image = uids[matching.image_of.numpy()]
    return int(_hash(uids, of_image & _LOW, (of_image >> 32) & _LOW).sum())


def _hash(uids: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One int64 for each (uid, low, high), mixed by Philox under a fixed key."""
    words = philox(low, high, uids & _LOW, (uids >> 32) & _LOW, *_DIGEST_KEY)
    return (words[0] << 32) | words[1]


def wrap(value: int) -> int:
    """The int64 that `value` wraps to."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
