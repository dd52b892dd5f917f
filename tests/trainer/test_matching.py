"""Image-text matching is drawn exactly, and never says that a match is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.tiny import config
from trainer.contract import micro_batch_size, valid_world_sizes
from trainer.dataset import Dataset
from trainer.matching import Matching, caption_table, drawn_matching, fixed_matching
from trainer.probes import read_pairs
from trainer.stream import lay_out
from trainer.validation import _alike

PAIRS, GROUP = 4096, 8


def pairs(**changed: torch.Tensor) -> dict[str, Any]:
    """Arguments of a draw over pairs that all differ, but for what is `changed`."""
    uids = torch.arange(PAIRS) * 0x9E3779B97F4A7C1
    given = {
        "epochs": torch.zeros(PAIRS, dtype=torch.int64),
        "uids": uids,
        "images": torch.arange(PAIRS),
        "captions": torch.arange(PAIRS)[:, None].expand(-1, 3),
    }
    return {**given, **changed, "mismatched": 0.5, "group": GROUP, "seed": 3}


def test_a_mismatched_text_has_another_image_of_its_group() -> None:
    image_of, matched = drawn_matching(**pairs())
    own = torch.arange(PAIRS)
    assert torch.equal(image_of == own, matched)
    assert torch.equal(image_of // GROUP, own // GROUP)
    assert 0.45 < float(matched.float().mean()) < 0.55
    # Each of the seven others about as often: 293 of 2048, give or take 16.
    step = (image_of - own)[~matched] % GROUP
    counts = torch.bincount(step, minlength=GROUP)[1:]
    assert int(counts.min()) > 220
    assert int(counts.max()) < 370


@pytest.mark.parametrize("same", ["uids", "images", "captions"])
def test_pairs_that_share_something_are_never_called_a_mismatch(same: str) -> None:
    # The first six of a group are one sample, one picture or one caption.
    number = torch.arange(PAIRS)
    shared = torch.where(number % GROUP < 6, number // GROUP * GROUP, number)
    given = shared[:, None].expand(-1, 3) if same == "captions" else shared
    image_of, matched = drawn_matching(**pairs(**{same: given}))
    assert bool((shared[image_of] != shared)[~matched].all())
    assert 0.4 < float(matched.float().mean()) < 0.6


def test_a_group_of_one_picture_is_left_as_it_is() -> None:
    _, matched = drawn_matching(**pairs(images=torch.zeros(PAIRS, dtype=torch.int64)))
    assert bool(matched.all())


def test_a_draw_is_pure_in_seed_epoch_and_uid_and_blind_to_the_split() -> None:
    given = pairs()
    whole = drawn_matching(**given)
    assert all(map(torch.equal, whole, drawn_matching(**given)))
    parts = []
    for first in range(0, PAIRS, 512):
        rows = slice(first, first + 512)
        part = {
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        image_of, matched = drawn_matching(**part)
        parts.append(Matching(image_of + first, matched))
    for number, together in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), together)
    later = drawn_matching(**{**given, "epochs": given["epochs"] + 1})
    other_seed = drawn_matching(**{**given, "seed": 4})
    assert not torch.equal(later.matched, whole.matched)
    assert not torch.equal(other_seed.matched, whole.matched)


def test_captions_are_compared_to_their_ends() -> None:
    stream = lay_out(np.array([3, 4, 4]), 1)
    ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
    ids[:11] = torch.tensor([2, 7, 3, 2, 7, 8, 3, 2, 7, 8, 3])
    table = caption_table(stream, ids, 6)
    assert table.tolist() == [
        [2, 7, 3, -1, -1, -1],
        [2, 7, 8, 3, -1, -1],
        [2, 7, 8, 3, -1, -1],
    ]


def test_held_out_pairs_are_matched_alike_in_every_run() -> None:
    uids = np.arange(200) * 7919

    def alike(one: int, other: int) -> bool:
        return one // 2 == other // 2

    image_of, matched = fixed_matching(uids, alike, mismatched=0.5, seed=1)
    again = fixed_matching(uids, alike, mismatched=0.5, seed=1)
    assert np.array_equal(image_of, again[0])
    assert (image_of // 2 != np.arange(200) // 2)[~matched].all()
    assert (image_of[matched] == np.arange(200)[matched]).all()
    assert 70 < matched.sum() < 130
    assert fixed_matching(uids, lambda *_: True, mismatched=0.5, seed=1)[1].all()


def test_held_out_pairs_with_one_caption_are_alike(
    shards: Path, tmp_path: Path
) -> None:
    dataset = Dataset(shards, "train")
    # One word of each caption: many are the same.
    short = config(shards, tmp_path, "--text.max_tokens=3")
    places = dataset.places()
    pairs = read_pairs(dataset, short, places, seed=short.eval.seed)
    alike = _alike(dataset, short, places, dataset.records(places), [])
    texts = [text.tolist() for text in pairs.texts]
    same = [n for n in range(len(places)) if texts[n] == texts[0]]
    assert 1 < len(same) < len(places)
    assert [n for n in range(len(places)) if alike(0, n)] == same


def test_micro_batches_hold_whole_groups_or_the_cure_is_named() -> None:
    sizes = {"global_batch": 48, "world_size": 2}
    assert micro_batch_size(**sizes, ceiling=10, group=4) == 8
    with pytest.raises(ValueError, match=r"model\.itm_group.*fewer ranks$"):
        micro_batch_size(**sizes, ceiling=10, group=16)
    with pytest.raises(ValueError, match=r"raise micro_batch or global_batch$"):
        micro_batch_size(global_batch=48, world_size=1, ceiling=10, group=16)
    assert valid_world_sizes(12, global_batch=24, group=8) == [1, 3]


@pytest.mark.parametrize(
    ("key", "value"), [("itm_weight", -1), ("itm_group", 1), ("itm_mismatched", 1)]
)
def test_itm_keys_that_leave_nothing_to_learn_are_refused(
    key: str, value: float, tmp_path
) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key} "):
        config(tmp_path, tmp_path, f"--model.{key}={value}")
