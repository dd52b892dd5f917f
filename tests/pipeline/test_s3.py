"""The command from S3 to S3, on a server that refuses, drops and dawdles: the bytes of
an undisturbed local run, whatever happens to requests or to the driver.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import open_storage
from tests.pipeline.corpora import (
    REPOSITORY,
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)
from tests.pipeline.s3 import DROP, LOSE, TRUNCATE, Fault, S3Server, slow, status
from tests.pipeline.test_preprocess import files

N_INPUTS, PER_RANGE = 17, 3
FLAGS = (
    *("--image.size=32", f"--shard.samples={PER_RANGE}", "--split.val=0.2"),
    *("--tokenizer=train:300", "--dedup.exact", "--dedup.near=2", "--workers=2"),
)
RECORD = re.compile(r"/(candidates|ranges)/\d{6}\.json")
# About one request in seven; the first of a run too, which the driver makes.
_FAULTS: tuple[Fault | None, ...] = (
    *(status(503), *(None,) * 6, status(500), *(None,) * 5, DROP, *(None,) * 7),
    *(slow(0.3), *(None,) * 4, LOSE, *(None,) * 6, TRUNCATE, *(None,) * 6),
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and a table, a few of the images twice."""
    folder = tmp_path_factory.mktemp("s3") / "corpus"
    folder.mkdir()
    rows = []
    for number in range(N_INPUTS):
        data = encoded(picture(number % (N_INPUTS - 4)))
        (folder / f"{number}.jpg").write_bytes(data)
        rows.append({"image": f"{number}.jpg", "caption": caption(number)})
    rows.append({"image": "gone.jpg", "caption": "gone"})
    return write_table(folder / "table.csv", rows)


@pytest.fixture(scope="module")
def local(table: Path, preprocess: Run) -> dict[str, bytes]:
    """Files of the dataset, made on a disk."""
    output = table.parent.parent / "out"
    result = preprocess(f"--input={table}", f"--output={output}", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert "duplicates  4" in result.stdout
    return files(output)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, table: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with the corpus."""
    url = server.bucket(monkeypatch)
    for path in table.parent.iterdir():
        server.put(f"{url}/corpus/{path.name}", path.read_bytes())
    return url


def command(bucket: str) -> list[str]:
    return [f"--input={bucket}/corpus/table.csv", f"--output={bucket}/out", *FLAGS]


def written(bucket: str) -> dict[str, bytes]:
    """Every file of the dataset, read with no faults."""
    storage = open_storage(f"{bucket}/out")
    return {name: storage.read(name) for name in storage.names()}


def test_from_s3_to_s3_with_faults(
    server: S3Server, bucket: str, local: dict[str, bytes], preprocess: Run
) -> None:
    server.inject(itertools.cycle(_FAULTS))
    result = preprocess(*command(bucket))
    assert result.returncode == 0, result.stderr
    requests = [path for _, path in server.requests]
    server.inject(())
    assert written(bucket) == local
    progress = json.loads(open_storage(bucket).read("out.progress.json"))
    assert progress["phase"] == "complete"
    again = progress["retried"]
    # A dropped connection may be made again below this, where nobody counts.
    assert min(again["503"], again["500"], again["truncated body"]) > 1
    assert f"{again['503']} 503" in result.stderr.partition("tried again in all: ")[2]
    places = [place for place, path in enumerate(requests) if RECORD.search(path)]
    under_way = requests[places[0] : places[-1]]
    assert len(places) >= 2 * N_INPUTS // PER_RANGE
    # However many ranges there are, the dataset is listed before and after them alone.
    assert not [path for path in under_way if "list-type=2&prefix=out" in path]


def test_a_killed_driver_goes_on_and_a_second_one_is_refused(
    server: S3Server, bucket: str, local: dict[str, bytes], preprocess: Run
) -> None:
    server.inject(itertools.cycle(_FAULTS))
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipeline.preprocess", *command(bucket)],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not staged(server):
        assert driver.poll() is None, "the run ended before it was hit"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.send_signal(signal.SIGSTOP)
    result = preprocess(*command(bucket))
    assert result.returncode == 1
    assert f"being written by process {driver.pid}" in result.stderr
    driver.kill()
    driver.wait()
    assert "manifest.json" not in written(bucket)
    result = preprocess(*command(bucket))
    assert result.returncode == 0, result.stderr
    server.inject(())
    assert written(bucket) == local
    result = run_module("pipeline.validate", f"{bucket}/out", "--deep")
    assert result.returncode == 0, result.stdout + result.stderr


def staged(server: S3Server) -> bool:
    puts = [path for verb, path in list(server.requests) if verb == "PUT"]
    return sum(bool(RECORD.search(path)) for path in puts) >= 3
