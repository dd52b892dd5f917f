"""Files behind a URL: fetched once for all processes of a node, whatever fails."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline.manifest import MANIFEST, MANIFEST_SHA256, load_manifest, manifest_seal
from tests.conftest import ROOT
from tests.pipeline.s3 import DROP, TRUNCATE, Fault, S3Server, slow, status
from tests.trainer.cache import on_disk
from trainer.fetch import Remote
from trainer.storage import (
    Files,
    LocalFiles,
    NoRoomError,
    StorageConfig,
    Wanted,
    open_files,
    read_manifest,
)

pytestmark = pytest.mark.alone

NAMES = [f"train/shard-{number:06d}.tar" for number in range(6)]
SIZE = 100_000
LIVE = "palimpsest-live"
VERSION = "0123456789abcdef" * 4
# A process of its own that reads files of a dataset and says what it found.
READER = """
import hashlib, sys
from trainer.storage import StorageConfig, open_files
url, cache, how, *names = sys.argv[1:]
files = open_files(url, StorageConfig(cache=cache, tries=3, timeout_s=60))
print("ready", flush=True)
sys.stdin.readline()
if how == "ahead":
    from trainer.storage import Wanted
    files.ahead([Wanted(name) for name in names])
for name in names:
    with files.open(name) as file:
        print(hashlib.sha256(file.read()).hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return server.bucket(monkeypatch)


@pytest.fixture
def content(server: S3Server, bucket: str) -> dict[str, bytes]:
    """Files of a dataset at `bucket`/d: the bytes by name."""
    content = {name: os.urandom(SIZE) for name in NAMES}
    for name, data in content.items():
        server.put(f"{bucket}/d/{name}", data)
    server.requests.clear()
    return content


def bound(shards: int) -> int:
    """Of a cache with room for so many shards beside small files."""
    return shards * SIZE * 16 // 15 + 99


def config(tmp_path: Path, **keys: object) -> StorageConfig:
    return StorageConfig(cache=str(tmp_path / "cache"), **keys)  # type: ignore[arg-type]


def gets(server: S3Server) -> list[str]:
    """Paths of all GETs of objects, in the order in which they came."""
    return [path for method, path in server.requests if method == "GET"]


@pytest.fixture
def looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever found no room for a shard looks for it each time."""
    monkeypatch.setattr("trainer.cached_files._FULL_S", 0.0)


def streamed(*names: str) -> list[Wanted]:
    """Shards that will be read."""
    return [Wanted(name, size=SIZE, streamed=True) for name in names]


def only_gets(method: str, path: str) -> bool:
    return method == "GET"


def whole(cache: Path) -> set[str]:
    """Names of the files of datasets in a cache."""
    return {
        path.name
        for path in cache.rglob("*")
        if path.is_file() and path.name.endswith(".tar")
    }


def litter(cache: Path) -> list[Path]:
    """What should be gone once no process runs."""
    return [
        *cache.glob("*/parts/*"),
        *(cache / LIVE).glob("*"),
        *cache.rglob("*.tmp"),
    ]


def read(files: Files, name: str) -> bytes:
    with files.open(name) as file:
        return file.read()


def start(
    url: str, tmp_path: Path, how: str, *names: str, code: str = READER
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, url, str(tmp_path / "cache"), how, *names],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_local_folder_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"here")
    for root in (tmp_path, f"file://{tmp_path}"):
        files = open_files(root, StorageConfig())
        assert isinstance(files, LocalFiles)
        assert files.local("a") == files.refresh("a") == tmp_path / "a"
        assert read(files, "a") == b"here"
        files.ahead([Wanted("a")])
        files.check(1 << 60, beside=1 << 60)
        assert files.span("a", 1, 9) == b"ere"
        assert files.waited == 0
        assert not files.figures()


def test_files_behind_a_url_are_read_and_then_local(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d/", config(tmp_path))
    for name in NAMES:
        assert read(files, name) == content[name]
        assert files.local(name).read_bytes() == content[name]
    assert len(gets(server)) == len(NAMES)
    assert files.figures()["bytes"] == len(NAMES) * SIZE
    assert files.waited > 0
    again = open_files(f"{bucket}/d", config(tmp_path))
    assert read(again, NAMES[0]) == content[NAMES[0]]
    assert len(gets(server)) == len(NAMES)
    notes = [path.read_text() for path in (tmp_path / "cache").glob("*/URL")]
    assert notes == [f"{bucket}/d\n"]


def test_any_file_system_that_fsspec_knows_will_do(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/d/train/a.tar", b"x" * 100)
    memory.pipe("/d/empty", b"")
    files = open_files("memory://d", config(tmp_path))
    assert read(files, "train/a.tar") == b"x" * 100
    assert read(files, "empty") == b""
    with pytest.raises(FileNotFoundError, match=r"no such file.*memory://d/train/b"):
        files.local("train/b.tar")


def test_large_files_come_in_ranges(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    data = os.urandom((20 << 20) + 7)
    server.put(f"{bucket}/d/big", data)
    server.requests.clear()
    assert read(open_files(f"{bucket}/d", config(tmp_path)), "big") == data
    assert len(gets(server)) == 3


def test_two_processes_fetch_each_file_once(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.inject(itertools.repeat(slow(0.2)), only_gets)
    names = NAMES[:4]
    both = [start(f"{bucket}/d", tmp_path, how, *names) for how in ("ahead", "at once")]
    outputs = [process.communicate("go\n", timeout=120)[0] for process in both]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == len(names)
    assert len(gets(server)) == len(set(gets(server))) == len(names)
    assert not litter(tmp_path / "cache")


def test_another_version_of_a_file_is_not_taken_for_it(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path))
    assert files.local(NAMES[0], VERSION).read_bytes() == content[NAMES[0]]
    server.put(f"{bucket}/d/{NAMES[0]}", b"made again")
    assert files.local(NAMES[0], VERSION).read_bytes() == content[NAMES[0]]
    assert files.local(NAMES[0], VERSION[::-1]).read_bytes() == b"made again"


def test_a_refreshed_file_is_the_one_that_is_there_now(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path))
    for text in (b"one", b"second", b""):
        server.put(f"{bucket}/d/m", text)
        assert files.refresh("m").read_bytes() == text
        assert read(files, "m") == text


def test_a_hint_fetches_in_the_background(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path))
    files.ahead([Wanted("train/none.tar"), *(Wanted(name) for name in NAMES)])
    wait_for(lambda: whole(tmp_path / "cache") == {Path(n).name for n in NAMES})
    server.requests.clear()
    assert [read(files, name) for name in NAMES] == list(content.values())
    assert not server.requests
    assert files.waited == 0


def test_a_kill_in_mid_fetch_leaves_nothing_that_hurts(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.inject(itertools.repeat(slow(60)), only_gets)
    process = start(f"{bucket}/d", tmp_path, "ahead", *NAMES)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    wait_for(lambda: bool(gets(server)))
    assert litter(tmp_path / "cache")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.inject(())
    files = open_files(f"{bucket}/d", config(tmp_path))
    assert [path.name for path in litter(tmp_path / "cache")] == [
        path.name for path in (tmp_path / "cache" / LIVE).glob("*")
    ]
    assert [read(files, name) for name in NAMES] == list(content.values())
    files.close()
    del files
    assert not litter(tmp_path / "cache")


@pytest.mark.parametrize("name", [NAMES[0], NAMES[1]], ids=["same", "other"])
def test_a_fetch_whose_process_dies_is_taken_over_or_makes_room(
    server: S3Server,
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    name: str,
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    server.inject(itertools.repeat(slow(60)), only_gets)
    process = start(f"{bucket}/d", tmp_path, "at once", NAMES[0])
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    wait_for(lambda: bool(gets(server)))
    server.inject(())
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(read(files, name)))
    reader.start()
    time.sleep(0.2)
    assert not found
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reader.join(60)
    assert found == [content[name]]
    assert files.waited > 0.1


def test_the_longest_unused_makes_room_and_what_is_open_stays(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(3)))
    for name in NAMES[:3]:
        files.local(name)
    # The first is used, so the second is the longest unused, then the third.
    opened = files.open(NAMES[0])
    for name in NAMES[3:]:
        files.local(name)
        assert on_disk(cache) <= bound(3)
    kept = {Path(NAMES[number]).name for number in (0, 4, 5)}
    assert whole(cache) == kept
    assert files.figures()["evictions"] == 3
    assert opened.read() == content[NAMES[0]]
    opened.close()
    assert read(files, NAMES[1]) == content[NAMES[1]]
    assert Path(NAMES[0]).name not in whole(cache)


def test_the_bytes_on_the_disk_stay_within_the_bound_whoever_reads(
    server: S3Server,
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    looks_again: None,
) -> None:
    cache, small = tmp_path / "cache", b"an index"
    server.put(f"{bucket}/d/index", small)
    keys = config(tmp_path, cache_bytes=bound(3))
    mine, other = (open_files(f"{bucket}/d", keys) for _ in range(2))
    opened = [mine.open(name) for name in NAMES[:2]]
    other.ahead(streamed(*NAMES[2:5]))
    held = other.open(NAMES[2])
    for files in (mine, other):
        with pytest.raises(NoRoomError):
            files.open(NAMES[3])
        # Parts of it, from storage; and small files have a place.
        assert files.span(NAMES[3], 7, 1000) == content[NAMES[3]][7:1007]
        assert files.span(NAMES[3], SIZE - 5, 1000) == content[NAMES[3]][-5:]
        assert files.span(NAMES[3], SIZE, 1000) == b""
        assert files.local("index").read_bytes() == small
        assert on_disk(cache) <= bound(3)
    for file, name in zip([*opened, held], NAMES, strict=False):
        assert file.read() == content[name]
    opened.pop().close()
    assert read(other, NAMES[3]) == content[NAMES[3]]
    assert on_disk(cache) <= bound(3)
    assert mine.figures()["spans"] == other.figures()["spans"] == 2


def test_a_file_replaced_while_it_is_open_counts_until_it_is_closed(
    server: S3Server,
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    looks_again: None,
) -> None:
    cache = tmp_path / "cache"
    keys = config(tmp_path, cache_bytes=bound(3))
    mine, other = (open_files(f"{bucket}/d", keys) for _ in range(2))
    held = mine.open(NAMES[0])
    server.put(f"{bucket}/d/{NAMES[0]}", content[NAMES[1]])
    path = other.refresh(NAMES[0], streamed=True)
    assert path.read_bytes() == content[NAMES[1]]
    assert on_disk(cache) == 2 * SIZE + len(f"{other.root}\n")
    opened = other.open(NAMES[2])
    with pytest.raises(NoRoomError):
        other.open(NAMES[3])
    assert on_disk(cache) <= bound(3)
    assert held.read() == content[NAMES[0]]
    held.close()
    assert read(other, NAMES[3]) == content[NAMES[3]]
    opened.close()


def test_runs_with_different_bounds_share_the_larger(
    server: S3Server,
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    looks_again: None,
) -> None:
    server.put(f"{bucket}/d/index", b"an index")
    large = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(4)))
    large.ahead(streamed(*NAMES[:3]))
    opened = [large.open(name) for name in NAMES[:3]]
    small = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    assert read(small, NAMES[3]) == content[NAMES[3]]
    assert on_disk(tmp_path / "cache") <= bound(4)
    for file in opened:
        file.close()
    opened = [small.open(name) for name in NAMES[:3]]
    large.close()
    # Again its own bound holds; nothing small waits for what is open beyond it.
    assert small.local("index").read_bytes() == b"an index"
    with pytest.raises(NoRoomError):
        small.open(NAMES[4])
    for file in opened:
        file.close()
    assert read(small, NAMES[4]) == content[NAMES[4]]
    assert on_disk(tmp_path / "cache") <= bound(1)


def test_a_small_file_waits_for_room_and_not_for_ever(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    keys = config(tmp_path, cache_bytes=bound(1), timeout_s=0.3)
    files = open_files(f"{bucket}/d", keys)
    with files.open(NAMES[0]), pytest.raises(OSError, match="full of shards that are"):
        files.local(NAMES[1])
    assert files.local(NAMES[1]).read_bytes() == content[NAMES[1]]


def test_whoever_streams_does_not_wait_for_a_fetch_that_hangs(
    server: S3Server,
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.cached_files._ROOM_S", 0.2)
    keys = config(tmp_path, cache_bytes=bound(1), parallel=1)
    files = open_files(f"{bucket}/d", keys)
    hanging = Path(NAMES[0]).name
    server.inject(
        itertools.repeat(slow(60)),
        lambda method, path: method == "GET" and path.endswith(hanging),
    )
    files.ahead(streamed(NAMES[0]))
    wait_for(lambda: bool(gets(server)))
    with pytest.raises(NoRoomError):
        files.open(NAMES[1])
    # The one slot for ranges of whole files is taken.
    assert files.span(NAMES[1], 0, SIZE) == content[NAMES[1]]
    files.close()


def test_where_all_fits_nothing_is_said(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.put(f"{bucket}/d/index", b"an index")
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.ahead([Wanted("index"), *streamed(*NAMES)])
        opened = [files.open(name) for name in NAMES]
        files.local("index")
    assert files.figures()["evictions"] == files.figures()["spans"] == 0
    for file in opened:
        file.close()


def test_a_cache_may_hold_more_files_than_a_process_may_open(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    left = files.local(NAMES[0]).parent
    for number in range(200):
        (left / f"{number}.tar").write_bytes(bytes(SIZE // 200))
    code = READER.replace("cache=cache,", f"cache=cache, cache_bytes={bound(1)},")
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    process = start(f"{bucket}/d", tmp_path, "at once", NAMES[1], code=few + code)
    said, _ = process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert said.strip() == hashlib.sha256(content[NAMES[1]]).hexdigest()
    assert on_disk(cache) <= bound(1)


def test_what_a_process_that_was_killed_had_open_makes_room(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    hold = READER.replace("cache=cache,", f"cache=cache, cache_bytes={bound(1)},")
    hold = hold.replace(
        "file.read()).hexdigest(), flush=True)",
        "b'').hexdigest(), flush=True); sys.stdin.readline()",
    )
    process = start(f"{bucket}/d", tmp_path, "open", NAMES[0], code=hold)
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    with pytest.raises(NoRoomError):
        files.open(NAMES[1])
    files.ahead([Wanted(NAMES[1], streamed=True)])
    process.kill()
    process.communicate()
    assert read(files, NAMES[1]) == content[NAMES[1]]


def test_what_a_live_process_will_read_is_not_evicted(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    keys = config(tmp_path, cache_bytes=bound(3))
    other = open_files(f"{bucket}/d", keys)
    other.ahead([Wanted(name, size=SIZE) for name in NAMES[:2]])
    wait_for(lambda: len(whole(tmp_path / "cache")) == 2)
    files = open_files(f"{bucket}/d", keys)
    for name in NAMES[2:]:
        assert read(files, name) == content[name]
    server.requests.clear()
    assert read(other, NAMES[0]) == content[NAMES[0]]
    assert read(other, NAMES[1]) == content[NAMES[1]]
    assert not server.requests
    # What a process that is no more wanted is of no account.
    other.ahead([])
    del other
    for name in NAMES[2:]:
        files.local(name)
    assert {Path(name).name for name in NAMES[3:]} == whole(tmp_path / "cache")


def test_a_disk_that_others_fill_drives_out_nothing_that_is_needed(
    bucket: str,
    content: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if the disk had room for nothing more.
    monkeypatch.setattr("trainer.shard_cache._DISK_LEFT_BYTES", 1 << 60)
    files = open_files(f"{bucket}/d", config(tmp_path))
    files.pin(NAMES[0])
    files.local(NAMES[5])
    files.ahead([Wanted(name, size=SIZE) for name in NAMES[1:4]])
    for name in NAMES[1:4]:
        files.local(name)
    # Of what nobody needs nothing stays.
    kept = {Path(name).name for name in NAMES[:4]}
    assert whole(tmp_path / "cache") == kept


def test_what_is_pinned_goes_only_where_the_bound_asks_for_it(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(2)))
    files.pin(NAMES[0])
    for name in NAMES[1:4]:
        files.local(name)
    first, last = Path(NAMES[0]).name, Path(NAMES[3]).name
    assert whole(tmp_path / "cache") == {first, last}
    # A bound that holds but one file would otherwise wait for ever.
    smaller = open_files(f"{bucket}/d", config(tmp_path / "s", cache_bytes=bound(1)))
    smaller.pin(NAMES[0])
    smaller.local(NAMES[4])
    assert whole(tmp_path / "s" / "cache") == {Path(NAMES[4]).name}
    # What is streamed goes without a place before that.
    smaller.pin(NAMES[0])
    with pytest.raises(NoRoomError):
        smaller.open(NAMES[4])
    assert whole(tmp_path / "s" / "cache") == {first}


def test_a_cache_too_small_for_all_readers_goes_on_and_says_what_would_do(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    keys = config(tmp_path, cache_bytes=bound(1))
    both = [open_files(f"{bucket}/d", keys) for _ in range(2)]
    found: list[bool] = []

    def read_somehow(files: Files, name: str) -> bytes:
        try:
            return read(files, name)
        except NoRoomError:
            return files.span(name, 0, SIZE)

    def read_all(files: Files) -> None:
        files.ahead(streamed(*NAMES))
        found.extend(read_somehow(files, name) == content[name] for name in NAMES)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        readers = [threading.Thread(target=read_all, args=[files]) for files in both]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(120)
    assert found == [True] * 2 * len(NAMES)
    said = {str(warning.message) for warning in told}
    assert len(said) == 1
    enough = -(-len(NAMES) * SIZE * 16 // 15)
    assert f"--storage.cache_bytes {enough} or more" in said.pop()
    assert len(told) <= len(both)


def test_a_cache_smaller_than_a_file_is_an_error(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=SIZE - 1))
    shard, most = -(-SIZE * 16 // 15), SIZE + SIZE // 2
    for attempt, least in (
        (lambda: files.local(NAMES[0]), SIZE),
        (lambda: files.open(NAMES[0]), shard),
        (lambda: files.check(SIZE, beside=0), shard),
        (lambda: files.check(SIZE, beside=SIZE // 2), most),
    ):
        with pytest.raises(ValueError, match=f"give --storage.cache_bytes {least} or"):
            attempt()
    assert not list((tmp_path / "cache").glob("*/parts/*"))


def remote(bucket: str, **keys: float) -> Remote:
    """Ranges of 10,000 bytes, ten of a shard."""
    given = {"parallel": 4, "timeout_s": 30, "tries": 4, "hedge": 3, **keys}
    return Remote(f"{bucket}/d", range_bytes=10_000, **given)  # type: ignore[arg-type]


def fetched(remote: Remote, name: str) -> bytes:
    """A file as its ranges make it."""
    info = remote.info(name)
    data = bytearray(info["size"])
    for offset, part in remote.ranges(name, info):
        data[offset : offset + len(part)] = part
    return bytes(data)


def test_a_slow_range_is_asked_for_twice_and_the_first_answer_taken(
    server: S3Server, bucket: str, content: dict[str, bytes]
) -> None:
    source = remote(bucket)
    assert fetched(source, NAMES[0]) == content[NAMES[0]]
    assert source.figures["hedges"] == 0
    server.requests.clear()
    # Without the second request this would take longer than a test may.
    server.inject([None, slow(600), None, slow(600)], only_gets)
    source = remote(bucket, timeout_s=2000)
    source._seconds[(10_000).bit_length()].extend([0.01] * 8)
    assert fetched(source, NAMES[1]) == content[NAMES[1]]
    assert source.figures["hedges"] >= 2
    assert source.figures["retries"] == 0
    assert len(gets(server)) == source.figures["requests"]
    assert source.figures["requests"] == 10 + source.figures["hedges"]


def test_where_all_is_slow_there_are_few_second_requests(
    server: S3Server, bucket: str, content: dict[str, bytes]
) -> None:
    source = remote(bucket, hedge=1.1, parallel=10)
    source._seconds[(10_000).bit_length()].extend([0.01] * 64)
    server.inject(itertools.repeat(slow(0.5)), only_gets)
    for name in NAMES:
        assert fetched(source, name) == content[name]
    assert 0 < source.figures["hedges"] <= 4 + 0.1 * source.figures["requests"] + 1


@pytest.mark.parametrize("fault", [DROP, TRUNCATE, status(500), status(503)])
def test_a_failed_range_is_read_again_and_only_that(
    server: S3Server, bucket: str, content: dict[str, bytes], fault: Fault
) -> None:
    # One after the other: the last fault meets who asks again after the one before.
    source = remote(bucket, hedge=0, parallel=1)
    server.inject([None, fault, None, fault, fault], only_gets)
    assert fetched(source, NAMES[0]) == content[NAMES[0]]
    # The HTTP client itself asks again where an old connection was closed.
    assert 1 <= source.figures["retries"] <= 3
    assert len(gets(server)) == 13


def test_storage_that_is_down_is_an_error_after_so_many_tries(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.inject(itertools.repeat(status(500)), only_gets)
    files = open_files(f"{bucket}/d", config(tmp_path, tries=3))
    with pytest.raises(OSError, match=r"storage failed 3 times.*storage\.tries") as e:
        files.local(NAMES[0])
    assert f"{bucket}/d/{NAMES[0]}" in str(e.value)
    assert len(gets(server)) == 3
    assert not list((tmp_path / "cache").glob("*/parts/*"))
    server.inject(())
    assert read(files, NAMES[0]) == content[NAMES[0]]


def test_a_server_that_hangs_is_given_up(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.inject(itertools.repeat(slow(600)))
    files = open_files(f"{bucket}/d", config(tmp_path, tries=2, timeout_s=0.3))
    with pytest.raises(OSError, match=r"no answer in 0\.3 s"):
        files.local(NAMES[0])


def test_a_file_system_that_hangs_holds_up_neither_a_read_nor_the_exit() -> None:
    code = """
import sys, tempfile, time
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
class Hangs(MemoryFileSystem):
    def cat_file(self, *given, **named):
        time.sleep(600)
fsspec.register_implementation("memory", Hangs, clobber=True)
fsspec.filesystem("memory").pipe("/d/a", b"x" * 100)
from trainer.storage import StorageConfig, Wanted, open_files
with tempfile.TemporaryDirectory() as cache:
    keys = StorageConfig(cache=cache, tries=2, timeout_s=0.2)
    files = open_files("memory://d", keys)
    try:
        files.local("a")
    except OSError as error:
        print(error)
    other = open_files("memory://d", StorageConfig(cache=cache))
    other.ahead([Wanted("a")])
    time.sleep(0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "storage failed 2 times, last with: no answer in 0.2 s" in done.stdout
    assert done.stderr == ""


def test_closing_ends_whoever_waits(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    server.inject(itertools.repeat(slow(600)), only_gets)
    files = open_files(f"{bucket}/d", config(tmp_path, timeout_s=600))
    errors: list[OSError] = []

    def wait(name: str) -> None:
        with pytest.raises(OSError, match="closed while it was read") as caught:
            files.local(name)
        errors.append(caught.value)

    # Of two that wait for the same file, one waits for the other.
    waiting = [threading.Thread(target=wait, args=[NAMES[0]]) for _ in range(2)]
    for one in waiting:
        one.start()
    wait_for(lambda: bool(gets(server)))
    files.close()
    for one in waiting:
        one.join(30)
    assert len(errors) == 2


def test_a_file_replaced_while_it_is_read_is_read_again(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    for after in (b"short", os.urandom(2 * SIZE), os.urandom(SIZE)):
        server.inject([slow(0.5)], only_gets)
        server.requests.clear()
        files = open_files(f"{bucket}/d", config(tmp_path))
        found: list[bytes] = []
        reader = threading.Thread(
            target=lambda into=found, of=files: into.append(
                of.refresh(NAMES[0]).read_bytes()
            )
        )
        reader.start()
        wait_for(lambda: bool(gets(server)))
        server.put(f"{bucket}/d/{NAMES[0]}", after)
        reader.join(60)
        assert found == [after]


def test_refused_access_and_missing_things_are_told_apart(
    server: S3Server, bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    files = open_files(f"{bucket}/d", config(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no such file.*{bucket}/d/none"):
        files.open("none")
    server.inject(itertools.repeat(status(403)))
    with pytest.raises(PermissionError, match="check the credentials"):
        files.open(NAMES[0])
    server.inject(())
    elsewhere = open_files("s3://no-such-bucket-anywhere/d", config(tmp_path))
    with pytest.raises(ValueError, match="there is no such bucket"):
        elsewhere.local("a")
    with pytest.raises(ValueError, match=r"no-such-scheme://x: .*give a path, s3://"):
        open_files("no-such-scheme://x", config(tmp_path))


def test_importing_needs_no_fsspec_and_its_absence_names_the_cure() -> None:
    code = """
import sys
sys.modules["s3fs"] = None
from trainer.storage import StorageConfig, open_files
assert "fsspec" not in sys.modules and "asyncio" not in sys.modules
try:
    open_files("s3://bucket/d", StorageConfig(cache="/nowhere"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "`pip install s3fs`" in done.stdout


def test_no_password_is_shown_or_written_down(tmp_path: Path) -> None:
    files = open_files("http://me:secret@127.0.0.1:9/d", config(tmp_path))
    assert files.root == "http://127.0.0.1:9/d"
    assert [path.read_text() for path in (tmp_path / "cache").glob("*/URL")] == [
        "http://127.0.0.1:9/d\n"
    ]


class Web(SimpleHTTPRequestHandler):
    """A web server that answers no ranges."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL on a web server."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Web, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_web_server_without_ranges_will_do(
    web: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = web
    data = os.urandom((9 << 20) + 1)
    (folder / "a").write_bytes(data)
    files = open_files(url, config(tmp_path, tries=2))
    assert read(files, "a") == data
    assert files.figures()["requests"] == 1
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.local("b")


def test_without_ranges_and_without_room_the_cure_is_a_larger_cache(
    web: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = web
    for name in "ab":
        (folder / name).write_bytes(os.urandom(SIZE))
    files = open_files(url, config(tmp_path, cache_bytes=bound(1)))
    with files.open("a"):
        with pytest.raises(NoRoomError):
            files.open("b")
        with pytest.raises(OSError, match="give more as --storage"):
            files.span("b", 0, 9)


def test_a_web_server_that_is_down_is_no_missing_file(tmp_path: Path) -> None:
    files = open_files("http://127.0.0.1:9/d", config(tmp_path, tries=2))
    with pytest.raises(OSError, match="storage failed 2 times"):
        files.local("a")


def test_the_manifest_is_read_while_it_is_replaced(
    shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    old, seal = ((shards / name).read_bytes() for name in (MANIFEST, MANIFEST_SHA256))
    new = old.replace(b'"complete": true', b'"complete": false')
    (copy / MANIFEST).write_bytes(new)
    (copy / MANIFEST_SHA256).write_bytes(seal)
    files = open_files(copy, StorageConfig())
    with pytest.raises(ValueError, match="does not match"):
        read_manifest(files)
    finish = threading.Timer(
        0.3, (copy / MANIFEST_SHA256).write_text, [manifest_seal(new)]
    )
    finish.start()
    assert not read_manifest(files)[0].complete
    finish.join()


def test_a_manifest_behind_a_url_is_the_one_that_is_there_now(
    web: tuple[Path, str], shards: Path, tmp_path: Path
) -> None:
    folder, url = web
    files = open_files(url, config(tmp_path, tries=2))
    for name in (MANIFEST, MANIFEST_SHA256):
        shutil.copy(shards / name, folder)
    assert read_manifest(files)[0] == load_manifest(shards)
    (folder / MANIFEST_SHA256).write_text("damage")
    with pytest.raises(ValueError, match=rf"^{url}/{MANIFEST} does not match"):
        read_manifest(files)
    (folder / MANIFEST_SHA256).unlink()
    with pytest.raises(ValueError, match=f"has no {MANIFEST_SHA256}"):
        read_manifest(files)


def test_foreign_tars_are_refused_with_the_command_that_indexes_them(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    server.put(f"{bucket}/d/some/where/00001.tar", b"x")
    server.put(f"{bucket}/other/a.txt", b"x")
    folder = tmp_path / "d"
    (folder / "below").mkdir(parents=True)
    keys = config(tmp_path)
    for empty in (folder, tmp_path / "none", f"{bucket}/other", f"{bucket}/nothing"):
        with pytest.raises(ValueError, match=r"no manifest.json: not a finished"):
            read_manifest(open_files(empty, keys))
    (folder / "below" / "a.tar").write_bytes(b"x")
    for root, tar in ((folder, "below/a.tar"), (f"{bucket}/d", "some/where/00001.tar")):
        with pytest.raises(ValueError, match="but tars") as refused:
            read_manifest(open_files(root, keys))
        assert tar in str(refused.value)
        assert f"python -m pipeline.index {root} --tokenizer" in str(refused.value)


@pytest.mark.parametrize("name", ["00001.tar", "{00000..00001}.tar", "*.tar"])
def test_tars_named_one_by_one_are_refused_with_their_folder(
    server: S3Server, bucket: str, tmp_path: Path, name: str
) -> None:
    server.put(f"{bucket}/d/00001.tar", b"x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "00001.tar").write_bytes(b"x")
    for folder in (f"{tmp_path}/d", f"{bucket}/d"):
        with pytest.raises(ValueError, match="is given by its folder") as refused:
            read_manifest(open_files(f"{folder}/{name}", config(tmp_path)))
        assert f"python -m pipeline.index {folder} --tokenizer" in str(refused.value)
        assert str(refused.value).endswith(f"and give {folder} then")
        with pytest.raises(ValueError, match=r"no manifest.json: not a finished"):
            read_manifest(open_files(f"{folder}/e/{name}", config(tmp_path)))


@pytest.mark.parametrize("part", ["train", "train/*.tar", "train/shard-000000.tar"])
def test_a_part_of_a_dataset_is_refused_with_the_dataset(
    server: S3Server,
    bucket: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    seal = (shards / MANIFEST_SHA256).read_bytes()
    server.put(f"{bucket}/made/{MANIFEST_SHA256}", seal)
    server.put(f"{bucket}/made/train/shard-000000.tar", b"x")
    for dataset in (shards, f"{bucket}/made"):
        with pytest.raises(ValueError, match="a part of the dataset") as refused:
            read_manifest(open_files(f"{dataset}/{part}", config(tmp_path)))
        assert str(refused.value).endswith(f"dataset {dataset}; give {dataset} instead")
    monkeypatch.chdir(shards / "train")
    for here in (".", "*.tar"):
        with pytest.raises(ValueError, match=r"give \.\. instead"):
            read_manifest(open_files(here, config(tmp_path)))


def test_nothing_else_in_the_folder_is_touched(
    bucket: str, content: dict[str, bytes], tmp_path: Path
) -> None:
    names = ("live/a.lock", "photos/parts/a", "photos/2024/b/c.tar", "lock", "d.part")
    others = [tmp_path / "cache" / name for name in names]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(3 * SIZE))
    # Just as large as one file, and no larger.
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    for name in NAMES:
        assert read(files, name) == content[name]
    assert all(path.read_bytes() == bytes(3 * SIZE) for path in others)


@pytest.mark.filterwarnings("ignore:the shards that are read at once")
def test_a_folder_of_tars_may_have_any_name(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    names = ["parts/a b.tar", "parts/parts/ü\u2028.tar", "newest/URL", "c.tar"]
    files = open_files(f"{bucket}/d", config(tmp_path, cache_bytes=bound(1)))
    for name in names:
        server.put(f"{bucket}/d/{quote(name)}", bytes(SIZE))
    files.ahead([Wanted(name, size=9) for name in names])
    for name in names * 2:
        assert read(files, name) == bytes(SIZE)
