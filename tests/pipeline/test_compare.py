"""Comparisons across a corpus: the verdicts of comparing everything with everything,
however the work is cut, in whatever order and memory it is done, and whoever dies.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare import (
    KINDS,
    SIGNATURE_DTYPE,
    Comparison,
    collect,
    gather,
    match,
    scatter,
    store,
)
from pipeline.storage import Storage, open_storage

# (committed, signatures) of each range.
Corpus = Sequence[tuple[bool, np.ndarray]]
# (range, position) to (kind, range, position) of what it repeats.
Verdicts = dict[tuple[int, int], tuple[str, int, int]]
# Memory that a comparison counts for one record.
RECORD = 240
EVERYTHING: dict[str, Any] = {"splits": True, "exact": True, "caption_repeats": 2}


def run_steps(
    storage: Storage, corpus: Corpus, comparison: Comparison, shuffle: int = 0
) -> None:
    """All steps on a corpus, each step's tasks in a random order."""
    chance = random.Random(shuffle)
    for number in chance.sample(range(len(corpus)), len(corpus)):
        committed, signatures = corpus[number]
        store(storage, "c", number, committed=committed, signatures=signatures)
    for group in chance.sample(range(comparison.groups), comparison.groups):
        scatter(storage, "c", comparison, group)
    for bucket in chance.sample(range(comparison.buckets), comparison.buckets):
        match(storage, "c", comparison, bucket)
    for group in chance.sample(range(comparison.groups), comparison.groups):
        collect(storage, "c", comparison, group)


def gathered(storage: Storage, comparison: Comparison) -> Verdicts:
    found: Verdicts = {}
    for number in range(comparison.ranges):
        verdicts = gather(storage, "c", comparison, number)
        assert np.all(np.diff(verdicts["position"].astype(int)) > 0)
        for position, kind, of_range, of_position in verdicts.tolist():
            found[number, position] = (KINDS[kind], of_range, of_position)
    return found


def compared(corpus: Corpus, comparison: Comparison, shuffle: int = 0) -> Verdicts:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        run_steps(storage, corpus, comparison, shuffle)
        return gathered(storage, comparison)


def everything_with_everything(corpus: Corpus, comparison: Comparison) -> Verdicts:
    """The rules as they are written, one pair of candidates after the other."""
    ordered = sorted(
        (not committed, int(each["split"]), number, int(each["position"]), place)
        for number, (committed, signatures) in enumerate(corpus)
        for place, each in enumerate(signatures)
    )
    verdicts: Verdicts = {}
    for at, (uncommitted, _, number, position, place) in enumerate(ordered):
        mine = corpus[number][1][place]
        matching: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
        for _, _, its_number, its_position, its_place in ordered[:at]:
            its = corpus[its_number][1][its_place]
            for kind in same(mine, its, comparison):
                matching[kind].append((its_number, its_position))
        for kind in KINDS if uncommitted else ():
            most = comparison.caption_repeats if kind == "caption_repetition" else 1
            if most is not None and len(matching[kind]) >= most:
                verdicts[number, position] = (kind, *matching[kind][0])
                break
    return verdicts


def same(mine: np.void, its: np.void, comparison: Comparison) -> Iterator[str]:
    if comparison.identity and mine["uid"] == its["uid"]:
        yield "identity"
    same_source = bytes(mine["sha256"]) == bytes(its["sha256"])
    if comparison.splits and same_source and mine["split"] != its["split"]:
        yield "split"
    if comparison.exact and bytes(mine["pixels"]) == bytes(its["pixels"]):
        yield "exact"
    bits = (int(mine["phash"]) ^ int(its["phash"])).bit_count()
    if comparison.near is not None and bits <= comparison.near:
        yield "near"
    if comparison.caption_repeats is not None and mine["caption"] == its["caption"]:
        yield "caption_repetition"


