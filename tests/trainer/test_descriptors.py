"""A batch of more shards than the process may open files is read all the same."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.manifest import Accounting, load_manifest
from tests.conftest import ROOT
from tests.trainer.datasets import show
from tests.trainer.tiny import config
from trainer import folder
from trainer.dataset import Dataset
from trainer.folder import Folder
from trainer.loader import Loader

SHARDS = 240
# Importing torch leaves a dozen files open.
LIMIT = 64
DIGESTS = """
import resource, sys
from pathlib import Path
from tests.trainer.test_descriptors import loader
reader = loader(Path(sys.argv[1]))
digests = [batch.counts.digest_text for batch in reader.steps(0, 6)]
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], *digests)
"""


@pytest.fixture(scope="module")
def many(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two sources and many shards, the same ones over and over."""
    folder = tmp_path_factory.mktemp("many")
    whole = load_manifest(shards)
    own = whole.split("train")
    (folder / "train").mkdir()
    (folder / "tokenizer").symlink_to(shards / "tokenizer")
    entries = []
    for number in range(SHARDS):
        entry = own[number % len(own)]
        name = f"train/shard-{number:06d}.tar"
        source = ("even", "odd")[number % 2]
        again = dataclasses.replace(entry, name=name, range=number, source=source)
        for kind, path in entry.files.items():
            os.link(shards / path, folder / again.files[kind])
        entries.append(again)
    written = sum(entry.samples for entry in entries)
    counts = Accounting(inputs=written, written=written)
    (info,) = whole.sources.values()
    manifest = dataclasses.replace(
        whole,
        shards=tuple(entries),
        rows=written,
        accounting=counts,
        sources={"even": info, "odd": info},
    )
    show(folder, manifest, SHARDS)
    return folder


def loader(shards: Path, *more: str) -> Loader:
    """Of whose batches nearly every sample is of another shard."""
    pairs = [f"--{name}=96" for name in ("lanes", "global_batch", "micro_batch")]
    keys = config(shards, Path("unused"), *pairs, *more)
    return Loader(Dataset(shards, "train"), keys, rank=0, world_size=1)


def test_a_limit_that_cannot_be_raised_changes_no_sample(many: Path) -> None:
    def run(*limit: str) -> list[str]:
        code = [sys.executable, "-c", DIGESTS, str(many)]
        words = [*limit, "exec", *(f"'{word}'" for word in code)]
        done = subprocess.run(
            ["sh", "-c", " ".join(words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    limit, *digests = run("ulimit", "-n", f"{LIMIT};")
    assert int(limit) == LIMIT
    at_once = loader(many).order.samples_of(0, range(96)).places[:, 0]
    assert len(set(at_once.tolist())) > LIMIT
    assert digests == run()[1:]


def test_a_limit_is_raised_as_far_as_a_process_may() -> None:
    hard = min(1 << 12, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (99, {hard}))\n"
        "from trainer.descriptors import for_shards\n"
        "print(for_shards(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.split() == [b"%d" % (hard // 2), b"%d" % hard]


@pytest.mark.parametrize("mixture", ["none", "weights"])
def test_indexes_of_all_windows_of_a_run_stay_in_memory(
    many: Path, mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is read once an epoch, however many lanes, sources, pieces of a window."""
    loaded: list[int] = []

    def load(self: Folder, shard: int) -> object:
        loaded.append(shard)
        return load_index(self, shard)

    load_index: Callable[[Folder, int], object] = Folder._load_index
    monkeypatch.setattr(Folder, "_load_index", load)
    monkeypatch.setattr(folder, "_INDEXES_KEPT", 8)
    reader = loader(many, f"--mixture={mixture}", "--shuffle_shards=1")
    for step in range(len(reader.dataset) // 96):
        reader.dataset.records(reader.order.samples_of(step, reader.lanes).places)
    assert len(loaded) > 200
    # A lane's edges cut a shard, which two lanes then read at other times; the smaller
    # source of a mixture begins again.
    assert len(loaded) < 2 * SHARDS
