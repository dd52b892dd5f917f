"""A damaged sample is found, replaced, remembered; the run stays a pure function."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import load_manifest
from tests.conftest import deepspeed_command, launch_environment, python
from tests.pipeline.damage import rewrite_first
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    launch,
    metrics,
    steps_per_epoch,
)
from trainer.contract import complete_checkpoints
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.quarantine import Quarantine, Quarantined, from_plain, to_plain

BEARS = "--damage.max_share=0.9"


def index_of(shards: Path, number: int = 0) -> np.ndarray:
    return np.load(shards / f"train/shard-{number:06d}.index.npy")


def tar_of(shards: Path, number: int = 0) -> Path:
    return shards / f"train/shard-{number:06d}.tar"


def flip(shards: Path, record: np.void, kind: str, number: int = 0) -> int:
    """Flip a bit of a member; the uid of its sample."""
    with tar_of(shards, number).open("r+b") as file:
        offset = int(record[f"{kind}_offset"]) + int(record[f"{kind}_size"]) // 2
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))
    return int(record["uid"])


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def loader(shards: Path, *more: str, rank: int = 0, world: int = 1) -> Loader:
    keys = config(shards, Path("unused"), BEARS, *more)
    return Loader(Dataset(shards, "train"), keys, rank=rank, world_size=world)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def uids_of(reader: Loader, step: int, pool: ThreadPoolExecutor) -> list[int]:
    """Uids of a rank's pairs in a step, in order."""
    batch = reader.load(step, pool)
    parts = [micro.uids.numpy().view(np.uint64) for micro in batch.micro_batches]
    return np.concatenate(parts).tolist()


def expected(reader: Loader, step: int, damaged: set[int]) -> list[int]:
    """What the design says of a step, worked out lane by lane from whole lanes."""
    drawn = reader.order.samples_of(step, reader.lanes)
    found = []
    for number, lane in enumerate(reader.lanes):
        for first in range(reader.order.per_lane):
            row = number * reader.order.per_lane + first
            assert drawn.lanes[row] == lane
            ring = [drawn.places[row][None], *reader.order.following(drawn, row)]
            around = reader.dataset.records(np.concatenate(ring))["uid"].tolist()
            found.append(next(uid for uid in around if uid not in damaged))
    return found


@pytest.mark.parametrize("world", [1, 4, 12])
def test_the_next_sound_sample_of_the_lane_takes_the_place(
    shards: Path, copy: Path, world: int, threads: ThreadPoolExecutor
) -> None:
    records = index_of(copy)
    damaged = {flip(copy, record, "jpg") for record in records[3:9]}
    damaged |= {flip(copy, record, "ids") for record in records[20:24]}
    readers = [loader(copy, rank=rank, world=world) for rank in range(world)]
    steps = range(2 * steps_per_epoch(readers[0].order))
    replaced = 0
    for step in steps:
        for reader in readers:
            batch = reader.load(step, threads)
            replaced += batch.counts.replaced
            assert uids_of(reader, step, threads) == expected(reader, step, damaged)
    sound = loader(shards)
    met = [uid for step in steps for uid in uids_of(sound, step, threads)]
    assert replaced == sum(uid in damaged for uid in met) > len(damaged)
    listed = {int(one.uid, 16) for r in readers for one in r.quarantine.until(10**9)}
    # Those that a stand-in was looked for among are found ahead of their turn.
    assert damaged & set(met) <= listed <= damaged


def test_a_step_is_the_same_whether_or_not_earlier_ones_found_the_damage(
    copy: Path, threads: ThreadPoolExecutor
) -> None:
    for record in index_of(copy)[::5]:
        flip(copy, record, "jpg")
    through = loader(copy)
    batches = list(through.steps(0, 2 * steps_per_epoch(through.order)))
    late = max(batch.step for batch in batches if batch.counts.replaced)
    assert late >= steps_per_epoch(through.order)
    assert loader(copy).load(late, threads).counts == batches[late].counts
    stored = json.dumps(to_plain(through.quarantine.until(late)))
    resumed = Loader(
        through.dataset,
        through.config,
        rank=0,
        world_size=1,
        quarantined=from_plain(json.loads(stored)),
    )
    assert resumed.load(late, threads).counts == batches[late].counts


