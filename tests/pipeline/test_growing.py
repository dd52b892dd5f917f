"""A dataset that is committed while it is being written: what a trainer may rely on
that reads it meanwhile, and that nothing of this shows in the finished bytes.

Bundled emoji, a few of them no images, in many small ranges and one split, so that
nothing is compared. The user's own filter makes a run as slow as a test wants it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commits import Commits
from pipeline.config import parse
from pipeline.dataset import DatasetWriter
from pipeline.manifest import Manifest, file_sha256, load_manifest
from pipeline.options import PreprocessConfig
from pipeline.records import read_record
from pipeline.settle import place_range
from pipeline.staging import TakenOver
from pipeline.storage import STAGING, open_storage
from tests.conftest import EMOJI
from tests.pipeline.corpora import REPOSITORY, Run, run_module
from tests.pipeline.kills import suspend
from tests.pipeline.runs import TOKENIZER, LocalRun, silent
from tests.pipeline.s3 import DROP, LOSE, Fault, S3Server, status
from tests.pipeline.test_preprocess import files

N_INPUTS, SAMPLES = 120, 4
N_RANGES = N_INPUTS // SAMPLES
# One range has none that can be read, and makes no shard.
BAD = (9, *range(20, 24))
LIMIT_S = 200
FLAGS = (
    *(f"--shard.samples={SAMPLES}", "--image.size=32", "--split.val=0"),
    *("--columns.image=image", "--columns.caption=caption", "--columns.keep=gate"),
    *("--filter.function=paced_filter:keep", f"--image.time_limit_s={LIMIT_S}"),
)
_FILTER = """
import os, pathlib, time

def keep(candidate):
    time.sleep(float(os.environ.get("PACE_S", "0")))
    if (gate := candidate.columns["gate"]) and "GATES" in os.environ:
        while not pathlib.Path(os.environ["GATES"], gate).exists():
            time.sleep(0.01)
