"""The perceptual hash by which near duplicates are found.

Owns the hash alone. Does not own comparing hashes (`pipeline.hamming`). A hash of the
lowest spatial frequencies: signs of horizontal gradients (the usual difference hash)
were measured to give most photos of a product catalogue one hash.
"""

from __future__ import annotations

import math

import numpy as np

# Pixels of the thumbnail's side, and frequencies of it that are kept in each direction.
SIDE = 32
_KEPT = 8
_SCALE = 1 << 12
_LUMA = np.array([299, 587, 114], np.int64)
# Rows 1 to 8 of a 32-point DCT-II, in integers: equal on every machine. Row 0, the
# mean, says how bright a picture is, not what is on it.
_BASIS = np.array(
    [
        [
            round(_SCALE * math.cos(math.pi * k * (2 * n + 1) / (2 * SIDE)))
            for n in range(SIDE)
        ]
        for k in range(1, _KEPT + 1)
    ],
    np.int64,
)


def perceptual_hash(thumbnail: np.ndarray) -> str:
    """64 bits as 16 hex digits: which of 8 x 8 low frequencies are above their median.

    `thumbnail` is RGB uint8 (32, 32, 3). Near-equal images differ in few bits; images
    of one colour have the hash 0.
    """
    grey = thumbnail.astype(np.int64) @ _LUMA
    frequencies = (_BASIS @ grey @ _BASIS.T).ravel()
    # The lower median: with many equal values, as in flat images, no bit is set.
    median = np.sort(frequencies)[frequencies.size // 2]
    return np.packbits(frequencies > median).tobytes().hex()
