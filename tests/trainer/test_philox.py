from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.philox import (
    Use,
    below,
    draw,
    permutation,
    permutations,
    philox,
    signed_uids,
)

# Known answers of Philox-4x32-10 published with its reference implementation.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_in_numpy_and_torch(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    arrays = [np.array([word], dtype=np.int64) for word in counter]
    tensors = [torch.tensor([word]) for word in counter]
    assert tuple(int(word[0]) for word in philox(*arrays, *key)) == words
    assert tuple(int(word[0]) for word in philox(*tensors, *key)) == words


def test_numpy_and_torch_draw_the_same_for_every_uid() -> None:
    uids = np.random.default_rng(0).integers(0, 1 << 64, 500, dtype=np.uint64)
    signed = signed_uids(uids)
    assert (signed < 0).any()
    assert np.array_equal(signed.view(np.uint64), uids)
    where = {"seed": (7 << 40) + 3, "use": Use.CROP, "epoch": 12}
    index = np.arange(500)
    ours = draw(**where, uid=signed, index=index)
    theirs = draw(**where, uid=torch.from_numpy(signed), index=torch.from_numpy(index))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b.numpy())


def test_every_part_of_the_key_and_counter_matters() -> None:
    def word(seed: int, use: Use, epoch: int, uid: int, index: int) -> int:
        place = {"uid": np.array([uid]), "index": np.array([index])}
        return int(draw(seed=seed, use=use, epoch=epoch, **place)[0][0])

    places = [
        (1, Use.CROP, 1, 1, 1),
        (2, Use.CROP, 1, 1, 1),
        ((1 << 32) + 1, Use.CROP, 1, 1, 1),
        (1, Use.MODE, 1, 1, 1),
        (1, Use.CROP, 2, 1, 1),
        (1, Use.CROP, 1, 2, 1),
        (1, Use.CROP, 1, (1 << 32) + 1, 1),
        (1, Use.CROP, 1, 1, 2),
    ]
    assert len({word(*place) for place in places}) == len(places)


def test_seed_and_epoch_outside_the_counter_are_refused() -> None:
    zero = np.zeros(1, dtype=np.int64)
    for seed, epoch in ((-1, 0), (1 << 64, 0), (0, -1), (0, 1 << 24)):
        with pytest.raises(ValueError, match="outside"):
            draw(seed=seed, use=Use.MODE, epoch=epoch, uid=zero, index=zero)


def test_permutation_is_one_and_depends_on_its_place() -> None:
    first = permutation(1000, seed=1, use=Use.WINDOW, epoch=0, place=5)
    again = permutation(1000, seed=1, use=Use.WINDOW, epoch=0, place=5)
    other = permutation(1000, seed=1, use=Use.WINDOW, epoch=0, place=6)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, again)
    assert (first == other).mean() < 0.05


def test_permutations_worked_out_together_are_those_worked_out_alone() -> None:
    places = np.array([3, 1 << 32, 5 << 48 | 7], dtype=np.int64)
    found = permutations(300, seed=9, use=Use.MIXTURE, epoch=2, places=places)
    for place, together in zip(places.tolist(), found, strict=True):
        alone = permutation(300, seed=9, use=Use.MIXTURE, epoch=2, place=place)
        assert np.array_equal(together, alone)


def test_below_covers_its_range_evenly() -> None:
    index = np.arange(30_000)
    words = draw(seed=0, use=Use.CAPTION, epoch=0, uid=index * 0, index=index)[0]
    counts = np.bincount(below(words, 5), minlength=5)
    assert len(counts) == 5
    assert abs(counts - 6000).max() < 400