def random_corpus(seed: int, sizes: Sequence[int], variety: int) -> Corpus:
    """Ranges of which some are committed; the lower `variety`, the more repeats."""
    chance = np.random.default_rng(seed)
    # Values of which many repeat, and hashes in balls around a few centres.
    words = chance.integers(0, 1 << 64, size=variety, dtype=np.uint64)
    centres = np.append(words[: 1 + variety // 8], np.uint64(0))
    corpus = []
    for size in sizes:
        made = np.zeros(size, dtype=SIGNATURE_DTYPE)
        made["position"] = chance.permutation(3 * size)[:size]
        made["uid"] = chance.choice(np.append(words, words + np.uint64(1)), size)
        made["split"] = chance.integers(0, 3, size)
        for name in ("sha256", "pixels"):
            digest = chance.choice(words, size)
            made[name] = np.stack([digest, ~digest], axis=1)
        made["phash"] = chance.choice(centres, size)
        for _ in range(5):
            flipped = np.uint64(1) << chance.integers(0, 64, size, dtype=np.uint64)
            made["phash"] ^= np.where(chance.random(size) < 0.5, flipped, 0)
        made["caption"] = chance.choice(words, size)
        corpus.append((bool(chance.random() < 0.2), made))
    return corpus


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    sizes=st.lists(st.integers(0, 14), min_size=1, max_size=6),
    variety=st.sampled_from([2, 12, 60]),
    records=st.sampled_from([25, 60, 10_000]),
    identity=st.booleans(),
    splits=st.booleans(),
    exact=st.booleans(),
    near=st.sampled_from([None, 0, 1, 3, 6]),
    caption_repeats=st.sampled_from([None, 1, 2, 5]),
)
def test_verdicts_are_those_of_comparing_everything(
    seed: int, sizes: list[int], variety: int, records: int, **rules: Any
) -> None:
    corpus = random_corpus(seed, sizes, variety)
    comparison = Comparison(
        **rules, inputs=3 * sum(sizes), ranges=len(sizes), memory=128 * records
    )
    if comparison.needed:
        expected = everything_with_everything(corpus, comparison)
        assert compared(corpus, comparison, shuffle=seed) == expected


def test_every_kind_is_found_and_memory_does_not_change_what() -> None:
    corpus = random_corpus(1, [40] * 8, variety=200)
    rules = {**EVERYTHING, "near": 3, "inputs": 320, "ranges": 8}
    expected = everything_with_everything(corpus, Comparison(**rules, memory=1))
    assert {kind for kind, *_ in expected.values()} == set(KINDS)
    cuts = set()
    for records in (70, 150, 10_000):
        comparison = Comparison(**rules, memory=RECORD * records)
        cuts.add((comparison.groups, comparison.buckets))
        assert compared(corpus, comparison, shuffle=records) == expected
    assert len(cuts) == 3


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_near_hashes_that_crowd_into_one_bucket_are_all_found(distance: int) -> None:
    """Every hash shares a block with all others, and no window holds them all."""
    chance = np.random.default_rng(distance)
    few_bits = np.uint64(0xFF << 20)
    hashes = chance.integers(0, 1 << 64, size=400, dtype=np.uint64) & few_bits
    ranges = []
    for number in range(10):
        made = np.zeros(40, dtype=SIGNATURE_DTYPE)
        made["position"] = np.arange(40)
        made["phash"] = hashes[40 * number : 40 * (number + 1)]
        ranges.append((False, made))
    comparison = Comparison(
        identity=False, near=distance, inputs=400, ranges=10, memory=RECORD * 60
    )
    assert comparison.groups == 10
    expected = everything_with_everything(ranges, comparison)
    assert len(expected) > 100
    assert compared(ranges, comparison) == expected


def test_the_largest_distance_is_exact_too() -> None:
    corpus = random_corpus(5, [50] * 3, variety=20)
    comparison = Comparison(
        identity=False, near=16, inputs=150, ranges=3, memory=1 << 20
    )
    expected = everything_with_everything(corpus, comparison)
    assert 0 < len(expected) < 150
    assert compared(corpus, comparison) == expected


def test_committed_samples_win_and_get_no_verdict() -> None:
    alike = np.zeros(2, dtype=SIGNATURE_DTYPE)
    alike["position"] = [0, 5]
    alike["split"] = [2, 0]
    comparison = Comparison(**EVERYTHING, inputs=12, ranges=2, memory=1 << 20)
    found = compared([(False, alike), (True, alike)], comparison)
    assert found == {(0, 0): ("identity", 1, 5), (0, 5): ("identity", 1, 5)}


def test_a_held_out_copy_stays_wherever_it_lies() -> None:
    copies = np.zeros(3, dtype=SIGNATURE_DTYPE)
    copies["position"], copies["uid"] = [0, 1, 2], [1, 2, 3]
    copies["split"] = [2, 0, 0]
    comparison = Comparison(splits=True, inputs=3, ranges=1, memory=1 << 20)
    assert compared([(False, copies)], comparison) == {(0, 0): ("split", 0, 1)}


def test_behind_fsspec_the_files_are_the_same(tmp_path: Path) -> None:
    corpus = random_corpus(2, [20] * 3, variety=40)
    comparison = Comparison(
        **EVERYTHING, near=1, inputs=60, ranges=3, memory=RECORD * 30
    )
    storages = open_storage(tmp_path), open_storage(f"memory://{tmp_path.name}")
    for storage in storages:
        run_steps(storage, corpus, comparison)
    local, remote = map(files, storages)
    assert local == remote
    assert gathered(storages[1], comparison)


def test_what_the_order_has_no_room_for_is_refused(tmp_path: Path) -> None:
    made = np.zeros(1, dtype=SIGNATURE_DTYPE)
    made["position"] = 1 << 23
    storage = open_storage(tmp_path)
    with pytest.raises(ValueError, match="at most 8388608 inputs a range"):
        store(storage, "c", 0, committed=False, signatures=made)
    assert storage.names() == []


def test_a_step_before_its_turn_fails_and_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    corpus = random_corpus(3, [5, 5], variety=9)
    comparison = Comparison(inputs=10, ranges=2, memory=1)
    store(storage, "c", 0, committed=False, signatures=corpus[0][1])
    scatter(storage, "c", comparison, 0)
    before = storage.names()
    with pytest.raises(FileNotFoundError):
        scatter(storage, "c", comparison, 1)
    with pytest.raises(FileNotFoundError):
        match(storage, "c", comparison, 0)
    assert storage.names() == before


def test_files_of_another_comparison_are_not_taken_for_its_own(tmp_path: Path) -> None:
    corpus = random_corpus(4, [20] * 3, variety=30)
    storage = open_storage(tmp_path)
    for near, records in ((None, 30), (2, 30), (2, 45)):
        comparison = Comparison(near=near, inputs=60, ranges=3, memory=RECORD * records)
        run_steps(storage, corpus, comparison)
        expected = everything_with_everything(corpus, comparison)
        assert gathered(storage, comparison) == expected


KILLED_CORPUS = (7, [50] * 6, 100)
KILLED = Comparison(**EVERYTHING, near=2, inputs=300, ranges=6, memory=RECORD * 60)


def files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names("c")}


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = open_storage(tmp_path / "undisturbed")
    run_steps(undisturbed, random_corpus(*KILLED_CORPUS), KILLED)
    expected = files(undisturbed)
    assert gathered(undisturbed, KILLED)
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    storage = open_storage(disturbed)
    kills = 0
    # Each attempt is killed as soon as it has come a little further.
    for wanted in range(3, len(expected), 25):
        child = subprocess.Popen([sys.executable, "-m", __name__, str(disturbed)])
        while child.poll() is None and len(storage.names("c")) < wanted:
            time.sleep(0.002)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 2
    run_steps(storage, random_corpus(*KILLED_CORPUS), KILLED)
    assert files(storage) == expected


if __name__ == "__main__":
    run_steps(open_storage(sys.argv[1]), random_corpus(*KILLED_CORPUS), KILLED)