def test_every_kind_of_damage_is_found_and_named(
    copy: Path, threads: ThreadPoolExecutor
) -> None:
    flipped = flip(copy, index_of(copy, 0)[5], "ids", 0)
    cut = index_of(copy, 1)[-1]
    size = int(cut["jpg_offset"]) + int(cut["jpg_size"]) - 1
    os.truncate(tar_of(copy, 1), size)
    tar_of(copy, 2).unlink()
    reader = loader(copy, "--lanes=1")
    for step in range(steps_per_epoch(reader.order)):
        reader.load(step, threads)
    found = {one.uid: one for one in reader.quarantine.until(10**9)}
    reasons = {one.shard: one.reason for one in found.values()}
    assert reasons["train/shard-000002.tar"] == "missing"
    assert reasons["train/shard-000001.tar"] == "truncated"
    for uid, reason in ((flipped, "crc"), (int(cut["uid"]), "truncated")):
        entry = found.get(f"{uid:016x}")
        # The few samples that an epoch leaves over are not looked at.
        assert entry is None or entry.reason == reason


def test_an_image_that_has_its_bytes_and_does_not_decode_is_replaced(
    copy: Path, threads: ThreadPoolExecutor
) -> None:
    key = rewrite_first(copy, "jpg", lambda data: data[:300] + bytes(len(data) - 300))
    assert key
    reader = loader(copy)
    for step in range(2 * steps_per_epoch(reader.order)):
        reader.load(step, threads)
    (found,) = reader.quarantine.until(10**9)
    assert found.reason == "undecodable"


def test_swapped_shards_are_found_to_the_last_sample(
    copy: Path, threads: ThreadPoolExecutor
) -> None:
    first, second = tar_of(copy, 0), tar_of(copy, 1)
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    swapped = {int(uid) for n in (0, 1) for uid in index_of(copy, n)["uid"]}
    reader = loader(copy, "--lanes=1")
    for step in range(steps_per_epoch(reader.order)):
        assert not swapped & set(uids_of(reader, step, threads))


