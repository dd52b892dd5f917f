"""The earliest of all 64-bit hashes within a Hamming distance of each.

Owns the blocks that divide a hash's bits, and the search among hashes that agree on one
block. Does not own where hashes come from, how they reach the task of their block
(`pipeline.compare`) or what becomes of what is found.

Two hashes that differ in at most d bits agree on at least one of d + 1 blocks of bits,
so it is enough to compare hashes that share a block. A pair is found in the lowest
block that it shares, and in no other. Where many share one (flat and framed pictures
do), they are divided again by blocks of the remaining bits, as long as that at least
halves the work; what is left is compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

NONE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""An order that no hash has: nothing lies near."""

_BITS = 64
_ALL = (1 << _BITS) - 1
# Dividing a hash once more costs about as much as comparing it with this many others.
_DIVIDING = 40


def blocks(distance: int) -> list[int]:
    """Masks of the distance + 1 blocks of bits of which two near hashes share one."""
    return _divided(_ALL, distance + 1)


def nearest(
    keys: np.ndarray, orders: np.ndarray, *, distance: int, block: int
) -> np.ndarray:
    """The least order among the hashes near each one.

    Args:
        keys: uint64 (N,), hashes; best without repeats, whose pairs are quadratic.
        orders: uint64 (N,), the least order that has each hash.
        distance: bits that near hashes may differ in.
        block: which of the blocks they share, and share no lower one. Block 0 also
            finds a hash itself.

    Returns:
        uint64 (N,), `NONE` where no hash is near.
    """
    masks = [np.uint64(mask) for mask in blocks(distance)]
    best = orders.copy() if block == 0 else np.full_like(orders, NONE)
    members = np.arange(len(keys), dtype=np.uint32)
    for left, right in _near_pairs(keys, members, blocks(distance)[block], distance):
        apart = keys[left] ^ keys[right]
        fresh = np.ones(len(apart), dtype=bool)
        for lower in masks[:block]:
            fresh &= (apart & lower) != 0
        left, right = left[fresh], right[fresh]  # noqa: PLW2901
        np.minimum.at(best, left, orders[right])
        np.minimum.at(best, right, orders[left])
    return best


def _divided(mask: int, parts: int) -> list[int]:
    # Every so-manieth bit rather than a run of them: neighbouring bits of a perceptual
    # hash agree, and a run along an image's border is the same in most of a catalogue.
    bits = [bit for bit in range(_BITS) if mask >> bit & 1]
    return [sum(1 << bit for bit in bits[part::parts]) for part in range(parts)]


def _near_pairs(
    keys: np.ndarray, members: np.ndarray, mask: int, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near pairs among `members` (indices into `keys`) that agree on `mask`."""
    shared = keys[members] & np.uint64(mask)
    by_value = np.argsort(shared, kind="stable")
    members, shared = members[by_value], shared[by_value]
    starts = np.flatnonzero(np.append(True, shared[1:] != shared[:-1])[: len(shared)])
    sizes = np.diff(np.append(starts, len(shared)))
    del shared, by_value
    narrower = [mask | more for more in _divided(_ALL & ~mask, distance + 1)]
    divided = _worth_dividing(keys, members, sizes, narrower)
    apart = np.repeat(~divided & (sizes > 1), sizes)
    yield from _scan(keys, members[apart], sizes[~divided & (sizes > 1)], distance)
    again = members[np.repeat(divided, sizes)]
    del members, apart
    for agreed in narrower if len(again) else ():
        yield from _near_pairs(keys, again, agreed, distance)


def _worth_dividing(
    keys: np.ndarray, members: np.ndarray, sizes: np.ndarray, narrower: list[int]
) -> np.ndarray:
    """Which groups, lying behind each other in `members`, are less work divided."""
    work = sizes.astype(np.float64) ** 2
    large = work / 2 > sizes * float(len(narrower) * _DIVIDING)
    if not large.any():
        return large
    inside = keys[members[np.repeat(large, sizes)]]
    group = np.repeat(np.flatnonzero(large), sizes[large])
    divided = np.zeros(len(sizes))
    for mask in narrower:
        shared = inside & np.uint64(mask)
        _, which, counts = np.unique(shared, return_inverse=True, return_counts=True)
        cost = counts[which] + float(_DIVIDING)
        divided += np.bincount(group, weights=cost, minlength=len(sizes))
    return large & (divided < work / 2)


def _scan(
    keys: np.ndarray, members: np.ndarray, sizes: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near pairs by comparing every two members of a group.

    Step s compares each member with the s-th after it, in all groups at once: the work
    is that of the pairs, the memory that of the members, however large a group is.
    Reaching into the next group as well costs less than avoiding it.
    """
    group = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    # Large groups first: those that a step still reaches into lie at the front.
    large_first = np.argsort(-np.repeat(sizes, sizes), kind="stable")
    members, group = members[large_first], group[large_first]
    inside = keys[members]
    sizes = np.sort(sizes)
    reached = np.cumsum(sizes[::-1])
    for step in range(1, int(sizes[-1]) if len(sizes) else 0):
        larger = len(sizes) - int(np.searchsorted(sizes, step, side="right"))
        end = int(reached[larger - 1])
        near = np.bitwise_count(inside[step:end] ^ inside[: end - step]) <= distance
        at = np.flatnonzero(near)
        at = at[group[at] == group[at + step]]
        if len(at):
            yield members[at], members[at + step]
