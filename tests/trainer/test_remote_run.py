"""A run behind a URL is the run on a disk, on nodes that share none; and it survives
kills at any moment.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.conftest import launch_environment, python
from tests.pipeline.s3 import S3Server, slow, status
from tests.trainer.apart import apart_command, home
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    metrics,
    wait_until,
    with_faults,
)
from trainer import checkpoint
from trainer.contract import (
    complete_checkpoints,
    complete_steps,
    parse_rows,
    read_metrics,
)
from trainer.lease import LEASE, Lease
from trainer.loop import check
from trainer.storage import StorageConfig
from trainer.store import Store


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of a run that is not there yet; nodes have their homes below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "homes"))
    return f"{server.bucket(monkeypatch)}/runs/first"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two ranks on a disk."""
    folder = tmp_path_factory.mktemp("whole")
    words = [f"--data={shards}", f"--output={folder / 'run'}"]
    launch_all(2, [[*words, "--checkpoint.every_steps=2"]], folder / "calls.json")
    return folder / "run"


def files(url: str) -> dict[str, int]:
    """Bytes of all files of a run, by their paths below it."""
    fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    found = fs.find(root, detail=True)
    return {path[len(root) + 1 :]: info["size"] for path, info in found.items()}


def copy_of(url: str, folder: Path) -> Path:
    """The run as somebody finds it who downloads it."""
    fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    fs.get(root, str(folder), recursive=True)
    return folder


