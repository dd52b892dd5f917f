"""The perceptual hash by which near duplicates are found.

Owns the hash alone. Does not own comparing hashes (`pipeline.hamming`). A hash of the
lowest spatial frequencies: signs of horizontal gradients (the usual difference hash)
were measured to give most photos of a product catalogue one hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Pixels of the thumbnail's side, and frequencies of it that are kept in each direction.
SIDE = 32
_KEPT = 8
_SCALE = 1 << 12
_LUMA = np.array([299, 587, 114], np.float64)
# Rows 1 to 8 of a 32-point DCT-II. Row 0, the mean, says how bright a picture is, not
# what is on it. All numbers here and all sums of them are whole and below 2**53, which
# floats add without rounding: equal on every machine, whatever the order.
_BASIS = np.array(
    [
        [
            round(_SCALE * math.cos(math.pi * k * (2 * n + 1) / (2 * SIDE)))
            for n in range(SIDE)
        ]
        for k in range(1, _KEPT + 1)
    ],
    np.float64,
)


def perceptual_hashes(thumbnails: Sequence[bytes]) -> list[str]:
    """Of each thumbnail 64 bits as 16 hex digits: which of 8 x 8 low frequencies are
    above their median.

    A thumbnail is RGB, 32 x 32 pixels of 3 bytes. Near-equal images differ in few bits;
    images of one colour have the hash 0.
    """
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, SIDE, SIDE, 3)
    grey = pixels.astype(np.float64) @ _LUMA
    frequencies = (_BASIS @ grey @ _BASIS.T).reshape(len(grey), _KEPT * _KEPT)
    # The lower median: with many equal values, as in flat images, no bit is set.
    median = np.sort(frequencies)[:, frequencies.shape[1] // 2, None]
    bits = np.packbits(frequencies > median, axis=1)
    return [one.tobytes().hex() for one in bits]
