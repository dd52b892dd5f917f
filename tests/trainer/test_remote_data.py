"""A dataset behind a URL is read as the same dataset on a disk is."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.manifest import INDEX_DTYPE, MANIFEST, load_manifest, words_file
from tests.conftest import python
from tests.pipeline.s3 import S3Server, slow, status
from tests.trainer.cache import on_disk
from tests.trainer.tiny import column, config, launch
from trainer.check import check
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.loader import Loader
from trainer.options import PretrainConfig
from trainer.probes import read_pairs
from trainer.report.data import read_datasets, read_runs
from trainer.storage import StorageConfig
from trainer.validation import _share


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def url(
    server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
) -> str:
    """The shared dataset in a bucket; its cache is below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"{server.bucket(monkeypatch)}/some/shards"
    for path in sorted(shards.rglob("*")):
        if path.is_file():
            server.put(f"{url}/{path.relative_to(shards)}", path.read_bytes())
    server.requests.clear()
    return url


def loader(url: str | Path, *more: str) -> Loader:
    keys = config(url, Path("unused"), *more)
    dataset = Dataset(keys.data, "train", storage=keys.storage)
    return Loader(dataset, keys, rank=0, world_size=1)


def digests(loader: Loader, *steps: int) -> list[str]:
    with ThreadPoolExecutor(2) as threads:
        return [loader.load(step, threads).counts.digest_text for step in steps]


def tars(server: S3Server) -> Counter[str]:
    """How often each tar was asked for."""
    return Counter(
        path.rpartition("/")[2]
        for method, path in server.requests
        if method == "GET" and path.endswith(".tar")
    )


def cached(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "cache").rglob(name)
    return found


