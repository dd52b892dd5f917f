"""A dataset survives its writer at every step, and is never half right."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.dataset import PLAN, SEALS, TABLE, DatasetWriter
from pipeline.manifest import Accounting, file_sha256, load_manifest
from pipeline.options import ImageOptions, PreprocessConfig, ShardOptions, SplitOptions
from pipeline.staging import STATE, TakenOver
from pipeline.storage import open_storage
from pipeline.tokenizer import train_tokenizer
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.runs import TOKENIZER, LocalRun, Row, write_rows
from tests.pipeline.s3 import S3Server

GOOD: list[Row] = [(encoded(picture(seed)), "train", "a bird") for seed in range(2)]


def run_of(folder: Path, rows: list[Row] = GOOD) -> LocalRun:
    folder.mkdir(exist_ok=True)
    path = write_rows(folder / "birds.parquet", rows)
    config = PreprocessConfig(
        input=str(path),
        output=str(folder / "out"),
        image=ImageOptions(size=32),
        split=SplitOptions(column="split"),
    )
    return LocalRun(config)


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
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_run_killed_while_it_is_removed_is_removed_by_the_next(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path / "run", [(b"broken", "train", "a bird")] * 2)
    root = tmp_path / "run" / "out"
    steps = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        writer = run.committed()
        # The worst there can be: an older driver declared it complete.
        writer.write_manifest(run.described, TOKENIZER, complete=True)
        if not killed_at(steps, writer):
            break
        again = run.committed()
        assert again.finished() is None
        assert again.accounting().written == 0
        again.abandon()
        assert list(root.iterdir()) == [], steps
        steps += 1
    assert steps > 10


def test_counts_that_do_not_add_up_are_not_committed(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    writer = run.open()
    (staged,) = run.settled()
    counts = dataclasses.replace(staged.accounting, written=1)
    with pytest.raises(ValueError, match="does not add up"):
        run.commit(dataclasses.replace(staged, accounting=counts))
    assert writer.records == []
    assert run.storage.names(f"{STATE}/ranges") == []


def test_samples_that_are_not_those_counted_are_not_committed(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.open()
    (staged,) = run.settled()
    counts = Accounting(inputs=2, written=1, duplicates=1)
    with pytest.raises(ValueError, match="has 2 samples, but accounts for 1"):
        run.commit(dataclasses.replace(staged, accounting=counts))


def test_a_plan_of_another_configuration_is_not_adopted(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.open()
    tokenizer = run.storage.read("tokenizer/tokenizer.json")
    other = DatasetWriter(run.storage)
    described = {**run.described, "transform_sha256": "0" * 64}
    stored = train_tokenizer(["a third thing"], 70)
    with pytest.raises(TakenOver, match="another configuration was started"):
        other.begin(described, run.plan, stored)
    assert run.storage.read("tokenizer/tokenizer.json") == tokenizer


@pytest.mark.parametrize("junk", [b"", b"torn"])
def test_a_damaged_table_of_ranges_is_written_anew(tmp_path: Path, junk: bytes) -> None:
    run = run_of(tmp_path)
    run.open()
    whole = run.storage.read(TABLE)
    run.storage.write(TABLE, junk)
    assert run.writer.read_plan(run.described) is None
    run.open()
    assert run.storage.read(TABLE) == whole


def test_a_torn_plan_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.open()
    run.storage.write(PLAN, b'{"torn')
    with pytest.raises(ValueError, match=r"plan\.json in --output .* is damaged"):
        DatasetWriter(run.storage).stored_plan()


def test_a_record_that_another_driver_wrote_stops_this_one(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.open()
    (staged,) = run.settled()
    run.storage.create(f"{STATE}/ranges/000000.json", b"{}")
    with pytest.raises(ValueError, match="another driver committed"):
        run.commit(staged)


def test_a_manifest_that_another_driver_wrote_stops_this_one(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    writer = run.committed()
    writer.write_manifest(run.described, TOKENIZER, complete=False)
    run.storage.write("manifest.json", b"{}")
    with pytest.raises(ValueError, match=r"another driver wrote manifest\.json"):
        writer.write_manifest(run.described, TOKENIZER, complete=True)


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", "_stats.json", ".tar.idx"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_lost_file_is_found_and_made_again(
    tmp_path: Path, suffix: str, cut: bool
) -> None:
    run = run_of(tmp_path)
    made = run.committed().finish(run.described, TOKENIZER)
    assert run.writer.missing_file(made) is None
    lost = tmp_path / "out" / f"train/shard-000000{suffix}"
    whole = lost.read_bytes()
    if cut:
        lost.write_bytes(whole[:-512] if suffix == ".tar" else b"")
    else:
        lost.unlink()
    assert DatasetWriter(run.storage).missing_file(made) == f"train/{lost.name}"
    writer = run.open()
    assert writer.damaged_ranges() == [0]
    (staged,) = run.settled()
    placement = writer.restored(staged)
    for split, name in placement.names.items():
        stem = name.removesuffix(".tar")
        source = f"{staged.directory}/{split}{suffix}"
        run.storage.copy(source, f"{stem}{suffix}")
    assert lost.read_bytes() == whole
    assert writer.damaged_ranges() == []


def test_lost_companions_and_tokenizer_files_are_made_again(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    made = run.committed().finish(run.described, TOKENIZER)
    for name in ("README.md", "tokenizer/tokenizer_config.json"):
        whole = run.storage.read(name)
        run.storage.remove(name)
        assert DatasetWriter(run.storage).missing_file(made) == name
        again = DatasetWriter(run.storage)
        again.begin(run.described, run.plan, TOKENIZER)
        again.finish(run.described, TOKENIZER)
        assert run.storage.read(name) == whole


def test_a_lost_file_of_a_corpus_that_changed_is_not_made_up(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    run.committed()
    other = run_of(tmp_path / "other", [GOOD[0], (GOOD[0][0], "train", "a kite")])
    other.open()
    (staged,) = other.settled()
    with pytest.raises(ValueError, match="choose a new --output"):
        run.writer.restored(staged)


def test_every_state_file_of_a_finished_dataset_is_sealed(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.committed().finish(run.described, TOKENIZER)
    root = tmp_path / "out"
    seals = json.loads((root / SEALS).read_text())
    state = {
        path.relative_to(root).as_posix(): file_sha256(path)
        for path in (root / STATE).rglob("*")
        if path.is_file() and path != root / SEALS
    }
    assert seals == state
    assert len(state) > 2
    assert load_manifest(root).accounting.written == 2


def test_an_output_without_permission_is_refused_before_anything_else() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            writer = DatasetWriter(open_storage(folder / "new" / "out"))
            with pytest.raises(ValueError, match=r"--output .* no permission to write"):
                writer.refuse_unwritable()
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_tokenizer_that_was_damaged_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.committed()
    run.storage.write("tokenizer/tokenizer.json", b"torn")
    says = "the tokenizer of this dataset cannot be read"
    place = re.escape(f"{run.storage.url}/tokenizer")
    with pytest.raises(ValueError, match=rf"{says} .* put {place} back"):
        run.writer.stored_tokenizer()
    run.storage.remove("tokenizer/tokenizer.json")
    with pytest.raises(ValueError, match=rf"{says} \(tokenizer.json: .* put {place} "):
        run.writer.stored_tokenizer()


def test_signatures_are_no_pickles(tmp_path: Path) -> None:
    """Stored arrays are read without `allow_pickle`."""
    run = run_of(tmp_path)
    run.committed()
    file = io.BytesIO()
    import numpy as np

    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    run.storage.write(f"{STATE}/plan.npy", file.getvalue())
    assert run.writer.read_plan(run.described) is None


@pytest.mark.parametrize("shards", [1, 5])
def test_looking_for_lost_files_takes_one_listing_whatever_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    with S3Server() as server:
        config = PreprocessConfig(
            input=str(write_rows(tmp_path / "birds.parquet", GOOD * shards)),
            output=f"{server.bucket(monkeypatch)}/out",
            image=ImageOptions(size=32),
            split=SplitOptions(column="split"),
            shard=ShardOptions(samples=2),
        )
        run = LocalRun(config)
        writer = run.committed()
        manifest = writer.write_manifest(run.described, TOKENIZER, complete=True)
        assert len(manifest.shards) == shards
        server.requests.clear()
        assert writer.damaged_ranges() == []
        assert writer.missing_file(manifest) is None
        assert [method for method, _ in server.requests] == ["GET", "GET"]
        writer.storage.remove(manifest.shards[-1].sidecar(".parquet"))
        assert writer.damaged_ranges() == [shards - 1]
