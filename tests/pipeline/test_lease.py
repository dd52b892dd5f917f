"""One driver at a time, and no dead one that blocks the next: on a disk and on S3."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.lease
from pipeline.lease import Lease
from pipeline.retries import RetryPolicy
from pipeline.storage import STAGING, Storage, open_storage
from tests.pipeline.s3 import LOSE, S3Server, status

NAME = ".palimpsest/lease.json"
FAST = RetryPolicy(tries=4, first_pause_s=0.01, longest_pause_s=0.02)
# Takes the lease, says so, and keeps it until its input ends.
HOLD = """
import sys
from pipeline.lease import Lease
from pipeline.storage import open_storage
lease = Lease(open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease:
        print("held", flush=True)
        sys.stdin.read()
        lease.check()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    if request.param == "disk":
        return open_storage(tmp_path / "root", policy=FAST)
    server: S3Server = request.getfixturevalue("server")
    return open_storage(f"{server.bucket(monkeypatch)}/root", policy=FAST)


def holder(
    storage: Storage, *, pid: int, host: str, expires_in: float, **facts: object
) -> None:
    value = {"token": "other", "pid": pid, "host": host, **facts}
    content = {**value, "expires": time.time() + expires_in}
    storage.write(NAME, json.dumps(content).encode())


def take_over(storage: Storage) -> None:
    """As a driver on another machine does, whatever the holder writes meanwhile."""
    other = {"token": "other", "pid": 1, "host": "another-machine"}
    content = json.dumps({**other, "expires": time.time() + 30}).encode()
    while True:
        found = storage.read_version(NAME)
        assert found is not None
        if storage.replace(NAME, content, found[1]):
            return


def held(storage: Storage) -> dict[str, Any]:
    return json.loads(storage.read(NAME))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def driver(storage: Storage, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, storage.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert line(process) == "ready"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def killed_holder(storage: Storage) -> dict[str, Any]:
    """What a driver wrote that was killed while it held the lease."""
    process = driver(storage)
    tell(process)
    assert line(process) == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return held(storage)


def test_a_dead_holder_on_this_machine_is_succeeded_at_once(storage: Storage) -> None:
    left = killed_holder(storage)
    storage.write(NAME, json.dumps({**left, "expires": time.time() + 1000}).encode())
    lease = Lease(storage)
    lease.refuse_if_held()
    with lease:
        assert held(storage)["pid"] == os.getpid()
        assert 30 < held(storage)["expires"] - time.time() <= 60
    assert [name for name in storage.names() if not name.startswith(STAGING)] == []


def test_a_holder_whose_number_another_process_has_is_succeeded(
    storage: Storage,
) -> None:
    left = killed_holder(storage) | {"expires": time.time() + 1000}
    for pid in (os.getppid(), os.getpid()):
        storage.write(NAME, json.dumps({**left, "pid": pid}).encode())
        Lease(storage).refuse_if_held()


@pytest.mark.parametrize("place", [0, 1, 2, None])
def test_a_holder_in_another_container_of_this_host_is_not_succeeded(
    storage: Storage, place: int | None
) -> None:
    """Its number says nothing here: it may be no process, this one, or any other."""
    with Lease(storage):
        host, *facts = held(storage)["machine"].split()
    machine = [host, *facts]
    if place is not None:
        machine[place] = "another"
    other = None if place is None else " ".join(machine)
    for pid in (dead_pid(), os.getpid(), 1):
        known = {"machine": other, "started": "1"}
        holder(storage, pid=pid, host=host, expires_in=1000, **known)
        with pytest.raises(ValueError, match="being written by process"):
            Lease(storage).refuse_if_held()


def test_a_driver_in_a_pid_namespace_of_its_own_is_not_succeeded(
    tmp_path: Path,
) -> None:
    storage = open_storage(tmp_path / "root")
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody make a PID namespace")
    process = driver(storage, *apart)
    tell(process)
    assert line(process) == "held"
    with pytest.raises(ValueError, match="being written by process"), Lease(storage):
        pass
    assert process.communicate()[0] == "", "the holder's check passes"


def test_a_live_holder_is_not_succeeded(storage: Storage) -> None:
    holder(storage, pid=os.getppid(), host=socket.gethostname(), expires_in=1000)
    with pytest.raises(ValueError, match="being written by process"):
        Lease(storage).refuse_if_held()
    with pytest.raises(ValueError, match="being written by process"), Lease(storage):
        pass
    assert held(storage)["token"] == "other"


def test_a_holder_elsewhere_is_succeeded_when_its_lease_expired(
    storage: Storage,
) -> None:
    holder(storage, pid=1, host="another-machine", expires_in=30)
    with pytest.raises(ValueError, match="another-machine"), Lease(storage):
        pass
    holder(storage, pid=1, host="another-machine", expires_in=-1)
    with Lease(storage) as lease:
        lease.check()


def test_a_driver_that_was_taken_over_stops(storage: Storage) -> None:
    with Lease(storage) as lease:
        lease.check()
        holder(storage, pid=1, host="another-machine", expires_in=30)
        with pytest.raises(ValueError, match="took over"):
            lease.check()
    assert held(storage)["token"] == "other", "the successor's lease must stay"


def test_a_lease_that_was_torn_blocks_nobody(storage: Storage) -> None:
    for content in (b"", b'{"tok', b"[]", b"\xff"):
        storage.write(NAME, content)
        Lease(storage).refuse_if_held()
        with Lease(storage) as lease:
            lease.check()
        assert storage.names() == []


def test_a_held_lease_is_renewed_and_never_after_its_loss(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.lease, "_RENEWAL_SECONDS", 0.01)
    with Lease(storage) as lease:
        first = held(storage)
        while held(storage)["expires"] == first["expires"]:
            time.sleep(0.01)
        assert held(storage)["token"] == first["token"]
        take_over(storage)
        lease._renewal.join(60)
        assert not lease._renewal.is_alive()
        assert held(storage)["token"] == "other"
    assert held(storage)["token"] == "other"


@pytest.mark.parametrize("expired", [False, True])
def test_of_racing_drivers_exactly_one_wins(storage: Storage, expired: bool) -> None:
    if expired:
        holder(storage, pid=1, host="another-machine", expires_in=-1)
    drivers = [driver(storage) for _ in range(3)]
    for process in drivers:
        tell(process)
    said = [line(process) for process in drivers]
    assert said.count("held") == 1, said
    winner = drivers[said.index("held")]
    assert held(storage)["pid"] == winner.pid
    assert all("being written by" in text for text in said if text != "held")
    printed = [process.communicate()[0] for process in drivers]
    assert printed == [""] * 3, "the winner's check passes until the end"
    assert storage.names() == []


def test_a_killed_driver_is_succeeded_and_leaves_nothing(storage: Storage) -> None:
    for number in range(4):
        process = driver(storage)
        tell(process)
        # Also while it takes the lease, not only once it has it.
        if number % 2:
            assert line(process) == "held"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Lease(storage) as lease:
        lease.check()
    assert [name for name in storage.names() if not name.startswith(STAGING)] == []


def test_errors_of_storage_neither_lose_nor_double_the_lease(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = RetryPolicy(tries=12, first_pause_s=0.01, longest_pause_s=0.02)
    storage = open_storage(f"{server.bucket(monkeypatch)}/root", policy=patient)
    monkeypatch.setattr(pipeline.lease, "_RENEWAL_SECONDS", 0.01)
    server.inject(itertools.cycle([LOSE, status(503), None]))
    with Lease(storage) as lease:
        first = held(storage)
        while held(storage)["expires"] == first["expires"]:
            time.sleep(0.01)
        # Away for longer than the renewal tries: it goes on when storage is back.
        server.inject(itertools.cycle([status(500)]))
        for _ in range(3):
            with pytest.raises(OSError, match="same command continues"):
                lease.check()
        server.inject(())
        second = held(storage)
        while held(storage)["expires"] == second["expires"]:
            time.sleep(0.01)
        lease.check()
    assert storage.names() == []
