"""The one random generator: Philox-4x32-10 and the registry of what draws from it.

Law 1 of the design: every random choice is a pure function of (seed, use, epoch,
sample, index). Key = seed as two 32-bit words; counter = (index, use << 24 | epoch,
uid_lo, uid_hi); a draw is word 0 unless said otherwise. Draws that belong to no sample
put (source, lane, window) in the uid words.

The same integer arithmetic runs on numpy int64 arrays and on torch int64 tensors of any
device: products wrap in two's complement, which keeps both halves exact.
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
MAX_EPOCH = (1 << 24) - 1
WINDOWS = 1 << 32
"""Windows of a lane that it tells apart, or blocks of a mixture."""


class Use(enum.IntEnum):
    """What a draw is for: 8 bits of the counter. Numbers never change meaning."""

    SHARD_ORDER = 0
    ROTATION = 1
    WINDOW = 2
    CAPTION = 3
    CROP = 4
    MODE = 5
    TEXT_MASK = 6
    IMAGE_MASK = 7
    REPLACEMENT = 8
    ITM = 9
    MODALITY_DROPOUT = 10
    EVALUATION = 11
    MIXTURE = 12
    FINETUNE = 13
    DROPOUT = 64
    """First of the dropout sites, one number each (`trainer.dropout`)."""


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> tuple[Any, ...]:
    """Philox-4x32-10: four counter words and two key words to four random words.

    Words are int64 arrays or tensors holding 0..2^32-1, broadcast together.
    """
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def draw(*, seed: int, use: int, epoch: Any, uid: Any, index: Any) -> tuple[Any, ...]:
    """Four words (each int64, 0..2^32-1) for every (epoch, uid, index), broadcast
    together.

    `uid` is an int64 array or tensor (uint64 values reinterpreted, see `signed_uids`);
    `epoch` an int, or an int64 array or tensor of values that an int would pass with.

    Raises:
        ValueError: seed or epoch outside what the counter holds.
    """
    check_seed(seed)
    check_epoch(epoch)
    index = index + 0 * uid
    use_epoch = index * 0 + ((int(use) << 24) | epoch)
    key = (seed & _WORD, seed >> 32)
    return philox(index, use_epoch, uid & _WORD, (uid >> 32) & _WORD, *key)


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` fits the 64-bit key."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is outside 0..2^64-1")


def check_epoch(epoch: Any) -> None:
    """Raise ValueError for an int `epoch` that its 24 bits do not hold."""
    if isinstance(epoch, int) and not 0 <= epoch <= MAX_EPOCH:
        raise ValueError(f"epoch {epoch} is outside 0..{MAX_EPOCH}")


def signed_uids(uids: np.ndarray) -> np.ndarray:
    """uint64 uids as the int64 with the same bits, which torch can hold."""
    return np.ascontiguousarray(uids, dtype=np.uint64).view(np.int64)


def place_of(*, source: int, lane: int = 0, window: int = 0) -> int:
    """The uid words of a draw that belongs to no sample: source, lane and window.

    Raises:
        ValueError: more than 2^15 sources, 2^16 lanes or 2^32 windows.
    """
    if source >> 15 or lane >> 16 or window >= WINDOWS:
        raise ValueError(
            f"source {source}, lane {lane}, window {window}: the generator counts up "
            "to 2^15 sources, 2^16 lanes and 2^32 windows"
        )
    return source << 48 | lane << 32 | window


def permutation(
    size: int, *, seed: int, use: int, epoch: int, place: int
) -> np.ndarray:
    """A permutation (size,) of 0..size-1: indices sorted by a 63-bit draw each."""
    places = np.array([place], dtype=np.int64)
    return permutations(size, seed=seed, use=use, epoch=epoch, places=places)[0]


def permutations(
    size: int, *, seed: int, use: int, epoch: int, places: np.ndarray
) -> np.ndarray:
    """The `permutation` (n, size) of each of some places (n,) int64."""
    index = np.arange(size, dtype=np.int64)
    uid = places[:, None]
    w0, w1, _, _ = draw(seed=seed, use=use, epoch=epoch, uid=uid, index=index)
    return np.argsort((w0 << 31) | (w1 >> 1), axis=1, kind="stable")


def edge(share: float) -> int:
    """The words below it are a `share` of all that there are."""
    return round(share * (1 << 32))


def below(word: Any, bound: Any) -> Any:
    """Map words to 0..bound-1 by the high half of word * bound (bound < 2^31)."""
    return (word * bound) >> 32
