"""Finding the one flipped bit of a file whose checksum is known.

Owns the search: over CRC32C, in which a flipped bit leaves a trace that names its
place, and over sha256 by trying each bit of a small file. Does not own what the right
checksum is (`pipeline.repair`). Nothing is believed that does not meet its sha256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import crc32c
import numpy as np

from pipeline.manifest import file_sha256
from pipeline.shards import END_OF_TAR

# CRC32C's polynomial, bits reversed, as it is computed.
_POLYNOMIAL = 0x82F63B78
# Each bit costs a sha256 of the file: a few seconds at most.
SMALL_BYTES = 32 << 10


def flipped_bit(data: bytes, right_crc32c: int) -> int | None:
    """The bit (8 * byte + place from the lowest) that has to be flipped so that `data`
    has this CRC32C; None where no single one does. O(bits), without a table.

    The CRC is linear: the difference of two checksums is the checksum, without its
    constants, of the difference of the data, which is one bit and zeros behind it.
    """
    trace = crc32c.crc32c(data) ^ right_crc32c
    if not trace:
        return None
    # The trace of the last bit of the data, then of each bit before it.
    step = _POLYNOMIAL
    for bit in range(8 * len(data) - 1, -1, -1):
        if step == trace:
            return bit
        step = (step >> 1) ^ (_POLYNOMIAL if step & 1 else 0)
    return None


def mended(data: bytes, sha256: str) -> bytes | None:
    """A small file with the one bit flipped that gives it this sha256, if there is one.
    Files over 32 KiB are not tried.
    """
    if len(data) > SMALL_BYTES:
        return None
    trial = bytearray(data)
    for place in range(len(trial)):
        for bit in range(8):
            trial[place] ^= 1 << bit
            if hashlib.sha256(trial).hexdigest() == sha256:
                return bytes(trial)
            trial[place] ^= 1 << bit
    return None


def mend_tar(path: Path, index: np.ndarray, sha256: str) -> bool:
    """Flip back one bit in every sample whose checksum is wrong, in place, and write
    the end blocks again. True where the file has its sha256 then.

    Args:
        index: its records (samples,) of `INDEX_DTYPE`, sound.
    """
    with path.open("r+b") as file:
        for record in index:
            start = int(record["span_offset"])
            file.seek(start)
            span = file.read(int(record["span_size"]))
            bit = flipped_bit(span, int(record["span_crc32c"]))
            if bit is not None:
                file.seek(start + bit // 8)
                file.write(bytes([span[bit // 8] ^ 1 << bit % 8]))
        file.seek(int(index["span_offset"][-1] + index["span_size"][-1]))
        file.write(END_OF_TAR)
    return file_sha256(path) == sha256
