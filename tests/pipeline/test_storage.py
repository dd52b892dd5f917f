"""Storage keeps its promises on a disk, on S3 and in fsspec's memory: nothing partial,
conditional writes that have one winner, and retries that end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.retries import RetryPolicy
from pipeline.storage import (
    STAGING,
    Storage,
    file_size,
    list_files,
    open_file,
    open_storage,
)
from tests.pipeline.s3 import DROP, LOSE, TRUNCATE, Fault, S3Server, slow, status

FAST = RetryPolicy(tries=6, first_pause_s=0.01, longest_pause_s=0.02)
KINDS = ("disk", "s3", "memory")
# What S3 answers to a part of a file, and not to the start or the end of its upload.
PART = 16 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return server.bucket(monkeypatch)


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    urls: dict[str, Callable[[], str]] = {
        "disk": lambda: str(tmp_path / "root"),
        "s3": lambda: f"{request.getfixturevalue('bucket')}/root",
        "memory": lambda: f"memory://{uuid.uuid4().hex}/root",
    }
    return open_storage(urls[request.param](), policy=FAST)


@pytest.fixture
def remote(bucket: str) -> Storage:
    return open_storage(f"{bucket}/root", policy=FAST)


def counts(storage: Storage, before: dict[str, int]) -> dict[str, int]:
    """Calls that were made again since `before`."""
    now = storage.retried
    return {
        key: now[key] - before.get(key, 0)
        for key in now
        if now[key] != before.get(key, 0)
    }


def puts(method: str, path: str) -> bool:
    return method == "PUT"


def parts(method: str, path: str) -> bool:
    return "partNumber" in path


def gets(method: str, path: str) -> bool:
    return method == "GET"


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def together(code: str, count: int, url: str) -> list[str]:
    """What each of `count` processes prints that begin at the same moment."""
    processes = [start(code, url, str(number)) for number in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return printed


def test_what_is_written_is_read_back(storage: Storage) -> None:
    names = ["a", "d/a b", "d/e/ü%41.json", "da"]
    for name in names:
        storage.write(name, name.encode() * 100)
    assert storage.names() == sorted(names)
    assert storage.names("d") == ["d/a b", "d/e/ü%41.json"]
    assert storage.names("nothing") == []
    for name in names:
        assert storage.read(name) == name.encode() * 100
        assert storage.size(name) == len(name.encode()) * 100
    storage.write("a", b"")
    assert (storage.read("a"), storage.size("a")) == (b"", 0)
    sizes = {name: len(name.encode()) * 100 for name in sorted(names)} | {"a": 0}
    assert list(storage.sizes().items()) == list(sizes.items())
    assert storage.sizes("d") == {name: sizes[name] for name in storage.names("d")}
    assert storage.sizes("nothing") == {}
    assert storage.size("d") is None
    assert storage.size("nothing") is None


def test_a_range_ends_where_the_file_ends(storage: Storage) -> None:
    storage.write("f", b"0123456789")
    assert storage.read_range("f", 2, 3) == b"234"
    assert storage.read_range("f", 8, 5) == b"89"
    assert storage.read_range("f", 10, 5) == b""
    assert storage.read_range("f", 12, 5) == b""
    assert storage.read_range("f", 3, 0) == b""


def test_what_is_missing_is_named(storage: Storage) -> None:
    for call in (
        lambda: storage.read("no/such"),
        lambda: storage.read_range("no/such", 0, 1),
        lambda: storage.move("no/such", "target"),
        lambda: storage.fetch("no/such").__enter__(),
    ):
        with pytest.raises(FileNotFoundError, match="no/such"):
            call()
    assert storage.read_version("no/such") is None
    storage.remove("no/such")
    storage.remove_tree("no")
    assert storage.names() == []


def test_removing_leaves_the_rest(storage: Storage) -> None:
    for name in ("d/1", "d/e/2", "d2/3", "4"):
        storage.write(name, b"x")
    storage.remove_tree("d")
    assert storage.names() == ["4", "d2/3"]
    storage.remove("d2/3")
    assert storage.names() == ["4"]
    if storage.path:
        assert os.listdir(storage.path) == ["4"], "folders go with their last file"


def test_moving_replaces(storage: Storage) -> None:
    storage.write("from/a", b"new")
    storage.write("to/b", b"old")
    storage.move("from/a", "to/b")
    storage.move("to/b", "further/on/c")
    assert storage.names() == ["further/on/c"]
    assert storage.read("further/on/c") == b"new"


def test_a_copy_outlives_its_original(storage: Storage) -> None:
    storage.write("from/a", b"data")
    storage.write("to/b", b"old")
    for _ in range(2):
        storage.copy("from/a", "to/b")
        assert storage.names() == ["from/a", "to/b"]
    storage.move("from/a", "to/b")
    storage.move("to/b", "to/b")
    storage.copy("to/b", "to/b")
    assert storage.names() == ["to/b"]
    storage.copy("to/b", "further/on/c")
    storage.write("to/b", b"newer")
    assert storage.read("further/on/c") == b"data"
    with pytest.raises(FileNotFoundError, match="from/a"):
        storage.copy("from/a", "to/b")
    assert storage.read("to/b") == b"newer"


def test_the_first_to_create_wins(storage: Storage) -> None:
    assert storage.create("d/f", b"first")
    assert not storage.create("d/f", b"second")
    assert storage.read("d/f") == b"first"


def test_an_update_of_an_old_version_is_refused(storage: Storage) -> None:
    storage.write("d/f", b"1")
    data, version = storage.read_version("d/f") or (b"", "")
    assert data == b"1"
    assert storage.replace("d/f", b"2", version)
    assert not storage.replace("d/f", b"3", version)
    assert not storage.discard("d/f", version)
    assert storage.read("d/f") == b"2"
    _, newer = storage.read_version("d/f") or (b"", "")
    assert storage.discard("d/f", newer)
    assert not storage.discard("d/f", newer)
    assert not storage.replace("d/f", b"4", newer)
    assert storage.names() == []


def test_staged_files_appear_after_a_clean_exit_only(storage: Storage) -> None:
    storage.write("out/keep", b"k")
    storage.write("out/2", b"old")
    with storage.stage("out") as directory:
        (directory / "deep" / "er").mkdir(parents=True)
        (directory / "deep" / "er" / "1").write_bytes(b"one")
        (directory / "2").write_bytes(b"two")
        assert "out/deep/er/1" not in storage.names()
    assert not directory.exists()
    assert storage.names() == ["out/2", "out/deep/er/1", "out/keep"]
    assert storage.read("out/2") == b"two"
    with contextlib.suppress(KeyError), storage.stage("out") as directory:
        (directory / "3").write_bytes(b"three")
        raise KeyError
    assert not directory.exists()
    assert storage.names() == ["out/2", "out/deep/er/1", "out/keep"]


def test_a_fetched_file_is_a_local_one(storage: Storage) -> None:
    data = os.urandom(3 << 20)
    storage.write("d/f.bin", data)
    with storage.fetch("d/f.bin") as path:
        assert path.name == "f.bin"
        assert path.read_bytes() == data
    assert storage.read("d/f.bin") == data


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\0"]
)
def test_names_cannot_leave_the_folder(storage: Storage, name: str) -> None:
    for call in (storage.read, storage.remove, storage.size, storage.remove_tree):
        with pytest.raises(ValueError, match="no file name inside a folder"):
            call(name)
    with pytest.raises(ValueError, match="no file name inside a folder"):
        storage.write(name, b"")
    with pytest.raises(ValueError, match="no file name inside a folder"):
        storage.move("a", name)
    with pytest.raises(ValueError, match="inside"), storage.stage(name):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda storage: storage.read("led/astray/precious"),
        lambda storage: storage.size("led/astray/precious"),
        lambda storage: storage.names("led/astray"),
        lambda storage: storage.write("led/astray/precious", b"gone"),
        lambda storage: storage.create("led/astray/new", b"more"),
        lambda storage: storage.remove("led/astray/precious"),
        lambda storage: storage.remove_tree("led/astray/deep"),
        lambda storage: storage.move("led/astray/precious", "kept"),
        lambda storage: storage.copy("own", "led/astray/copy"),
        lambda storage: storage.stage("led/astray").__enter__(),
        lambda storage: storage.fetch("led/astray/precious").__enter__(),
    ],
)
def test_no_link_in_the_folder_leads_out_of_it(
    call: Callable[[Storage], object], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "precious").write_bytes(b"kept")
    (victim / "deep" / "precious").write_bytes(b"kept")
    before = sorted(victim.rglob("*"))
    storage = open_storage(tmp_path / "root", policy=FAST)
    storage.write("own", b"own")
    (tmp_path / "root" / "led").mkdir()
    (tmp_path / "root" / "led" / "astray").symlink_to("../../victim")
    with pytest.raises(ValueError, match=r"leads out of .*root.*: remove the link"):
        call(storage)
    assert sorted(victim.rglob("*")) == before
    assert (victim / "precious").read_bytes() == b"kept"
    assert storage.names() == ["own"]


@pytest.mark.parametrize("link", [STAGING, STAGING.partition("/")[0]])
def test_what_is_not_whole_yet_follows_no_link(link: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "staging").mkdir(parents=True)
    storage = open_storage(tmp_path / "root", policy=FAST)
    storage.write("tree/own", b"own")
    at = tmp_path / "root" / link
    at.parent.mkdir(exist_ok=True)
    at.symlink_to(victim)
    calls: tuple[Callable[[], object], ...] = (
        lambda: storage.write("a", b"a"),
        lambda: storage.create("a", b"a"),
        lambda: storage.copy("tree/own", "a"),
        lambda: storage.remove_tree("tree"),
        lambda: storage.stage("a").__enter__(),
    )
    for call in calls:
        with pytest.raises(ValueError, match="remove the link"):
            call()
    assert [path.name for path in victim.rglob("*")] == ["staging"]
    assert storage.read("tree/own") == b"own"


def test_a_tree_that_is_a_link_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_bytes(b"kept")
    at = tmp_path / "root" / STAGING
    at.parent.mkdir(parents=True)
    at.symlink_to(tmp_path / "victim")
    storage = open_storage(tmp_path / "root", policy=FAST)
    storage.remove_tree(STAGING)
    assert not at.is_symlink()
    assert (tmp_path / "victim" / "precious").read_bytes() == b"kept"
    storage.write("a", b"a")
    assert storage.names() == ["a"]


def test_links_to_the_folder_and_inside_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to("disk")
    storage = open_storage(tmp_path / "root", policy=FAST)
    storage.write("train/a", b"a")
    (tmp_path / "disk" / "val").symlink_to("train")
    assert storage.read("val/a") == b"a"
    storage.write("val/b", b"b")
    assert storage.names("train") == ["train/a", "train/b"]


def test_it_travels_to_other_processes_and_threads(
    storage: Storage, tmp_path: Path
) -> None:
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.url, copy.path) == (storage.url, storage.path)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: copy.write(f"d/{n}", b"%d" % n), range(40)))
        found = list(threads.map(lambda n: storage.read(f"d/{n}"), range(40)))
    assert found == [b"%d" % n for n in range(40)]
    if not storage.url.startswith("memory"):
        (tmp_path / "pickled").write_bytes(pickle.dumps(storage))
        code = (
            "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb')); "
            "print(len(s.names())); s.write('theirs', b'x')"
        )
        printed, _ = start(code, str(tmp_path / "pickled")).communicate(timeout=300)
        assert printed == "40\n"
        assert storage.read("theirs") == b"x"


def test_it_works_in_a_child_that_was_forked(remote: Storage) -> None:
    remote.write("parents", b"p")
    if (child := os.fork()) == 0:
        try:
            remote.write("childs", remote.read("parents") + b"c")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert remote.read("childs") == b"pc"


def test_on_a_disk_only_the_data_stays(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a"), f"file://{tmp_path}/b%20c/"):
        storage = open_storage(url)
        storage.write("d/1", b"x")
        storage.create("2", b"x")
        with storage.stage("d") as directory:
            (directory / "3").write_bytes(b"x")
        storage.remove_tree("d")
        assert storage.path is not None
        assert os.listdir(storage.path) == ["2"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b c"]


CREATE = """
import sys
from pipeline.storage import open_storage
storage = open_storage(sys.argv[1])
storage.names()
print("ready", flush=True)
sys.stdin.readline()
for number in range(15):
    print(int(storage.create(f"d/{number}", b"same")))
