"""Near hashes: all blocks together find what comparing every two hashes finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.hamming import NONE, blocks, nearest


def by_all_blocks(keys: np.ndarray, orders: np.ndarray, distance: int) -> np.ndarray:
    found = [
        nearest(keys, orders, distance=distance, block=block)
        for block in range(distance + 1)
    ]
    return np.minimum.reduce(found)


def by_every_pair(keys: np.ndarray, orders: np.ndarray, distance: int) -> np.ndarray:
    near = (np.bitwise_count(keys ^ key) <= distance for key in keys)
    return np.array([orders[each].min() for each in near])


def crowd(count: int) -> np.ndarray:
    """Hashes, half of them near another, that share the first block of distances 3 and
    6 and little else: dividing them again saves work.
    """
    chance = np.random.default_rng(count)
    bits = np.uint64(sum(1 << bit for bit in range(64) if bit % 4 and bit % 7))
    apart = chance.integers(0, 1 << 64, size=count // 2, dtype=np.uint64) & bits
    flips = np.uint64(1) << chance.integers(0, 64, (2, count // 2), dtype=np.uint64)
    return np.unique(np.concatenate([apart, apart ^ flips[0] ^ flips[1]]))


def ball() -> np.ndarray:
    """All hashes of at most two bits: dividing them makes more work, not less."""
    one = np.uint64(1) << np.arange(64, dtype=np.uint64)
    two = [first | second for first, second in itertools.combinations(one, 2)]
    return np.concatenate([one, two, [np.uint64(0)]])


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 6, 9, 16])
@pytest.mark.parametrize("kind", ["crowd", "ball", "both"])
def test_what_is_found_is_what_comparing_every_two_finds(
    kind: str, distance: int
) -> None:
    least = 2 if kind == "crowd" else 1
    given = {"crowd": crowd(3000), "ball": ball()}
    given["both"] = np.unique(np.concatenate(list(given.values())))
    keys = given[kind]
    orders = np.random.default_rng(1).permutation(len(keys)).astype(np.uint64)
    expected = by_every_pair(keys, orders, distance)
    assert np.any(expected < orders) == (distance >= least)
    assert np.array_equal(by_all_blocks(keys, orders, distance), expected)


def test_a_pair_is_found_in_its_lowest_common_block_alone() -> None:
    keys = np.array([0, 0b10], dtype=np.uint64)
    orders = np.array([7, 4], dtype=np.uint64)
    # Bits go to the blocks in turn: the only one that differs is of block 1.
    found = [nearest(keys, orders, distance=2, block=block) for block in range(3)]
    assert found[0].tolist() == [4, 4]
    assert found[1].tolist() == found[2].tolist() == [int(NONE)] * 2


@pytest.mark.parametrize("distance", [0, 3, 6, 16])
def test_blocks_share_out_all_bits(distance: int) -> None:
    masks = blocks(distance)
    assert len(masks) == distance + 1
    assert sum(masks) == (1 << 64) - 1
    sizes = {mask.bit_count() for mask in masks}
    assert max(sizes) - min(sizes) <= 1


def test_nothing_is_near_where_there_is_nothing() -> None:
    empty = np.empty(0, dtype=np.uint64)
    assert len(nearest(empty, empty, distance=3, block=1)) == 0
