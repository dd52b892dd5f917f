"""A run behind a URL is the run on a disk, on nodes that share none; and it survives
kills at any moment.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.conftest import launch_environment
from tests.pipeline.s3 import S3Server
from tests.trainer.apart import apart_command, home
from tests.trainer.sequence import launch_all
from tests.trainer.tiny import LAUNCH_LIMIT_S, TINY, column
from trainer import checkpoint
from trainer.contract import complete_checkpoints, complete_steps


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
    assert "MB of step-00000007" in printed
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