"""


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_several_processes_one_creates(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    wins = [[int(line) for line in text.split()] for text in together(CREATE, 3, url)]
    assert [sum(column) for column in zip(*wins, strict=True)] == [1] * 15


COUNT = """
import sys
from pipeline.storage import open_storage
storage = open_storage(sys.argv[1])
storage.names()
print("ready", flush=True)
sys.stdin.readline()
done = 0
while done < 10:
    data, version = storage.read_version("counter")
    done += storage.replace("counter", b"%d" % (int(data) + 1), version)
"""


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_no_update_of_several_processes_is_lost(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    open_storage(url).write("counter", b"0")
    together(COUNT, 3, url)
    assert open_storage(url).read("counter") == b"30"


WRITE = """
import hashlib, itertools, os, sys
from pipeline.storage import open_storage
storage = open_storage(sys.argv[1])
def whole(number):
    body = bytes([number % 256]) * (300_000 + number)
    return hashlib.sha256(body).digest() + body
for number in itertools.count():
    storage.write("d/one", whole(number))
    storage.write(f"d/many-{number % 7}", whole(number))
    with storage.stage("staged") as directory:
        for name in "ab":
            (directory / name).write_bytes(whole(number))
    print(number, flush=True)
"""


def is_whole(data: bytes) -> bool:
    return hashlib.sha256(data[32:]).digest() == data[:32]


SUSPEND = """
import os, signal, sys
from pipeline.storage import open_storage
storage = open_storage(sys.argv[1])
_, version = storage.read_version("f")
write = storage.write
def suspended(name, data):
    os.kill(os.getpid(), signal.SIGSTOP)
    write(name, data)
