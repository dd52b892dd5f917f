"""One driver at a time, and no dead one that blocks the next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.lease import Lease


def holder(path: Path, *, pid: int, host: str, expires_in: float) -> None:
    value = {"token": "other", "pid": pid, "host": host}
    path.write_text(json.dumps({**value, "expires": time.time() + expires_in}))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_dead_holder_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    holder(path, pid=dead_pid(), host=socket.gethostname(), expires_in=1000)
    with Lease(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_live_holder_is_not_succeeded(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    holder(path, pid=os.getppid(), host=socket.gethostname(), expires_in=1000)
    with pytest.raises(ValueError, match="being written by process"), Lease(path):
        pass
    assert json.loads(path.read_text())["token"] == "other"


def test_a_holder_elsewhere_is_succeeded_when_its_lease_expired(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    holder(path, pid=1, host="another-machine", expires_in=30)
    with pytest.raises(ValueError, match="another-machine"), Lease(path):
        pass
    holder(path, pid=1, host="another-machine", expires_in=-1)
    with Lease(path):
        pass


def test_a_driver_that_was_taken_over_stops(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with Lease(path) as lease:
        lease.check()
        holder(path, pid=1, host="another-machine", expires_in=30)
        with pytest.raises(ValueError, match="took over"):
            lease.check()
    assert path.exists(), "the successor's lease must stay"


def test_what_dead_drivers_left_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    here = socket.gethostname()
    holder(tmp_path / "lease-dead", pid=dead_pid(), host=here, expires_in=1000)
    holder(tmp_path / "lease-live", pid=os.getppid(), host=here, expires_in=1000)
    (tmp_path / "lease-torn").write_text('{"tok')
    with Lease(tmp_path / "lease.json"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lease-live"]