def test_two_ranks_read_the_samples_of_a_local_run_and_fetch_once(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    # Held-out shards would be fetched too.
    keys = ("--eval.every_steps", "0")
    launch(2, *keys, "--data", shards, "--output", tmp_path / "local")
    launch(2, *keys, "--data", url, "--output", tmp_path / "remote")
    for name in ("sample_digest", "loss"):
        assert column(tmp_path / "remote", name) == column(tmp_path / "local", name)
    fetched = tars(server)
    assert len(fetched) == len(load_manifest(shards).split("train"))
    assert set(fetched.values()) == {1}
    assert not [*(tmp_path / "cache").rglob("*/parts/*")]
    assert not [*(tmp_path / "cache" / "palimpsest" / "palimpsest-live").iterdir()]
    server.requests.clear()
    # Tools that read a run read its dataset, here from what is in the cache.
    done = python(
        "-m", "trainer.replay", tmp_path / "remote", "--step=3", f"--data={url}"
    )
    assert done.returncode == 0, done.stdout
    done = python("-m", "trainer.evaluate", tmp_path / "remote", "--examples=1")
    assert done.returncode == 0, done.stdout
    (view,) = read_datasets(read_runs([tmp_path / "remote"]), samples=4)
    assert view.path == url
    assert not view.problem
    assert len(view.samples) == 4
    assert tars(server) == {
        Path(shard.name).name: 1 for shard in load_manifest(shards).split("val")
    }


def tight(shards: Path, places: int = 1) -> str:
    """A cache with places for so many shards, and hardly more."""
    manifest = load_manifest(shards)
    largest = max(shard.bytes for shard in manifest.shards)
    samples = max(shard.samples for shard in manifest.shards)
    small = 2 * samples * INDEX_DTYPE.itemsize
    pinned = (words_file(shards / manifest.tokenizer.path), shards / MANIFEST)
    small += sum(path.stat().st_size for path in pinned)
    largest *= places
    return f"--storage.cache_bytes={max(largest + small, largest * 16 // 15) + 999}"


def test_a_cache_too_small_for_the_windows_gives_the_same_samples_within_its_bound(
    url: str, shards: Path, tmp_path: Path
) -> None:
    small = tight(shards)
    readers = [loader(url, small) for _ in range(2)]
    expected = digests(loader(shards), *range(8))
    seen: list[int] = []

    def read_by_turns() -> None:
        for step in range(8):
            for reader in readers:
                assert digests(reader, step) == expected[step : step + 1]
                seen.append(on_disk(tmp_path / "cache" / "palimpsest"))

    with pytest.warns(RuntimeWarning, match="give --storage.cache_bytes"):
        read_by_turns()
    assert 0 < max(seen) <= int(small.rpartition("=")[2])
    for reader in readers:
        assert not len(reader.quarantine)
    spans = [reader.dataset.folders[0].storage.figures()["spans"] for reader in readers]
    assert min(spans) > 0


def test_what_is_read_gives_its_place_back(url: str, shards: Path) -> None:
    assert len(load_manifest(shards).split("train")) > 2
    # Two threads read: one may be in the next shard already.
    small = tight(shards, places=2)
    keys = config(url, Path("unused"), small)
    held = Dataset(url, "train", storage=keys.storage)
    read_pairs(held, keys, held.places(), seed=0, group="group")
    assert held.folders[0].storage.figures()["spans"] == 0
    # And whoever is closed gives back what is open, before garbage is collected.
    for shard in (0, 1):
        held.files(shard)
    held.close()
    reader = loader(url, small, "--shuffle_shards=1", "--lanes=1")
    assert digests(reader, *range(16)) == digests(
        loader(shards, "--shuffle_shards=1", "--lanes=1"), *range(16)
    )
    assert reader.dataset.folders[0].storage.figures()["spans"] == 0


def test_an_index_that_made_room_before_it_was_read_is_fetched_again(
    url: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = loader(url)
    storage = reader.dataset.folders[0].storage
    local, lost = storage.local, []

    def lose(name: str, version: str = "") -> Path:
        path = local(name, version)
        if name.endswith(".index.npy") and lost.count(name) < 2:
            lost.append(name)
            path.unlink()
        return path

    monkeypatch.setattr(storage, "local", lose)
    assert digests(reader, *range(2)) == digests(loader(shards), *range(2))
    assert lost


def test_a_damaged_copy_that_has_no_place_for_another_is_not_taken_for_damage(
    url: str, shards: Path, tmp_path: Path
) -> None:
    small = tight(shards)
    expected = digests(loader(shards), *range(8))
    first, holder, reader = (loader(url, small) for _ in range(3))
    with pytest.warns(RuntimeWarning, match="give --storage.cache_bytes"):
        assert digests(first, *range(8)) == expected
    del first
    (path,) = (tmp_path / "cache").rglob("*.tar")
    path.write_bytes(bytes(path.stat().st_size))
    # Another rank has it open: it can be neither replaced nor driven out.
    (shard,) = (
        number
        for number, one in holder.dataset.numbered()
        if Path(one.name).name == path.name
    )
    held, _ = holder.dataset.files(shard)
    with pytest.warns(RuntimeWarning, match="give --storage.cache_bytes"):
        assert digests(reader, *range(8)) == expected
    assert not len(reader.quarantine)
    assert path.samefile(f"/proc/self/fd/{held.fileno()}")


def test_a_cache_that_holds_no_shard_is_refused_before_anything_is_written(
    url: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = config(url, run, f"--storage.cache={tmp_path / 'c'}")
    check(keys)
    tight = config(url, run, "--storage.cache_bytes=20000")
    with pytest.raises(ValueError, match=r"give --storage\.cache_bytes"):
        check(tight)
    assert not run.exists()


def test_what_was_damaged_on_its_way_is_fetched_again(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    expected = digests(loader(shards), *range(8))
    assert digests(loader(url), *range(8)) == expected
    for suffix in ("tar", "index.npy"):
        path = cached(tmp_path, f"shard-000000.{suffix}")
        path.write_bytes(bytes(path.stat().st_size))
    server.requests.clear()
    again = loader(url)
    assert digests(again, *range(8)) == expected
    assert not len(again.quarantine)
    assert tars(server) == {"shard-000000.tar": 1}


def test_what_is_damaged_in_storage_is_replaced_as_on_a_disk(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    index = np.load(shards / "train/shard-000000.index.npy")
    data = bytearray((shards / "train/shard-000000.tar").read_bytes())
    for record in index[:3]:
        data[int(record["jpg_offset"]) + 20] ^= 1
    server.put(f"{url}/train/shard-000000.tar", bytes(data))
    damaged = loader(url, "--damage.max_share=0.9")
    found = digests(damaged, *range(8))
    assert {entry.uid for entry in damaged.quarantine.until(8)} == {
        f"{uid:016x}" for uid in index["uid"][:3].tolist()
    }
    # Once as it is needed, and once more to be sure.
    assert tars(server)["shard-000000.tar"] == 2
    assert found != digests(loader(shards), *range(8))
    other = loader(url, "--damage.max_share=0.9")
    assert digests(other, *range(8)) == found


def test_a_dataset_made_anew_under_the_same_url_is_fetched_anew(
    server: S3Server, url: str, shards: Path, mixed: Path
) -> None:
    digests(loader(url), 0)
    for path in sorted(mixed.rglob("*")):
        if path.is_file():
            server.put(f"{url}/{path.relative_to(mixed)}", path.read_bytes())
    assert digests(loader(url), *range(4)) == digests(loader(mixed), *range(4))


def test_storage_that_is_down_stops_the_run_and_quarantines_nothing(
    server: S3Server, url: str
) -> None:
    stopped = loader(url, "--storage.tries=2")
    server.inject(
        itertools.repeat(status(503)), lambda method, path: path.endswith(".tar")
    )
    with pytest.raises(OSError, match="storage failed 2 times"):
        digests(stopped, 0)
    assert not len(stopped.quarantine)


def test_the_first_batch_does_not_wait_for_storage_that_hangs_for_one_request(
    server: S3Server, url: str, shards: Path
) -> None:
    server.inject(
        itertools.chain([slow(600)], itertools.repeat(None)),
        lambda method, path: method == "GET" and path.endswith(".tar"),
    )
    assert digests(loader(url, "--storage.timeout_s=4"), 0) == digests(
        loader(shards), 0
    )


def read_alone(dataset: Dataset, keys: PretrainConfig) -> None:
    read_pairs(dataset, keys, dataset.places(), seed=0)


def read_as_held_out(dataset: Dataset, keys: PretrainConfig) -> None:
    world = World(rank=0, size=1, device=torch.device("cpu"))
    training = Loader(dataset, keys, rank=0, world_size=1)
    _share(dataset, training, world, left_out=(), damage=[])


@pytest.mark.parametrize("read", [read_alone, read_as_held_out])
def test_indexes_of_held_out_pairs_are_fetched_beside_one_another(
    server: S3Server, url: str, read: Callable[[Dataset, PretrainConfig], None]
) -> None:
    """While that of the first shard, which is read first, never comes, nor any tar."""
    keys = config(url, Path("unused"), "--storage.timeout_s=900", "--storage.hedge=0")
    dataset = Dataset(url, "train", storage=keys.storage)
    first, *others = [f"/some/shards/{entry.index}" for _, entry in dataset.numbered()]
    assert others
    server.inject(
        itertools.repeat(slow(900)), lambda _, path: path.endswith((first, ".tar"))
    )
    with ThreadPoolExecutor(1) as alone:
        reading = alone.submit(read, dataset, keys)
        try:
            deadline = time.monotonic() + 60
            asked: set[str] = set()
            while len(asked) < len(others):
                assert time.monotonic() < deadline, f"of {others} only {asked}"
                time.sleep(0.02)
                asked = {
                    index
                    for _, path in list(server.requests)
                    for index in others
                    if path.endswith(index)
                }
            assert not reading.done()
        finally:
            dataset.close()
        with pytest.raises(OSError, match="closed"):
            reading.result()


def test_shards_out_of_the_windows_are_not_held_open(url: str) -> None:
    reader = loader(url, "--shuffle_shards=1")
    digests(reader, *range(8))
    (folder,) = reader.dataset.folders
    wanted = reader.order.shards_ahead(7, reader.lanes, windows=2)
    assert set(folder._tars._items) <= set(wanted)


def test_foreign_tars_are_refused_wherever_a_dataset_is_opened(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    remote, local = f"{url}-foreign", tmp_path / "local"
    server.put(f"{remote}/00000.tar", b"x")
    local.mkdir()
    (local / "00000.tar").write_bytes(b"x")
    for root in (remote, local):
        with pytest.raises(ValueError, match=f"pipeline.index {root} --tokenizer"):
            Dataset(root, "train", storage=StorageConfig())
