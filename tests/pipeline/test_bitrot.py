"""A single flipped bit is found by its checksum, and nothing else is believed."""

from __future__ import annotations

import hashlib

import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bitrot import SMALL_BYTES, flipped_bit, mended


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=3_000), draw=st.data())
def test_any_flipped_bit_is_found_by_the_crc(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    assert flipped_bit(bytes(damaged), crc32c.crc32c(data)) == bit
    assert flipped_bit(data, crc32c.crc32c(data)) is None


def test_two_flipped_bits_are_not_taken_for_one() -> None:
    data = bytes(range(256)) * 8
    damaged = bytearray(data)
    damaged[3] ^= 1
    damaged[700] ^= 16
    assert flipped_bit(bytes(damaged), crc32c.crc32c(data)) is None


def test_a_small_file_is_mended_by_its_sha256() -> None:
    data = b"a small file" * 9
    digest = hashlib.sha256(data).hexdigest()
    for place, bit in ((0, 0), (50, 3), (len(data) - 1, 7)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        assert mended(bytes(damaged), digest) == data
        damaged[place - 1] ^= 1
        assert mended(bytes(damaged), digest) is None
    assert mended(bytes(SMALL_BYTES + 1), digest) is None