"""
_FAULTS: tuple[Fault | None, ...] = (
    *(status(503), *(None,) * 6, DROP, *(None,) * 7, LOSE, *(None,) * 6),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table, with the filter and a tokenizer in its folder."""
    folder = tmp_path_factory.mktemp("growing")
    emoji = pq.read_table(EMOJI).slice(0, N_INPUTS).to_pydict()
    images = emoji["image"]
    for place in BAD:
        images[place] = b"no image"
    gates = [""] * N_INPUTS
    gates[0], gates[-1] = "first", "last"
    table = {"image": images, "caption": emoji["caption"], "gate": gates}
    pq.write_table(pa.table(table), folder / "emoji.parquet")
    (folder / "paced_filter.py").write_text(_FILTER)
    TOKENIZER.write(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an undisturbed run of two workers."""
    output = tmp_path_factory.mktemp("whole") / "out"
    result = run_module(
        "pipeline.preprocess",
        *flags(corpus, output, workers=2),
        env=environment(corpus),
    )
    assert result.returncode == 0, result.stderr
    assert f"{N_RANGES}/{N_RANGES} ranges committed" in result.stderr
    return output


def flags(corpus: Path, output: Path | str, *, workers: int) -> list[str]:
    table, tokenizer = corpus / "emoji.parquet", corpus / "tokenizer"
    given = [f"--input={table}", f"--output={output}", f"--tokenizer={tokenizer}"]
    return [*given, *FLAGS, f"--workers={workers}"]


def environment(corpus: Path, **more: object) -> dict[str, str]:
    return {"PYTHONPATH": str(corpus), **{key: str(more[key]) for key in more}}


def start(
    corpus: Path, output: Path, *, workers: int, **more: object
) -> subprocess.Popen[bytes]:
    words = flags(corpus, output, workers=workers)
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.preprocess", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment(corpus, **more)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def await_that(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S / 2
    while not condition():
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(driver: subprocess.Popen[bytes]) -> None:
    if driver.poll() is None:
        driver.kill()
    driver.wait()


def staged(output: Path) -> int:
    return len(list((output / ".palimpsest" / "candidates").glob("*.json")))


def committed(output: Path) -> int:
    return len(list((output / ".palimpsest" / "ranges").glob("*.json")))


def seen(output: Path) -> Manifest | None:
    """The manifest as a reader finds it; None where it is just being replaced."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        return load_manifest(output, allow_incomplete=True)
    return None


def damaged(output: Path, digests: dict[str, str]) -> list[str]:
    """Files that are not, or not yet, what their digests say."""
    return [
        name
        for name, digest in digests.items()
        if not (output / name).exists() or file_sha256(output / name) != digest
    ]


def listed(manifest: Manifest) -> dict[str, str]:
    """Digests of every file that a manifest speaks of."""
    found = dict(manifest.files)
    for shard in manifest.shards:
        found |= {name: shard.sha256[key] for key, name in shard.files.items()}
    return found


def told(output: Path) -> dict[str, Any]:
    path = output.with_name(f"{output.name}.progress.json")
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_reader_sees_a_growing_whole_prefix_of_the_finished_dataset(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    driver = start(corpus, output, workers=1, PACE_S=0.2)
    early: list[Manifest] = []
    figures: list[int] = []
    try:
        while driver.poll() is None:
            manifest, writing = seen(output), 0 < staged(output) < N_RANGES
            if manifest and writing and manifest not in early:
                assert damaged(output, listed(manifest)) == []
                assert not manifest.complete
                manifest.accounting.check()
                early.append(manifest)
            state = told(output)
            if state.get("phase") == "preprocess" and state["ranges"]:
                figures.append(state["ranges"]["committed"])
                assert state["ranges"]["total"] == N_RANGES
                assert figures[-1] <= committed(output)
                assert SAMPLES * figures[-1] <= state["finished"] <= state["done"]
                assert state["done"] <= state["total"] == N_INPUTS
            time.sleep(0.05)
    finally:
        end(driver)
    assert driver.returncode == 0
    assert figures == sorted(figures)
    assert len({count for count in figures if 0 < count < N_RANGES}) > 2
    final = load_manifest(output)
    lengths = [len(manifest.shards) for manifest in early]
    assert lengths == sorted(lengths)
    assert len({count for count in lengths if 0 < count < len(final.shards)}) > 1
    for manifest in early:
        assert manifest.shards == final.shards[: len(manifest.shards)]
        assert manifest.tokenizer == final.tokenizer
        assert listed(manifest).items() <= listed(final).items()
    assert files(output) == files(whole)


def test_a_range_is_committed_once_it_and_all_before_it_are_written(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    output, gates = tmp_path / "out", tmp_path / "gates"
    gates.mkdir()
    driver = start(corpus, output, workers=2, GATES=gates)
    try:
        # The first is still being written, as is the last: all others have to wait.
        await_that(lambda: staged(output) == N_RANGES - 2, driver)
        assert committed(output) == 0
        assert not (output / "manifest.json").exists()
        (gates / "first").touch()
        await_that(lambda: committed(output) == N_RANGES - 1, driver)
        assert staged(output) == N_RANGES - 1
        await_that(lambda: seen(output) is not None, driver)
        (gates / "last").touch()
        assert driver.wait(LIMIT_S) == 0
    finally:
        end(driver)
    assert files(output) == files(whole)


def config_of(corpus: Path, output: Path) -> PreprocessConfig:
    words = flags(corpus, output, workers=1)
    return parse(PreprocessConfig, words, prog="", description="")


def test_committing_at_the_end_gives_the_same_bytes(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of a run that compares: all are written, all settled, all placed."""
    monkeypatch.syspath_prepend(corpus)
    run = LocalRun(config_of(corpus, tmp_path / "out"))
    assert not run.work.comparison.needed
    run.committed().finish(run.described, TOKENIZER)
    assert files(tmp_path / "out") == files(whole)


def kill_a_worker(driver: subprocess.Popen[bytes]) -> bool:
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_run_task" in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def killed(corpus: Path, output: Path, *, workers: int, at: int, pause: float) -> None:
    """A run that loses a worker after `at` commits, and its driver some later."""
    driver = start(corpus, output, workers=workers, PACE_S=0.05)
    try:
        await_that(lambda: committed(output) >= at, driver)
        await_that(lambda: kill_a_worker(driver), driver)
        await_that(lambda: committed(output) >= at + 2, driver)
        time.sleep(pause)
    finally:
        end(driver)


def test_killed_while_it_grows_it_keeps_a_prefix_and_ends_in_the_same_bytes(
    corpus: Path, whole: Path, tmp_path: Path, preprocess: Run
) -> None:
    output, draw = tmp_path / "out", random.Random(0)
    final = load_manifest(whole)
    for workers, at in ((2, 2), (1, 12)):
        pause = draw.uniform(0, 0.3)
        killed(corpus, output, workers=workers, at=at, pause=pause)
        records = sorted((output / ".palimpsest" / "ranges").glob("*.json"))
        assert at < len(records) < N_RANGES
        names = [f"{number:06d}" for number in range(len(records))]
        assert [path.stem for path in records] == names
        found = [read_record(path.read_bytes()) for path in records]
        shards = tuple(shard for record in found for shard in record.shards)
        assert shards == final.shards[: len(shards)]
        for shard in shards:
            digests = {name: shard.sha256[key] for key, name in shard.files.items()}
            assert damaged(output, digests) == []
        if manifest := seen(output):
            assert manifest.shards == final.shards[: len(manifest.shards)]
    result = preprocess(*flags(corpus, output, workers=2), env=environment(corpus))
    assert result.returncode == 0, result.stderr
    assert f"continuing: {len(records)} of {N_RANGES} ranges" in result.stderr
    assert files(output) == files(whole)


def test_a_driver_that_lost_its_lease_commits_nothing_more(
    corpus: Path, whole: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "out"
    driver = start(corpus, output, workers=2, PACE_S=0.2)
    try:
        await_that(lambda: committed(output) >= 3, driver)
        suspend(driver, output / ".palimpsest")
        lease = output / ".palimpsest" / "lease.json"
        holder = json.loads(lease.read_text())
        lease.write_text(json.dumps({**holder, "expires": 0}))
        before = committed(output)
        assert before < N_RANGES
        result = preprocess(*flags(corpus, output, workers=2), env=environment(corpus))
        assert result.returncode == 0, result.stderr
        assert f"continuing: {before} of {N_RANGES} ranges" in result.stderr
        driver.send_signal(signal.SIGCONT)
        assert driver.wait(LIMIT_S) == 1
    finally:
        end(driver)
    # Its workers die with it, one perhaps in the middle of a write that nobody sees.
    left = {
        name: data
        for name, data in files(output).items()
        if not name.startswith(f"{STAGING}/")
    }
    assert left == files(whole)


def test_a_retry_grows_behind_the_manifest_of_before(
    corpus: Path, whole: Path, tmp_path: Path, preprocess: Run
) -> None:
    made = []
    for workers in (1, 2):
        output = tmp_path / str(workers)
        shutil.copytree(whole, output)
        result = preprocess(
            *flags(corpus, output, workers=workers),
            "--retry_failed",
            env=environment(corpus),
        )
        assert result.returncode == 0, result.stderr
        assert f"{len(BAD)} failed inputs to try again" in result.stderr
        assert f"{N_RANGES + 2}/{N_RANGES + 2} ranges committed" in result.stderr
        made.append(files(output))
    assert made[0] == made[1]
    before, after = load_manifest(whole), load_manifest(output)
    assert before.accounting == after.accounting
    assert before.shards == after.shards
    result = run_module("pipeline.validate", output, "--deep")
    assert result.returncode == 0, result.stdout + result.stderr


def test_where_nothing_is_kept_nothing_is_left(
    corpus: Path, tmp_path: Path, preprocess: Run
) -> None:
    given = pq.read_table(corpus / "emoji.parquet").slice(20, 4).to_pydict()
    table = {name: cells * 3 for name, cells in given.items()}
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    output = tmp_path / "out"
    result = preprocess(
        *flags(corpus, output, workers=1),
        f"--input={tmp_path / 'bad.parquet'}",
        env=environment(corpus),
    )
    assert result.returncode == 1
    assert "nothing could be kept of 12 inputs: 12 not_an_image" in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.parquet"]


def test_on_object_storage_with_faults_it_grows_to_the_same_bytes(
    corpus: Path, whole: Path, preprocess: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as server:
        url = f"{server.bucket(monkeypatch)}/out"
        server.inject(itertools.cycle(_FAULTS))
        result = preprocess(
            *flags(corpus, url, workers=2), env=environment(corpus, PACE_S=0.05)
        )
        assert result.returncode == 0, result.stderr
        puts = [path for verb, path in server.requests if verb == "PUT"]
        server.inject(())
        storage = open_storage(url)
        assert {n: storage.read(n) for n in storage.names()} == files(whole)
    first = next(place for place, path in enumerate(puts) if "/ranges/" in path)
    last = max(place for place, path in enumerate(puts) if "/candidates/" in path)
    seals = [place for place, path in enumerate(puts) if path.endswith(".sha256")]
    assert first < seals[0] < last


@pytest.fixture
def local(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalRun]:
    monkeypatch.syspath_prepend(corpus)
    return LocalRun(config_of(corpus, tmp_path / "out"))


def commits_of(
    run: LocalRun, writer: DatasetWriter, check: Callable[[], None], seals: list[int]
) -> Commits:
    return Commits(
        writer,
        source_of=lambda number: run.corpora[run.plan.range(number).source].name,
        check=check,
        write_manifest=lambda: seals.append(len(writer.records)),
    )


def test_ranges_finished_and_placed_in_any_order_are_committed_in_theirs(
    whole: Path, local: LocalRun
) -> None:
    writer, draw = local.open(), random.Random(1)
    settled = local.settled()
    draw.shuffle(settled)
    seals: list[int] = []
    commits = commits_of(local, writer, lambda: None, seals)
    named, placing = [], []
    for staged_range in settled:
        commits.add(staged_range)
        placing += commits.ready()
        named += [one.number for one in placing if one.number not in named]
        draw.shuffle(placing)
        while len(placing) > 3:
            commits.placed(place_range(local.work, placing.pop(), silent))
            assert [r.range for r in writer.records] == list(range(len(writer.records)))
    for placement in placing:
        commits.placed(place_range(local.work, placement, silent))
    assert sorted(named) == list(range(N_RANGES))
    assert seals[0] == 1, "the first manifest follows the first commit"
    writer.finish(local.described, TOKENIZER)
    assert files(Path(local.config.output)) == files(whole)


def test_nothing_is_committed_once_the_lease_is_lost(local: LocalRun) -> None:
    writer = local.open()
    lost: list[int] = []

    def check() -> None:
        if len(writer.records) == 2:
            lost.append(1)
            raise TakenOver("another driver took over")

    commits = commits_of(local, writer, check, [])
    for staged_range in local.settled():
        commits.add(staged_range)
    placements = list(commits.ready())
    # The first comes last: with it all of them could be committed.
    for placement in reversed(placements[1:]):
        commits.placed(place_range(local.work, placement, silent))
    assert writer.records == []
    with pytest.raises(TakenOver):
        commits.placed(place_range(local.work, placements[0], silent))
    assert (len(writer.records), lost) == (2, [1])
    assert committed(Path(local.config.output)) == 2