storage.write = suspended
assert storage.replace("f", b"second", version)
"""


def test_a_writer_that_is_suspended_in_mid_update_holds_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    storage.write("f", b"first")
    writer = subprocess.Popen([sys.executable, "-c", SUSPEND, str(tmp_path)])
    try:
        while psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        _, version = storage.read_version("f") or (b"", "")
        monkeypatch.setattr("pipeline.storage_local._LOCK_SECONDS", 0.2)
        with pytest.raises(TimeoutError, match=r"suspended.*let it go on, or end it"):
            storage.replace("f", b"third", version)
        writer.send_signal(signal.SIGCONT)
        assert writer.wait(300) == 0
        # It still had the lock, and the other one stood back.
        assert storage.read("f") == b"second"
        assert not storage.replace("f", b"third", version)
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_neither_readers_nor_kills_find_a_part_of_a_file(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    storage = open_storage(url)
    kills, reads = (6, 100) if where == "disk" else (3, 5)
    for kill in range(kills):
        process = start(WRITE, url)
        assert process.stdout is not None
        assert process.stdout.readline()
        for _ in range(reads):
            assert is_whole(storage.read("d/one"))
            assert is_whole(storage.read("staged/a"))
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        names = [name for name in storage.names() if not name.startswith(STAGING)]
        assert {"d/one", "staged/a", "staged/b"} <= set(names)
        assert [name for name in names if not is_whole(storage.read(name))] == []
    beside = {name.split("/")[0] for name in storage.names()}
    assert beside <= {"d", "staged", ".palimpsest"}


def test_a_storm_of_errors_is_weathered_and_counted(
    server: S3Server, remote: Storage
) -> None:
    before = dict(remote.retried)
    storm = [status(500), status(503), status(429), None]
    server.inject(itertools.cycle(storm))
    for number in range(5):
        remote.write(f"d/{number}", b"%d" % number)
    assert remote.names("d") == [f"d/{number}" for number in range(5)]
    assert [remote.read(f"d/{number}") for number in range(5)] == [
        b"%d" % number for number in range(5)
    ]
    remote.move("d/0", "e")
    with remote.stage("s") as directory:
        (directory / "f").write_bytes(b"f")
    with remote.fetch("s/f") as path:
        assert path.read_bytes() == b"f"
    assert remote.create("new", b"n")
    remote.remove_tree("d")
    assert remote.names() == ["e", "new", "s/f"]
    again = counts(remote, before)
    assert again.keys() == {"429", "500", "503"}
    assert sum(again.values()) == sum(
        fault is not None
        for fault, _ in zip(itertools.cycle(storm), server.requests, strict=False)
    )


def test_only_the_part_that_failed_is_sent_again(
    server: S3Server, remote: Storage
) -> None:
    data = os.urandom(40 << 20)
    server.inject([None, status(500), DROP], parts)
    with remote.stage("d") as directory:
        (directory / "big").write_bytes(data)
    assert sum(itertools.starmap(parts, server.requests)) == 5
    assert remote.size("d/big") == len(data)
    server.inject([TRUNCATE, status(503)], gets)
    with remote.fetch("d/big") as path:
        assert path.read_bytes() == data
    remote.write("direct", data[: 2 * PART + 1])
    assert remote.read("direct") == data[: 2 * PART + 1]


@pytest.mark.parametrize("fault", [DROP, TRUNCATE, status(500)])
def test_damaged_answers_are_read_again(
    server: S3Server, remote: Storage, fault: Fault
) -> None:
    data = os.urandom(100_000)
    remote.write("f", data)
    before = dict(remote.retried)
    server.inject([fault], gets)
    assert remote.read("f") == data
    server.inject([fault], gets)
    assert remote.read_range("f", 10, 50_000) == data[10:50_010]
    server.inject([fault], gets)
    assert (remote.read_version("f") or (b"",))[0] == data
    server.inject([fault], gets)
    with open_file(f"{remote.url}/f", policy=FAST) as file:
        assert file.read() == data
    if fault != DROP:
        # The HTTP library itself repeats a request on a connection found closed.
        assert sum(counts(remote, before).values()) == 4


def test_an_answer_that_does_not_come_is_a_time_out(
    server: S3Server, remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"config_kwargs": {"read_timeout": 1.0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    before = dict(remote.retried)
    server.inject([slow(3), slow(3)])
    remote.write("f", b"in the end")
    assert remote.read("f") == b"in the end"
    again = counts(remote, before)
    assert again.keys() == {"time-out"}
    assert again["time-out"] >= 2


def test_spent_retries_say_what_and_what_next(
    server: S3Server, remote: Storage
) -> None:
    server.inject(itertools.cycle([status(503)]))
    for call in (
        lambda: remote.read("d/f"),
        lambda: remote.write("d/f", b"x"),
        lambda: remote.create("d/f", b"x"),
        lambda: remote.size("d/f"),
    ):
        server.requests.clear()
        with pytest.raises(OSError, match=r"root/d/f.* 6 times.*503.*same command"):
            call()
        assert len(server.requests) == 6
    server.inject(itertools.cycle([TRUNCATE]), gets)
    with pytest.raises(OSError, match=r"root/.* 6 times"):
        remote.names()


def test_a_disk_that_fails_is_tried_again_and_named() -> None:
    # Reading this file at 0 is an I/O error by the kernel's own hand.
    storage = open_storage("/proc/self", policy=FAST)
    before = dict(storage.retried)
    with pytest.raises(OSError, match=r"/proc/self/mem.* 6 times.*EIO.*same command"):
        storage.read("mem")
    assert counts(storage, before) == {"EIO": 5}


def test_what_will_not_pass_is_not_tried_again(
    server: S3Server, remote: Storage, bucket: str
) -> None:
    server.inject(itertools.cycle([status(403)]))
    server.requests.clear()
    with pytest.raises(PermissionError, match=r"root/f: access denied.*credentials"):
        remote.read("f")
    with pytest.raises(PermissionError, match=r"root/f: access denied.*credentials"):
        remote.write("f", b"")
    with pytest.raises(PermissionError, match=r"root/f: access denied.*credentials"):
        remote.size("f")
    server.inject(itertools.cycle([status(418)]))
    with pytest.raises(OSError, match="root/f: Spoilt"):
        remote.read("f")
    server.inject(())
    with pytest.raises(FileNotFoundError, match="root/f"):
        remote.read("f")
    nowhere = open_storage(f"{bucket}x/root", policy=FAST)
    for call in (
        lambda: nowhere.read("f"),
        lambda: nowhere.write("f", b""),
        lambda: nowhere.create("f", b""),
        nowhere.names,
    ):
        with pytest.raises(ValueError, match="no such bucket; create it"):
            call()
    assert len(server.requests) == 9


@pytest.mark.parametrize("faults", [[LOSE], [LOSE, status(503)], [LOSE, slow(0.01)]])
def test_a_write_whose_answer_was_lost_has_won(
    server: S3Server, remote: Storage, faults: list[Fault]
) -> None:
    server.inject(faults, puts)
    assert remote.create("f", b"same")
    server.inject(faults, puts)
    assert not remote.create("f", b"same"), "equal bytes are not one's own"
    _, version = remote.read_version("f") or (b"", "")
    server.inject(faults, puts)
    assert remote.replace("f", b"next", version)
    server.inject(faults, puts)
    assert not remote.replace("f", b"next", version)
    assert remote.read("f") == b"next"


def test_what_another_process_writes_is_seen_at_once(
    server: S3Server, remote: Storage
) -> None:
    assert remote.names() == []
    assert remote.size("theirs") is None
    server.put(f"{remote.url}/theirs", b"x")
    assert remote.names() == ["theirs"]
    assert remote.size("theirs") == 1
    server.put(f"{remote.url}/theirs", b"xyz")
    assert remote.size("theirs") == 3
    assert file_size(f"{remote.url}/theirs") == 3


def test_a_store_without_credentials_or_driver_names_the_cure(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    with pytest.raises(ValueError, match=r"no credentials.*AWS_PROFILE.*ANON"):
        open_storage(f"{bucket}/root").read("f")
    with pytest.raises(ValueError, match="names the host 'data'; a file URL has three"):
        open_storage("file://data/x")
    with pytest.raises(ValueError, match="unknown scheme 'foo'; use a path"):
        open_storage("foo://x/y")
    with pytest.raises(ValueError, match=r"a package is missing.*installed"):
        open_storage("dropbox://x/y")


def test_a_remote_file_reads_like_a_local_one(
    server: S3Server, remote: Storage, tmp_path: Path
) -> None:
    table = pa.table({"n": range(50_000), "text": ["word " * 9] * 50_000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1000)
    remote.write("t.parquet", (tmp_path / "t.parquet").read_bytes())
    url = f"{remote.url}/t.parquet"
    server.inject(itertools.cycle([None, None, TRUNCATE, None, status(503)]))
    with open_file(url, policy=FAST) as file:
        assert pq.read_table(file).equals(table)
    with (
        open_file(url, policy=FAST) as file,
        open_file(str(tmp_path / "t.parquet")) as same,
    ):
        for offset, whence, size in [(5, 0, 9), (-9, 2, 20), (-4, 1, 3), (1, 0, -1)]:
            assert file.seek(offset, whence) == same.seek(offset, whence)
            assert file.read(size) == same.read(size)
    with pytest.raises(FileNotFoundError, match="none"):
        open_file(f"{remote.url}/none")
    with pytest.raises(IsADirectoryError, match="root"):
        open_file(remote.url)


def test_a_file_replaced_while_it_is_read_is_an_error(remote: Storage) -> None:
    remote.write("f", bytes(9 << 20))
    with open_file(f"{remote.url}/f", policy=FAST) as file:
        assert file.read(1) == b"\0"
        remote.write("f", b"\1" * (9 << 20))
        with pytest.raises(OSError, match=r"f.*no longer exists"):
            file.read()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_files_are_listed_by_name_folder_and_glob(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    storage = open_storage(root)
    for name in ("in/b.tar", "in/a.tar", "in/deep/c.tar", "in/x.txt", "in/[1].tar"):
        storage.write(name, b"x")

    def listed(url: str) -> list[str]:
        found = list_files(f"{root}/{url}")
        return [name.removeprefix(f"{root}/in/") for name in found]

    assert listed("in/a.tar") == ["a.tar"]
    assert listed("in") == ["[1].tar", "a.tar", "b.tar", "deep/c.tar", "x.txt"]
    assert listed("in/*.tar") == ["[1].tar", "a.tar", "b.tar"]
    assert listed("in/**/*.tar") == ["[1].tar", "a.tar", "b.tar", "deep/c.tar"]
    assert listed("in/[1].tar") == ["[1].tar"]
    assert listed("in/de*") == []
    assert listed("nothing") == []
    for name in list_files(f"{root}/in"):
        with open_file(name) as file:
            assert file.read() == b"x"
        assert file_size(name) == 1


def test_a_web_server_without_ranges_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 40)
    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/f"
        with open_file(url, policy=FAST) as file:
            file.seek(10_000)
            assert file.read() == (bytes(range(256)) * 40)[10_000:]
            file.seek(3)
            assert file.read(2) == b"\3\4"
        assert file_size(url) == 256 * 40
        with pytest.raises(FileNotFoundError, match="/fg"):
            open_file(f"{url}g", policy=FAST)
        web.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""
