"""A dataset directory survives its writer at every step, and is never half right."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.dataset import DatasetWriter
from pipeline.ranges import StagedRange, write_range
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.test_ranges import Row, planned, silent

DESCRIBED = {"source": "birds", "transform": {}, "transform_sha256": ""}


class Run:
    """The steps of a run on a tiny corpus, without Ray."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        folder.mkdir()
        self.plan, self.work = planned(folder, rows)
        self.root = folder / "out"

    def open(self) -> DatasetWriter:
        """Begin or continue, as the command does."""
        writer = DatasetWriter(self.root)
        if writer.stored_plan() is not None:
            assert writer.stored_tokenizer() == self.work.tokenizer
        writer.create()
        writer.begin(DESCRIBED, self.work.tokenizer)
        return writer

    def staged(self, writer: DatasetWriter) -> StagedRange:
        work = dataclasses.replace(self.work, staging=writer.staging)
        return write_range(work, self.plan.range(0), silent)

    def committed(self) -> DatasetWriter:
        writer = self.open()
        if not writer.records:
            writer.commit(self.staged(writer), "birds")
        return writer


def killed_at(step: int, writer: DatasetWriter) -> bool:
    """Abandon in a process that dies before its `step`-th change of the directory;
    False where it had come to its end before.
    """
    child = os.fork()
    if not child:
        left = step

        def die(event: str, _: object) -> None:
            nonlocal left
            if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(die)
        writer.abandon()
        writer.remove_emptied()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_run_killed_while_it_is_removed_is_removed_by_the_next(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "run", [(b"broken", "train", "a bird")] * 2)
    steps = 0
    left_empty = 0
    while True:
        shutil.rmtree(run.root, ignore_errors=True)
        writer = run.committed()
        # The worst there can be: an older driver declared it complete.
        writer.write_manifest(DESCRIBED, run.work.tokenizer, complete=True)
        if not killed_at(steps, writer):
            break
        again = run.committed()
        assert again.finished() is None
        assert again.accounting().written == 0
        again.abandon()
        again.remove_emptied()
        if run.root.exists():
            assert list(run.root.iterdir()) == [], steps
            left_empty += 1
        steps += 1
    assert steps > 10
    # Only the last steps forget whose the empty directory was.
    assert left_empty <= 2
    assert not run.root.exists()


def test_a_directory_that_was_there_before_stays(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", [(b"broken", "train", "a bird")])
    run.root.mkdir()
    writer = run.committed()
    writer.abandon()
    writer.remove_emptied()
    assert list(run.root.iterdir()) == []


GOOD = [(encoded(picture(seed)), "train", "a bird") for seed in range(2)]


def test_counts_that_do_not_add_up_are_not_committed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", GOOD)
    writer = run.open()
    staged = run.staged(writer)
    counts = dataclasses.replace(staged.accounting, written=1)
    with pytest.raises(ValueError, match="does not add up"):
        writer.commit(dataclasses.replace(staged, accounting=counts), "birds")
    assert not (run.root / "train").exists()
    assert writer.damaged_ranges() == []


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", "_stats.json", ".tar.idx"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_lost_file_is_found_and_made_again(
    tmp_path: Path, suffix: str, cut: bool
) -> None:
    run = Run(tmp_path / "run", GOOD)
    writer = run.committed()
    made = writer.finish(DESCRIBED, run.work.tokenizer)
    assert writer.missing_file(made) is None
    lost = run.root / f"train/shard-000000{suffix}"
    whole = lost.read_bytes()
    if cut:
        lost.write_bytes(whole[:-512] if suffix == ".tar" else b"")
    else:
        lost.unlink()
    assert DatasetWriter(run.root).missing_file(made) == f"train/{lost.name}"
    writer = run.open()
    assert writer.damaged_ranges() == [0]
    writer.restore(run.staged(writer))
    assert lost.read_bytes() == whole
    assert writer.damaged_ranges() == []


def test_lost_companions_and_tokenizer_files_are_found(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", GOOD)
    made = run.committed().finish(DESCRIBED, run.work.tokenizer)
    names = ("README.md", "tokenizer/tokenizer_config.json")
    for name in names:
        whole = (run.root / name).read_bytes()
        (run.root / name).unlink()
        assert DatasetWriter(run.root).missing_file(made) == name
        again = DatasetWriter(run.root)
        again.create()
        again.begin(DESCRIBED, run.work.tokenizer)
        again.finish(DESCRIBED, run.work.tokenizer)
        assert (run.root / name).read_bytes() == whole


def test_a_lost_file_of_a_corpus_that_changed_is_not_made_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", GOOD)
    run.committed()
    shutil.rmtree(run.root / "train")
    other = Run(tmp_path / "other", [GOOD[0], GOOD[0]])
    other.root = run.root
    writer = DatasetWriter(run.root)
    writer.begin(DESCRIBED, run.work.tokenizer)
    with pytest.raises(ValueError, match="choose a new --output"):
        writer.restore(other.staged(writer))