def test_a_tar_cut_short_while_it_is_read_kills_nothing(
    copy: Path, threads: ThreadPoolExecutor
) -> None:
    """A mapped file would: the kernel sends SIGBUS."""
    reader = loader(copy, "--lanes=1")
    reader.load(0, threads)
    for path in (copy / "train").glob("*.tar"):
        os.truncate(path, path.stat().st_size // 2)
    replaced = [reader.load(step, threads).counts.replaced for step in range(1, 5)]
    assert sum(replaced) > 0
    assert {one.reason for one in reader.quarantine.until(10**9)} == {"truncated"}


def test_more_than_the_run_bears_stops_it_and_names_the_shards(copy: Path) -> None:
    for number in (0, 1):
        for record in index_of(copy, number):
            flip(copy, record, "jpg", number)
    with pytest.raises(ValueError, match=r"damage\.max_share") as caught:
        list(loader(copy, "--damage.max_share=0.4", "--lanes=1").steps(0, 100))
    message = str(caught.value)
    assert "train/shard-000000.tar (" in message
    assert "train/shard-000001.tar (" in message
    assert "pipeline.validate" in message


def test_storage_that_fails_stops_the_run_and_quarantines_nothing(copy: Path) -> None:
    """A folder where a tar should be is missing; one that may not be read is not."""
    reader = loader(copy)
    tar_of(copy).unlink()
    tar_of(copy).symlink_to(tar_of(copy).name)
    with pytest.raises(OSError, match="symbolic links"):
        list(reader.steps(0, steps_per_epoch(reader.order)))
    assert len(reader.quarantine) == 0


@pytest.mark.parametrize("world", [1, 4])
def test_a_lane_without_a_sound_sample_goes_on_with_the_next_lanes(
    copy: Path, world: int, threads: ThreadPoolExecutor
) -> None:
    """Of few shards and many lanes, a lane may lie in a single shard."""
    lost = {int(record["uid"]) for record in index_of(copy)}
    tar_of(copy).unlink()
    readers = [loader(copy, rank=rank, world=world) for rank in range(world)]
    order = readers[0].order
    for step in range(2 * steps_per_epoch(order)):
        for reader in readers:
            assert uids_of(reader, step, threads) == expected(reader, step, lost)
    records = readers[0].dataset.records(readers[0].dataset.places())
    lanes = [order.lanes_of(0, 0).pieces(lane) for lane in range(order.lanes)]
    assert any(set(lane.shard.tolist()) == {0} for lane in lanes)
    assert len(lost) < len(records) / 3


def test_a_source_without_a_sound_sample_stops_the_run_and_names_its_shards(
    mixed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    for shard in load_manifest(copy).shards:
        if shard.source == "flags":
            (copy / shard.name).unlink()
    with pytest.raises(ValueError, match=r"all samples of flags .*missing in .*\.tar"):
        list(loader(copy).steps(0, 100))


@pytest.mark.parametrize("percent", range(100))
def test_a_run_bears_the_share_that_it_was_told_and_no_more(percent: int) -> None:
    damaged = [
        Quarantined(uid=f"{uid:016x}", epoch=0, step=0, reason="crc", shard="a.tar")
        for uid in range(percent + 1)
    ]
    held = Quarantine(100, max_share=percent / 100, entries=damaged[:-1])
    held.check(0)
    held.add(damaged)
    with pytest.raises(ValueError, match=f"more than the {percent} that"):
        held.check(0)


def test_the_earlier_entry_of_a_sample_stays() -> None:
    def entry(step: int, uid: int = 7) -> Quarantined:
        return Quarantined(
            uid=f"{uid:016x}", epoch=0, step=step, reason="crc", shard="train/a.tar"
        )

    held = Quarantine(100, max_share=0.05, entries=[entry(5)])
    held.add([entry(9), entry(3), entry(4, uid=8)])
    assert held.until(4) == [entry(3)]
    assert held.until(5) == [entry(3), entry(4, uid=8)]
    assert (held.holds(7, 2), held.holds(7, 3), held.holds(9, 9)) == (
        False,
        True,
        False,
    )
    held.add([entry(6, uid=uid) for uid in range(10, 14)])
    held.check(5)
    with pytest.raises(ValueError, match="6 of 100 samples"):
        held.check(6)


def test_ranks_that_have_read_ahead_unequally_stop_together(
    copy: Path, tmp_path: Path
) -> None:
    """One rank has met more damage in coming steps than the run bears; the other has
    not, and must not be left waiting.
    """
    reader = loader(copy, "--lanes=12")
    halves = range(6), range(6, 12)
    for step, lanes in ((0, halves[0]), *((step, halves[1]) for step in range(3))):
        shard, sample = reader.order.samples_of(step, lanes).places[0].tolist()
        flip(copy, index_of(copy, shard)[sample], "jpg", shard)
    bears = 3.5 / len(reader.dataset)
    done = subprocess.run(
        deepspeed_command(
            2,
            *TINY,
            f"--data={copy}",
            f"--output={tmp_path / 'run'}",
            f"--damage.max_share={bears}",
        ),
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode != 0
    assert "4 of " in done.stdout
    assert "more than the 3 that damage.max_share bears" in done.stdout


def test_ranks_share_the_list_and_a_resumed_run_of_any_size_goes_on_with_it(
    copy: Path, tmp_path: Path
) -> None:
    """Two ranks, then one: step for step the digest of an undisturbed run."""
    damaged = {flip(copy, record, "jpg") for record in index_of(copy)[::6]}
    common = (f"--data={copy}", "--deepspeed.zero_stage=0", BEARS)

    whole, run = tmp_path / "whole", tmp_path / "run"
    said = launch(2, *common, f"--output={whole}", "--checkpoint.every_steps=5")
    assert "damaged samples replaced; new: " in said
    assert sum(column(whole, "replaced")) >= len(damaged)
    (step, newest) = complete_checkpoints(whole)[-1]
    marker = json.loads((newest / "complete.json").read_text())
    listed = {int(entry["uid"], 16) for entry in marker["quarantine"]}
    assert listed
    assert listed <= damaged
    assert all(entry["step"] < step for entry in marker["quarantine"])

    launch(2, *common, f"--output={run}", "--max_steps=5")
    done = python(
        *("-m", "trainer.pretrain", *TINY, *common, f"--output={run}"),
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    assert "resuming after step 5" in done.stdout
    for name in ("step", "sample_digest", "replaced"):
        assert column(run, name) == column(whole, name)
    assert len(metrics(run)) == 12
