"""Writing behind a URL: whole or not at all, whatever storage does meanwhile."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pipeline.s3 import DROP, LOSE, S3Server, slow, status
from tests.trainer.tiny import wait_until
from trainer import lease
from trainer.lease import LEASE, Lease
from trainer.storage import StorageConfig, StorageError
from trainer.store import Store

SIZE = 20_000_001


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture(params=["s3", "memory"])
def url(
    request: pytest.FixtureRequest, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A folder on S3, or on a file system that knows neither parts nor conditions."""
    if request.param == "s3":
        return f"{server.bucket(monkeypatch)}/some/run"
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return f"{server.bucket(monkeypatch)}/some/run"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of three ranges."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SIZE))
    return path


def store(url: str, **keys: float) -> Store:
    return Store(url, StorageConfig(**keys))  # type: ignore[arg-type]


def test_files_come_back_as_they_were(url: str, large: Path, tmp_path: Path) -> None:
    folder = store(url)
    assert folder.sizes() == {}
    folder.upload("a/large", large)
    folder.write("a/b/small", b"small")
    folder.write("ab", b"")
    assert folder.sizes() == {"a/b/small": 5, "a/large": SIZE, "ab": 0}
    assert folder.sizes("a") == {"a/b/small": 5, "a/large": SIZE}
    assert folder.download("a/large", tmp_path / "again") == SIZE
    assert (tmp_path / "again").read_bytes() == large.read_bytes()
    assert folder.read("a/b/small") == b"small"
    folder.remove(["a/large", "a/b/small", "not there"])
    assert folder.sizes() == {"ab": 0}
    with pytest.raises(FileNotFoundError):
        folder.read("a/b/small")
    with pytest.raises(FileNotFoundError):
        folder.download("a/large", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_of_two_writers_of_one_version_one_wins(url: str) -> None:
    one, other = store(url), store(url)
    assert one.read_version("x") is None
    assert one.replace("x", b"1", None)
    assert not other.replace("x", b"2", None)
    found = other.read_version("x")
    assert found
    assert found[0] == b"1"
    assert other.replace("x", b"2", found[1])
    assert not one.replace("x", b"3", found[1])
    assert one.read("x") == b"2"


def test_a_store_that_knows_no_conditions_is_compared_with_first(
    server: S3Server, bucket: str
) -> None:
    folder = store(bucket)
    # Every other write is the one without a condition.
    refused = itertools.cycle([status(501), None])
    server.inject(refused, lambda method, _: method == "PUT")
    assert folder.replace("x", b"1", None)
    found = folder.read_version("x")
    assert found
    assert folder.replace("x", b"2", found[1])
    server.inject(itertools.repeat(status(501)), lambda method, _: method == "PUT")
    assert not folder.replace("x", b"3", found[1])
    assert folder.read("x") == b"2"


@pytest.mark.parametrize("fault", [DROP, LOSE, status(503), status(500)])
def test_requests_that_fail_are_made_again(
    server: S3Server, bucket: str, large: Path, tmp_path: Path, fault: object
) -> None:
    folder = store(bucket)
    server.inject(itertools.cycle([None, fault]))  # type: ignore[list-item]
    folder.upload("large", large)
    assert folder.download("large", tmp_path / "again") == SIZE
    server.inject(())
    assert (tmp_path / "again").read_bytes() == large.read_bytes()
    assert folder.figures["retries"] > 0


def test_an_upload_that_fails_for_good_leaves_nothing(
    server: S3Server, bucket: str, large: Path
) -> None:
    folder = store(bucket, tries=2)
    server.inject(itertools.repeat(status(503)), lambda _, path: "partNumber=2" in path)
    with pytest.raises(StorageError, match="storage failed 2 times"):
        folder.upload("large", large)
    server.inject(())
    assert folder.sizes() == {}
    assert unfinished(folder) == 0


def unfinished(folder: Store) -> int:
    """Uploads in parts that have begun and not ended."""
    bucket = folder._root.partition("/")[0]
    found = folder._fs.call_s3("list_multipart_uploads", Bucket=bucket)
    return len(found.get("Uploads", []))


def test_a_kill_in_mid_upload_leaves_nothing_visible_and_is_cleared(
    server: S3Server, bucket: str, large: Path
) -> None:
    folder = store(bucket)
    server.inject(itertools.repeat(slow(60)), lambda _, path: "partNumber=3" in path)
    code = (
        "import sys; from trainer.store import Store; "
        "from trainer.storage import StorageConfig; "
        "Store(sys.argv[1], StorageConfig()).upload('checkpoints/large', sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, bucket, large], cwd=ROOT)
    wait_until(lambda: any("partNumber=3" in p for _, p in server.requests), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.inject(())
    assert folder.sizes() == {}
    assert unfinished(folder) == 1
    folder.abort_uploads("elsewhere")
    assert unfinished(folder) == 1
    folder.abort_uploads("checkpoints")
    assert unfinished(folder) == 0


def test_a_lease_has_one_holder_who_is_asked_to_go_or_must_be_dead(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(store(bucket), "launcher")
    first.take()
    for writer in (None, "another"):
        with pytest.raises(ValueError, match="another trainer is writing"):
            Lease(store(bucket), writer).take()
    first.check()
    # The same launcher's next trainer.
    second = Lease(store(bucket), "launcher")
    second.take()
    with pytest.raises(ValueError, match="another trainer took over"):
        first.check()
    first.release()
    second.check()
    # As of a machine that is gone: nobody renews it.
    second._stop.set()
    held = store(bucket).read(LEASE)
    server.put(f"{bucket}/{LEASE}", held.replace(b'"machine": "', b'"machine": "an'))
    monkeypatch.setattr(lease, "DEAD_SECONDS", 2.0)
    third = Lease(store(bucket), None)
    third.take()
    third.check()
    third.release()
    assert store(bucket).sizes() == {}


def test_a_lease_of_a_dead_process_of_this_machine_is_free_at_once(bucket: str) -> None:
    code = (
        "import sys; from trainer.lease import Lease; from trainer.store import Store; "
        "from trainer.storage import StorageConfig; "
        "Lease(Store(sys.argv[1], StorageConfig()), None).take(); "
        "import os; os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, bucket], check=True, cwd=ROOT)
    assert list(store(bucket).sizes()) == [LEASE]
    next_one = Lease(store(bucket), None)
    next_one.take()
    next_one.release()
