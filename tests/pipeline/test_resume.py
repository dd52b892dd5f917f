"""Killing anything at any moment changes nothing in the finished dataset."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.lease import Lease
from pipeline.manifest import load_manifest
from pipeline.storage import STAGING, open_storage
from tests.pipeline.corpora import REPOSITORY, Run, encoded, picture, write_table
from tests.pipeline.kills import suspend
from tests.pipeline.test_preprocess import files

# Large output images and a filter that takes its time: a run lasts long enough to be
# hit in the middle.
N_INPUTS = 40
WORKERS = 2
FLAGS = (
    *("--shard.samples=2", "--image.size=640", "--split.val=0.2"),
    "--filter.function=paced_filter:keep",
)
LIMIT_S = 300
_FILTER = """
import os, time

def keep(candidate):
    time.sleep(float(os.environ.get("PACE_S", "0")))
"""


@pytest.fixture(scope="module", autouse=True)
def filter_function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `FLAGS` name, for every process that is started here."""
    folder = tmp_path_factory.mktemp("filter")
    (folder / "paced_filter.py").write_text(_FILTER)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    rows = []
    for seed in range(N_INPUTS):
        (folder / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
        rows.append({"image": f"{seed}.jpg", "caption": f"picture number {seed}"})
    return write_table(folder / "plain.csv", rows)


@pytest.fixture(scope="module")
def undisturbed(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, preprocess: Run
) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "plain"
    result = preprocess(f"--input={plain}", f"--output={output}", *FLAGS, "--workers=1")
    assert result.returncode == 0, result.stderr
    return output


def start(corpus: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.preprocess", f"--input={corpus}"]
    return subprocess.Popen(
        [*command, f"--output={output}", *FLAGS, f"--workers={WORKERS}"],
        cwd=REPOSITORY,
        env={**os.environ, "PACE_S": "0.1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert driver.poll() is None, "the run ended before it was hit"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def staged(output: Path) -> int:
    return len(list((output / ".palimpsest" / "candidates").glob("*.json")))


def test_a_killed_driver_continues_to_the_same_bytes(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "plain"
    driver = start(plain, output)
    wait_for(lambda: staged(output) >= 3, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert 3 <= staged(output) < N_INPUTS // 2
    assert (output / ".palimpsest" / "lease.json").exists()
    with pytest.raises(ValueError, match=r"still being written|no manifest\.json"):
        load_manifest(output)
    # What a death between the copies of a commit and its record leaves behind.
    (output / "train").mkdir()
    (output / "train" / "shard-000003.tar").write_bytes(b"of another attempt")

    result = preprocess(f"--input={plain}", f"--output={output}", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert files(output) == files(undisturbed)


def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(
    plain: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plain"
    driver = start(plain, output)
    wait_for(lambda: staged(output) >= 1, driver)
    victims: list[psutil.Process] = []

    def found() -> bool:
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if "_run_task" in " ".join(process.cmdline()):
                    victims.append(process)
            except psutil.Error:
                continue
        return bool(victims)

    wait_for(found, driver)
    victims[0].kill()
    assert driver.wait(timeout=LIMIT_S) == 0
    assert files(output) == files(undisturbed)


def test_a_worker_killed_at_its_start_is_replaced(
    plain: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plain"
    driver = start(plain, output)
    victims: list[psutil.Process] = []

    def found() -> bool:
        for process in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words[1:2] and words[1].endswith("/default_worker.py"):
                    victims.append(process)
        return bool(victims)

    wait_for(found, driver)
    victims[0].kill()
    assert driver.wait(timeout=LIMIT_S) == 0
    assert files(output) == files(undisturbed)


def test_a_second_driver_is_refused(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "plain"
    state = output / ".palimpsest"
    state.mkdir(parents=True)
    with Lease(open_storage(output)):
        result = preprocess(f"--input={plain}", f"--output={output}", *FLAGS)
        assert result.returncode == 1
        assert f"being written by process {os.getpid()}" in result.stderr
        assert "wait for it or stop it" in result.stderr
        assert files(output).keys() == {".palimpsest/lease.json"}
    assert files(output) == {}


def test_a_finished_dataset_is_tidied_and_its_lost_files_are_made_again(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "plain"
    shutil.copytree(undisturbed, output)
    state = output / ".palimpsest"
    (state / "staging").mkdir()
    (state / "staging" / "torn").write_bytes(b"torn")
    (state / "lease.json").write_text("{}")
    progress = output.with_name(f"{output.name}.progress.json")
    progress.write_text('{"phase": "commit"}')
    progress.with_name(f"{progress.name}.0.tmp").write_text("torn")
    flags = (f"--input={plain}", f"--output={output}", *FLAGS, "--workers=1")
    result = preprocess(*flags)
    assert result.returncode == 0, result.stderr
    assert "already complete" in result.stderr
    assert files(output) == files(undisturbed)
    assert not (state / "staging").exists()
    assert json.loads(progress.read_text())["phase"] == "complete"
    assert set(tmp_path.iterdir()) == {output, progress}

    (output / "train" / "shard-000002.tar").unlink()
    short = output / "train" / "shard-000005.tar"
    short.write_bytes(short.read_bytes()[:-1024])
    result = preprocess(*flags)
    assert result.returncode == 0, result.stderr
    assert "lacks train/shard-000002.tar" in result.stderr
    assert files(output) == files(undisturbed)


@pytest.mark.parametrize("damage", ["lost", "torn", "other"])
def test_a_damaged_tokenizer_is_trained_again_to_the_same_bytes(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run, damage: str
) -> None:
    output = tmp_path / "plain"
    shutil.copytree(undisturbed, output)
    stored = output / "tokenizer" / "tokenizer.json"
    whole = stored.read_bytes()
    if damage == "lost":
        stored.unlink()
    else:
        text = whole[:99] if damage == "torn" else whole.replace(b"picture", b"pictore")
        stored.write_bytes(text)
    flags = (f"--input={plain}", f"--output={output}", *FLAGS, "--workers=1")
    result = preprocess(*flags, "--split.val=0.3")
    assert (result.returncode, "trained" in result.stderr) == (1, False)
    assert "split.val: 0.2 -> 0.3" in result.stderr
    result = preprocess(*flags)
    assert result.returncode == 0, result.stderr
    assert f"tokenizer of {output} is gone or damaged: trained again" in result.stderr
    assert files(output) == files(undisturbed)


def test_a_tokenizer_trained_again_must_be_the_one_that_was_lost(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "plain"
    shutil.copytree(undisturbed, output)
    plan = output / ".palimpsest" / "plan.json"
    described = json.loads(plan.read_text())
    described["transform"]["tokenizer"]["sha256"] = "0" * 64
    plan.write_text(json.dumps(described))
    (output / "tokenizer" / "tokenizer.json").unlink()
    before = files(output)
    flags = (f"--input={plain}", f"--output={output}", *FLAGS, "--workers=1")
    result = preprocess(*flags)
    assert result.returncode == 1
    assert f"tokenizer.sha256: '{'0' * 64}' -> " in result.stderr
    assert files(output) == before


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """Which file each name is, and when it was last written."""
    found = ((name, (output / name).stat()) for name in files(output))
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def runs(process: psutil.Process) -> bool:
    """Nobody may have asked yet how one that has ended did."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_driver_that_lost_its_lease_touches_nothing(
    plain: Path, undisturbed: Path, tmp_path: Path, preprocess: Run
) -> None:
    """A suspended machine wakes up after another driver finished the work. A worker of
    the lost driver may be at a range that nobody will see (`pipeline.storage_local`: a
    directory of its own with a temporary name), and leaves it if it dies there: one
    for each worker at most. The same command removes these.
    """
    output = tmp_path / "plain"
    driver = start(plain, output)
    wait_for(lambda: staged(output) >= 1, driver)
    suspend(driver, output / ".palimpsest")
    lease = output / ".palimpsest" / "lease.json"
    holder = json.loads(lease.read_text())
    lease.write_text(json.dumps({**holder, "expires": 0}))
    flags = (f"--input={plain}", f"--output={output}", *FLAGS, "--workers=1")
    result = preprocess(*flags)
    assert result.returncode == 0, result.stderr
    assert files(output) == files(undisturbed)
    before = stamps(output)
    others = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGCONT)
    assert driver.wait(timeout=LIMIT_S) == 1
    # Its workers die with it, a moment later.
    deadline = time.monotonic() + LIMIT_S
    while any(map(runs, others)):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    left = stamps(output)
    assert {name: left.get(name) for name in before} == before
    unfinished = [name.removeprefix(f"{STAGING}/") for name in left.keys() - before]
    names = {name.partition("/")[0] for name in unfinished}
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names), unfinished
    assert len(names) <= WORKERS, unfinished
    result = preprocess(*flags)
    assert "already complete" in result.stderr
    assert stamps(output) == before
