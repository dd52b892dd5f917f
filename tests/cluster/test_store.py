"""Small files of a run: whole or not there, on a disk and on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from cluster.journal import Journal
from cluster.store import Store, run_id
from tests.conftest import free_port
from tests.pipeline.s3 import S3Server, status


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "run"))
    server: S3Server = request.getfixturevalue("server")
    return Store(f"{server.bucket(monkeypatch)}/run")


def test_what_is_written_is_read_back(store: Store) -> None:
    assert store.names() == []
    assert store.read("a.json") is None
    assert store.tail("a.json", 3) is None
    store.refuse_unwritable()
    store.write("a.json", b"first")
    store.write("a.json", b"second")
    store.below("deeper").write("b", b"1")
    assert store.read("a.json") == b"second"
    assert store.tail("a.json", 3) == b"ond"
    assert store.tail("a.json", 100) == b"second"
    assert store.names() == ["a.json"]
    store.remove("a.json")
    store.remove("a.json")
    assert store.names() == []
    assert store.below("deeper").read("b") == b"1"


def test_errors_of_the_server_are_weathered(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"{server.bucket(monkeypatch)}/run")
    server.inject([status(503), status(503)])
    store.write("a", b"1")
    server.inject([status(500)])
    assert store.read("a") == b"1"


def test_storage_that_is_away_is_an_error_of_the_system(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's own is none, and would end the driver that writes an event down."""
    monkeypatch.setattr("cluster.store._TRIES", 1)
    bucket = server.bucket(monkeypatch)
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        away.setenv("AWS_MAX_ATTEMPTS", "1")
        S3FileSystem.clear_instance_cache()
        store = Store(f"{bucket}/run")
        with pytest.raises(OSError, match="Could not connect"):
            store.read("a")
        told: list[str] = []
        Journal(store, told.append).write("note", text="hello")
        assert "is not written" in told[-1]
    S3FileSystem.clear_instance_cache()


def test_a_run_has_one_name_however_it_is_written(tmp_path: Path) -> None:
    """The lock against a second driver has it."""
    (tmp_path / "link").symlink_to(tmp_path)
    same = [tmp_path / "run", f"{tmp_path}/run/", f"file://{tmp_path}/run"]
    assert len({run_id(str(one)) for one in (*same, tmp_path / "link" / "run")}) == 1
    assert run_id("s3://bucket/run/") == run_id("s3://bucket/run")
    assert run_id("s3://bucket/run") != run_id("s3://bucket/run2")


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(ValueError, match="is relative, and a job runs in a temporary"):
        Store("runs/first")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="s4://bucket"):
        Store("s4://bucket/run")


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_where_nothing_can_be_written_is_said(
    where: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    bucket = server.bucket(monkeypatch)
    url = str(tmp_path / "file" / "run") if where == "disk" else f"{bucket}-not/run"
    with pytest.raises(OSError, match=r"cannot write to .*; check that it exists"):
        Store(url).refuse_unwritable()


def test_errors_of_a_client_are_tried_again_and_end_as_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """botocore's NoCredentialsError and EndpointConnectionError are no OSError."""
    monkeypatch.setattr("cluster.store._FIRST_WAIT_S", 0)
    store = Store("memory://errors/run")
    store.write("a", b"1")
    failing = iter([Exception("away"), Exception("away")])

    def cat(path: str, **_: object) -> bytes:
        for error in failing:
            raise error
        return b"1"

    monkeypatch.setattr(store._fs, "cat_file", cat)
    assert store.read("a") == b"1"
    failing = iter([Exception("no credentials")] * 4)
    with pytest.raises(OSError, match=r"errors/run: no credentials; check that this"):
        store.read("a")
