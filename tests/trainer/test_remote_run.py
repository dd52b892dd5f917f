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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tests.conftest import ROOT, launch_environment, python
from tests.pipeline.s3 import S3Server, held, slow, status
from tests.trainer.apart import apart_command, home
from tests.trainer.datasets import growing_copy, show
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    config,
    launch,
    metrics,
    steps_taken,
    succeeds,
    wait_until,
    with_faults,
)
from trainer import checkpoint
from trainer.check import check
from trainer.contract import (
    FROZEN,
    complete_checkpoints,
    complete_steps,
    parse_rows,
    read_metrics,
)
from trainer.evaluate import main as evaluate
from trainer.export import main as export
from trainer.lease import LEASE, Lease
from trainer.local_run import local_run
from trainer.replay import main as replay
from trainer.report.__main__ import main as report
from trainer.run_copy import RunCopy
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
    return succeeds(apart_command(ranks, *TINY, *words))


def test_nodes_that_share_no_disk_take_the_steps_of_a_local_run(
    url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    words = (f"--data={shards}", f"--output={url}", "--checkpoint.every_steps=2")
    printed = launch_apart(2, *words, "--max_steps=7")
    assert "stopped after step 7" in printed
    there = files(url)
    assert complete_steps(there) == [6, 7]
    assert "complete.json" not in there
    homes = [home(tmp_path / "homes", rank) for rank in range(2)]
    assert [len([*at.rglob("metrics.jsonl")]) for at in homes] == [1, 0]
    # One machine that has never seen the run.
    shutil.rmtree(tmp_path / "homes")
    printed = launch_apart(1, *words)
    assert "resuming after step 7" in printed
    assert "step-00000007 is here: fetched" in printed
    run = copy_of(url, tmp_path / "copy")
    assert column(run, "sample_digest") == column(whole, "sample_digest")
    for name in ("step", "loss", "grad_norm", "lr"):
        assert column(run, name)[:7] == column(whole, name)[:7]
    # Sums in another order, as on one disk.
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=2e-3)
    assert (run / "complete.json").read_text() == (whole / "complete.json").read_text()
    names = [path.name for path in run.rglob("*") if path.is_file()]
    assert not [name for name in names if name.startswith((".", "tmp-"))]
    assert [step for step, _ in complete_checkpoints(run)] == [10, 12]


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