def launch_apart(ranks: int, *words: str | Path) -> str:
    """Run the launcher on nodes that share no disk to its end; it must succeed."""
    done = subprocess.run(
        apart_command(ranks, *TINY, *words),
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_nodes_that_share_no_disk_take_the_steps_of_a_local_run(
    url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    words = (f"--data={shards}", f"--output={url}", "--checkpoint.every_steps=2")
    printed = launch_apart(2, *words, "--max_steps=7")
    assert "stopped after step 7" in printed
    there = files(url)
    assert complete_steps(there) == [6, 7]
    assert "complete.json" not in there
    copies = [
        [*home(tmp_path / "homes", rank).rglob("metrics.jsonl")] for rank in (0, 1)
    ]
    assert [len(found) for found in copies] == [1, 0]
    # Machines that have never seen the run.
    shutil.rmtree(tmp_path / "homes")
    printed = launch_apart(2, *words)
    assert "resuming after step 7" in printed
    assert "step-00000007 is here: fetched" in printed
    run = copy_of(url, tmp_path / "copy")
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)
    assert (run / "complete.json").read_text() == (whole / "complete.json").read_text()
    names = [path.name for path in run.rglob("*") if path.is_file()]
    assert not [name for name in names if name.startswith((".", "tmp-"))]
    assert [step for step, _ in complete_checkpoints(run)] == [10, 12]
    own = checkpoint.load_weights(complete_checkpoints(run)[-1][1])
    local = checkpoint.load_weights(complete_checkpoints(whole)[-1][1])
    assert all((own[name] == local[name]).all() for name in local)
    state = checkpoint.read_marker(complete_checkpoints(run)[-1][1])
    assert len(json.dumps(state)) < 1024


def test_two_ranks_are_continued_by_one(
    url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    words = (f"--data={shards}", f"--output={url}", "--checkpoint.every_steps=2")
    launch_apart(2, *words, "--max_steps=5")
    # The node of one of the two, which has the half of it.
    shutil.rmtree(home(tmp_path / "homes", 1))
    assert "resuming after step 5" in launch_apart(1, *words)
    run = copy_of(url, tmp_path / "copy")
    assert column(run, "sample_digest") == column(whole, "sample_digest")
    # Sums in another order, as on one disk.
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=2e-3)


def kill_when(reached: Callable[[], bool], *words: str | Path) -> None:
    """Start two ranks on nodes of their own; SIGKILL all as soon as `reached()`."""
    with subprocess.Popen(
        apart_command(2, *TINY, *words),
        env=launch_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_until(reached, process, lambda: "it ended before it could be killed")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_kills_during_uploads_and_at_random_moments_lose_no_complete_checkpoint(
    server: S3Server, url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    words = (f"--data={shards}", f"--output={url}", "--checkpoint.every_steps=1")
    server.inject(itertools.repeat(slow(0.4)), lambda _, path: ".safetensors" in path)

    def uploading(after: int) -> bool:
        """Does a part of a checkpoint that is not complete travel, after some that
        are?
        """
        parts = [path for method, path in server.requests if method == "PUT"]
        names = [path.partition("checkpoints/")[2] for path in parts]
        begun = {name.partition("/")[0] for name in names if ".safetensors" in name}
        done = {n.partition("/")[0] for n in names if n.endswith("complete.json")}
        return len(done) >= after and bool(begun - done)

    kill_when(lambda: uploading(2), *words)
    first = complete_steps(files(url))
    # A node that never saw the run, and one that has its own parts.
    shutil.rmtree(home(tmp_path / "homes", 0))
    goal, server.requests[:] = draw.randrange(1, 4), []
    kill_when(lambda: uploading(goal), *words)
    second = complete_steps(files(url))
    assert first[-1] < second[-1] < 12, seed
    server.inject(())
    shutil.rmtree(tmp_path / "homes")
    assert f"resuming after step {second[-1]}" in launch_apart(2, *words)
    run = copy_of(url, tmp_path / "copy")
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(run, name) == column(whole, name), seed
    steps = complete_steps(names := files(url))
    assert steps == [11, 12]
    # Nothing of attempts that died: two parts, two records and a marker each.
    assert len([name for name in names if name.startswith("checkpoints/")]) == 5 * 2


def test_roll_back_points_travel_too(url: str, shards: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    words = (
        f"--data={shards}",
        "--micro_batch=12",
        "--max_steps=9",
        "--safety.spike_action=roll_back",
        "--safety.spike_window=3",
        "--safety.spike_threshold=20",
        "--safety.roll_back_steps=3",
        "--checkpoint.every_steps=4",
    )
    faults = {"spike": [5], "rank": 0}
    done = with_faults(1, faults, *words, f"--output={local}")
    assert done.returncode == 0, done.stdout
    assert metrics(local)[4]["rolled_back_to"] == 3
    # Killed before it has gone back; then on another machine.
    done = with_faults(1, faults | {"kill": 5}, *words, f"--output={url}")
    assert done.returncode == -signal.SIGKILL, done.stdout
    assert complete_steps(name.removeprefix("roll_back/") for name in files(url))
    shutil.rmtree(tmp_path / "homes")
    done = with_faults(1, faults, *words, f"--output={url}")
    assert done.returncode == 0, done.stdout
    assert "resuming after step" in done.stdout
    run = copy_of(url, tmp_path / "copy")
    for name in ("step", "sample_digest", "loss", "grad_norm", "skipped"):
        assert column(run, name) == column(local, name)


def test_a_run_that_somebody_writes_is_refused_and_left_alone(
    server: S3Server, url: str, shards: Path
) -> None:
    holder = Lease(Store(url, StorageConfig()), None)
    holder.take()
    try:
        done = python(
            "-m",
            "trainer.pretrain",
            *TINY,
            f"--data={shards}",
            f"--output={url}",
            env=launch_environment(),
        )
        assert done.returncode == 1, done.stdout
        assert f"another trainer is writing to {url}" in done.stdout
        assert "Traceback" not in done.stdout
        assert list(files(url)) == [LEASE]
        holder.check()
    finally:
        holder.release()
    assert not files(url)


def test_storage_that_cannot_be_written_is_told_before_training(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    bucket = url.removeprefix("s3://").partition("/")[0]
    with pytest.raises(ValueError, match="there is no such bucket; create it"):
        check(config(shards, Path("unused"), f"--output=s3://no-{bucket}/run"))
    server.inject(itertools.repeat(status(403)), lambda method, _: method == "PUT")
    with pytest.raises(PermissionError, match=r"cannot be written to.*credentials"):
        check(config(shards, Path("unused"), f"--output={url}"))
    server.inject(())
    with pytest.raises(ValueError, match="give a path, s3://, gs://"):
        check(config(shards, Path("unused"), "--output=s4://bucket/run"))
    with pytest.raises(ValueError, match="pip install gcsfs"):
        check(config(shards, Path("unused"), "--output=gs://bucket/run"))
    assert not (tmp_path / "homes").exists()
    assert not files(url)


def test_tools_read_a_run_behind_a_url(
    url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    fsspec.core.url_to_fs(url)[0].put(str(whole), url, recursive=True)
    for words in (
        ("trainer.evaluate", url, "--examples=1", "--max_pairs=8", "--draws=1"),
        ("trainer.replay", url, "--step=3"),
        ("trainer.export", url, tmp_path / "model"),
        ("trainer.report", url, whole, "--output", tmp_path / "report.html"),
    ):
        done = python("-m", *words)
        assert done.returncode == 0, done.stdout
    assert {"probes.json", "config.yaml", "complete.json"} <= files(url).keys()
    assert "url" not in (tmp_path / "model" / "README.md").read_text()
    assert "probes" in (tmp_path / "report.html").read_text()
    rows = parse_rows(fsspec.open(f"{url}/metrics.jsonl", "r").open().read())
    assert rows == read_metrics(whole)