def test_kills_during_uploads_lose_no_complete_checkpoint(
    server: S3Server, url: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
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
    goal, server.requests[:] = random.Random(seed).randrange(1, 4), []
    kill_when(lambda: uploading(goal), *words)
    second = complete_steps(files(url))
    assert first[-1] < second[-1] < 12, seed
    server.inject(())
    shutil.rmtree(tmp_path / "homes")
    assert f"resuming after step {second[-1]}" in launch_apart(2, *words)
    run = copy_of(url, tmp_path / "copy")
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(run, name) == column(whole, name), seed
    own, local = (complete_checkpoints(one)[-1][1] for one in (run, whole))
    weights = checkpoint.load_weights(local)
    for name, value in checkpoint.load_weights(own).items():
        assert (value == weights[name]).all()
    assert len(json.dumps(checkpoint.read_marker(own))) < 1024
    names = files(url)
    assert complete_steps(names) == [11, 12]
    # Nothing of attempts that died: two parts, two records and a marker each.
    assert len([name for name in names if name.startswith("checkpoints/")]) == 5 * 2


def test_what_was_frozen_outlives_a_kill_and_the_node_that_froze_it(
    url: str, mixed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    whole = growing_copy(mixed, copy)
    show(copy, whole, 4)
    words = (
        *("--lanes=4", "--global_batch=8", "--micro_batch=4", "--mixture=none"),
        *(f"--data={copy}", f"--output={url}", "--grow=true"),
        *("--schedule.steps=4000", "--checkpoint.every_steps=4000"),
    )

    def written() -> Path:
        found = home(tmp_path / "homes", 0).rglob("metrics.jsonl")
        return next(found, tmp_path / "metrics.jsonl").parent

    # Eight steps an epoch: the second one begins before anything else is there.
    kill_when(lambda: steps_taken(written()) > 11, *words)
    before = [row["sample_digest"] for row in read_metrics(written())]
    shutil.rmtree(tmp_path / "homes")
    show(copy, whole, len(whole.shards))
    launch_apart(1, *words, f"--max_steps={len(before)}")
    run = copy_of(url, tmp_path / "copy")
    assert column(run, "sample_digest") == before


def test_a_late_request_does_not_replace_what_the_next_trainer_has_frozen(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    """Two trainers of one launcher, each on a node of its own: the lease passes at
    once, while a request of the first is on its way.
    """
    first, second = (
        RunCopy(
            config(
                shards,
                tmp_path,
                f"--output={url}",
                "--storage.writer=launcher",
                f"--storage.work={tmp_path / name}",
            )
        )
        for name in ("first", "second")
    )

    def freeze(copy: RunCopy, text: str) -> None:
        (copy.path / FROZEN).write_text(text)
        copy.bring(FROZEN)

    def puts() -> list[str]:
        frozen = f"/{FROZEN}"
        return [
            path
            for method, path in server.requests
            if method == "PUT" and path.partition("?")[0].endswith(frozen)
        ]

    for copy in (first, second):
        copy.path.mkdir(parents=True)
    first.begin(0)
    assert first.read(FROZEN) is None
    freeze(first, "early")
    arrives = threading.Event()
    server.inject(
        [held(arrives)], lambda *request: request[0] == "PUT" and bool(puts())
    )
    server.requests.clear()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(freeze, first, "late")
        deadline = time.monotonic() + 60
        while not puts():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second.begin(0)
        assert second.read(FROZEN) == b"early"
        freeze(second, "second")
        arrives.set()
        with pytest.raises(ValueError, match="another trainer took over"):
            late.result()
    assert second.read(FROZEN) == b"second"
    # Somebody may have deleted it meanwhile.
    second.store.remove([FROZEN])
    freeze(second, "third")
    assert second.read(FROZEN) == b"third"
    for copy in (first, second):
        copy.close()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_give_the_losses_of_an_undisturbed_run(
    server: S3Server, url: str, shards: Path, tmp_path: Path
) -> None:
    longer = (f"--data={shards}", "--schedule.steps=300", "--checkpoint.every_steps=3")
    launch(2, *longer, f"--output={tmp_path / 'whole'}")
    words = (*longer, f"--output={url}")
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    server.inject(itertools.repeat(slow(0.1)), lambda method, _: method == "PUT")
    newest, inside = 0, 0
    for number in range(10):
        began, wait_s = time.monotonic(), draw.uniform(0, 3)

        def later(newest: int = newest, wait_s: float = wait_s) -> bool:
            nonlocal began
            if (complete_steps(files(url)) or [0])[-1] == newest:
                began = time.monotonic()
            return time.monotonic() > began + wait_s

        kill_when(later, *words)
        steps = complete_steps(files(url))
        assert steps[-1] > newest, seed
        run = copy_of(url, tmp_path / f"copy-{number}")
        for step, path in complete_checkpoints(run):
            assert checkpoint.load_weights(path)
            assert checkpoint.read_marker(path)["step"] == step
        rows = [row["step"] for row in read_metrics(run)]
        assert rows[: steps[-1]] == list(range(1, steps[-1] + 1)), seed
        begun = {n.split("/")[1] for n in files(url) if n.startswith("checkpoints/")}
        inside += len(begun) > len(steps)
        print(f"kill {number}: newest {steps[-1]}, begun {sorted(begun)}")
        newest = steps[-1]
        for rank in range(2):
            if draw.random() < 0.5:
                shutil.rmtree(home(tmp_path / "homes", rank))
    assert inside, "no kill fell into the upload of a checkpoint"
    server.inject(())
    launch_apart(2, *words)
    run = copy_of(url, tmp_path / "copy")
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(run, name) == column(tmp_path / "whole", name), seed


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


def test_a_trainer_that_lost_its_run_to_the_next_stops_and_changes_nothing(
    url: str, shards: Path, tmp_path: Path
) -> None:
    words = (f"--data={shards}", f"--output={url}", "--checkpoint.every_steps=1")
    endless = ("--storage.writer=launcher", "--schedule.steps=10000")
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "trainer.pretrain", *TINY, *words, *endless],
            cwd=ROOT,
            env=launch_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            wait_until(lambda: bool(complete_steps(files(url))), process, log.read_text)
            following = Lease(Store(url, StorageConfig()), "launcher")
            following.take()
            # At most what it was about to complete.
            most = complete_steps(files(url))[-1] + 1
            assert process.wait(LAUNCH_LIMIT_S) == 1
        finally:
            process.kill()
    assert "another trainer took over" in log.read_text()
    assert "Traceback" not in log.read_text()
    following.check()
    following.release()
    assert complete_steps(files(url))[-1] <= most


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
    with pytest.raises(ValueError, match=f"{url} is no run"):
        replay([url, "--step=3"])
    fsspec.core.url_to_fs(url)[0].put(str(whole), url, recursive=True)
    evaluate([url, "--examples=1", "--max_pairs=8", "--draws=1"])
    assert replay([url, "--step=3"]) == 0
    export([url, str(tmp_path / "model")])
    report([url, str(whole), f"--output={tmp_path / 'report.html'}"])
    assert {"probes.json", "config.yaml", "complete.json"} <= files(url).keys()
    assert "url" not in (tmp_path / "model" / "README.md").read_text()
    assert "probes" in (tmp_path / "report.html").read_text()
    rows = parse_rows(fsspec.open(f"{url}/metrics.jsonl", "r").open().read())
    assert rows == read_metrics(whole)


def test_readers_at_once_lose_nothing_and_bring_nothing_old_back(url: str) -> None:
    """As an evaluation and a report on one machine, while a trainer goes on."""
    store = Store(url, StorageConfig())
    store.write("metrics.jsonl", b"1")
    with local_run(url) as evaluation:
        (evaluation / "probes.json").write_text("{}")
        store.write("metrics.jsonl", b"12")
        with local_run(url) as other:
            assert (other / "metrics.jsonl").read_bytes() == b"12"
        store.write("metrics.jsonl", b"123")
    assert store.read("metrics.jsonl") == b"123"
    assert store.read("probes.json") == b"{}"
