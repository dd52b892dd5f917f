"""Failed inputs can be tried again alone, and count once, by their last attempt."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.retry
from pipeline.attempts import (
    PER_RANGE,
    RETRIES,
    read_attempts,
    retried_ranges,
    retry_names,
)
from pipeline.dataset import DatasetWriter
from pipeline.manifest import Manifest, load_index, load_manifest
from pipeline.options import ImageOptions, PreprocessConfig
from pipeline.plan import RANGE_DTYPE, Plan
from pipeline.retry import (
    RETRYING,
    FailedRows,
    announce_retry,
    begin_retry,
    end_retry,
    failed_rows,
    pending_ranges,
    retry_announced,
    without_attempts,
)
from pipeline.storage import open_storage
from tests.pipeline.corpora import (
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)
from tests.pipeline.damage import damages, flip
from tests.pipeline.runs import TOKENIZER, LocalRun, silent, write_rows
from tests.pipeline.test_preprocess import files

N_INPUTS = 12
LATE = (2, 3, 7, 11)
FLAGS = ("--shard.samples=4", "--image.size=32", "--split.val=0", "--workers=1")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A table of 12 images, four of which are not there yet."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for seed in range(N_INPUTS):
        rows.append({"image": f"{seed}.jpg", "caption": caption(seed)})
        if seed not in LATE:
            (folder / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
    return write_table(folder / "birds.tsv", rows)


def run_on(corpus: Path, preprocess: Run, *flags: str) -> tuple[Path, Manifest, str]:
    output = corpus.parent.parent / "out"
    given = (f"--input={corpus}", f"--output={output}", *FLAGS, *flags)
    result = preprocess(*given)
    assert result.returncode == 0, result.stderr
    return output, load_manifest(output), result.stderr


def rows_of(output: Path) -> list[dict[str, object]]:
    tables = sorted([*output.glob("*/*.parquet")])
    return pa.concat_tables([pq.read_table(path) for path in tables]).to_pylist()


def test_failed_inputs_are_tried_again_alone_and_counted_once(
    corpus: Path, preprocess: Run
) -> None:
    output, first, _ = run_on(corpus, preprocess)
    assert (first.accounting.written, first.accounting.failed) == (
        N_INPUTS - len(LATE),
        {"missing_file": 4},
    )
    before = {shard.name: shard.sha256 for shard in first.shards}
    for seed in LATE[:2]:
        (corpus.parent / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
    # One comes with the picture of a sample that is there: that one stays.
    copy = (corpus.parent / "1.jpg").read_bytes()
    (corpus.parent / "7.jpg").write_bytes(copy)

    flags = ("--retry_failed",)
    output, second, said = run_on(corpus, preprocess, *flags)
    assert "4 failed inputs to try again" in said
    counts = second.accounting
    assert (counts.inputs, counts.written, counts.failed) == (
        N_INPUTS,
        N_INPUTS - 1,
        {"missing_file": 1},
    )
    assert before.items() <= {s.name: s.sha256 for s in second.shards}.items()
    again = [row for row in rows_of(output) if row["retry_of"]]
    assert {row["url"] for row in again} == {f"{seed}.jpg" for seed in LATE}
    tried = {row["key"]: row for row in rows_of(output)}
    for row in again:
        earlier = tried[row["retry_of"]]
        assert (earlier["url"], earlier["status"]) == (row["url"], "failed")
        assert earlier["uid"] == row["uid"]

    (corpus.parent / "11.jpg").write_bytes(encoded(picture(11)))
    output, third, said = run_on(corpus, preprocess, *flags)
    assert "1 failed inputs to try again" in said
    assert (third.accounting.written, third.accounting.failed) == (N_INPUTS, {})
    uids = [load_index(output, shard)["uid"].tolist() for shard in third.shards]
    assert len({uid for part in uids for uid in part}) == N_INPUTS

    whole = files(output)
    output, _, said = run_on(corpus, preprocess, *flags)
    assert "nothing failed" in said
    assert files(output) == whole


def test_figures_of_a_retry_count_an_input_once(corpus: Path, preprocess: Run) -> None:
    run_on(corpus, preprocess)
    (corpus.parent / "2.jpg").write_bytes(encoded(picture(2)))
    (corpus.parent / "3.jpg").write_bytes(b"no image")
    # The second time, one of them had failed for another reason before.
    for _ in range(2):
        _, _, said = run_on(corpus, preprocess, "--retry_failed")
        (line,) = [one for one in said.splitlines() if one.startswith("preprocess: ")]
        assert line.startswith(f"preprocess: {N_INPUTS}/{N_INPUTS} inputs, ")
        assert line.endswith("failed: 2 missing_file, 1 not_an_image")


def three_of_four_fail(folder: Path) -> LocalRun:
    rows = [(b"not an image", "train", "a bird")] * 3
    rows.append((encoded(picture(1)), "train", "a kite"))
    return LocalRun(
        PreprocessConfig(
            input=str(write_rows(folder / "t.parquet", rows)),
            output=str(folder / "out"),
            image=ImageOptions(size=32),
        )
    )


def test_what_is_tried_again_is_taken_out_of_what_is_counted(tmp_path: Path) -> None:
    run = three_of_four_fail(tmp_path)
    writer = run.committed()
    found = [failed_rows(run.work, record, silent) for record in writer.records]
    begin_retry(writer, run.plan, found, 2)
    todo = pending_ranges(writer, run.plan)
    counts = writer.accounting()
    ((reason, count),) = counts.failed.items()
    assert (counts.inputs, count, [one.inputs for one in todo]) == (4, 3, [2, 1])
    for left, inputs, failed in (
        (todo, 1, {}),
        (todo[1:], 3, {reason: 2}),
        ([run.plan.range(0)], 4, {reason: 3}),
    ):
        before = without_attempts(counts, writer.storage, left)
        assert (before.inputs, before.failed) == (inputs, failed)
        before.check()


def test_a_committed_sample_wins_over_a_retried_copy(
    corpus: Path, preprocess: Run
) -> None:
    run_on(corpus, preprocess, "--dedup.exact=true")
    copy = (corpus.parent / "10.jpg").read_bytes()
    (corpus.parent / "2.jpg").write_bytes(copy)
    flags = ("--dedup.exact=true", "--retry_failed")
    output, made, _ = run_on(corpus, preprocess, *flags)
    counts = made.accounting
    assert (counts.written, counts.duplicates) == (N_INPUTS - len(LATE), 1)
    (row,) = [row for row in rows_of(output) if row["status"] == "duplicate"]
    kept = {row["key"]: row["url"] for row in rows_of(output)}
    # It stands earlier in the corpus, and yields all the same.
    assert (row["url"], kept[row["duplicate_of"]]) == ("2.jpg", "10.jpg")


def test_a_retry_killed_at_its_end_is_not_made_a_second_time(
    corpus: Path, preprocess: Run
) -> None:
    run_on(corpus, preprocess)
    (corpus.parent / "2.jpg").write_bytes(encoded(picture(2)))
    output, made, _ = run_on(corpus, preprocess, "--retry_failed")
    assert made.accounting.failed == {"missing_file": 3}
    whole = files(output)

    # Killed with the manifest complete, and before that.
    (output / RETRYING).write_text("1")
    output, _, said = run_on(corpus, preprocess, "--retry_failed")
    assert "already complete" in said
    assert files(output) == whole
    (output / RETRYING).write_text("1")
    (output / "manifest.json.sha256").unlink()
    output, _, said = run_on(corpus, preprocess, "--retry_failed")
    assert "to try again" not in said
    assert files(output) == whole


@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_an_unfinished_dataset_cannot_retry(
    corpus: Path, preprocess: Run, flag: str
) -> None:
    output = corpus.parent.parent / "out"
    given = (f"--input={corpus}", f"--output={output}", *FLAGS, "--retry_failed", flag)
    result = preprocess(*given)
    assert result.returncode == 1
    assert "run the same command without it first" in result.stderr
    assert not output.exists()


def test_a_dry_run_of_a_retry_counts_what_failed(corpus: Path, preprocess: Run) -> None:
    output, _, _ = run_on(corpus, preprocess)
    whole = files(output)
    given = (f"--input={corpus}", f"--output={output}", *FLAGS, "--retry_failed")
    result = preprocess(*given, "--dry_run")
    says = f"{output}: 4 failed inputs would be tried again (4 missing_file)\n"
    assert (result.returncode, result.stdout) == (0, says)
    result = preprocess(*given, "--dry_run", "--json")
    assert json.loads(result.stdout) == {"tried_again": {"missing_file": 4}}
    assert files(output) == whole


def test_a_retry_that_keys_cannot_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(b"not an image", "train", "a bird")] * 3
    run = LocalRun(
        PreprocessConfig(
            input=str(write_rows(tmp_path / "t.parquet", rows)),
            output=str(tmp_path / "out"),
        )
    )
    writer = run.committed()
    found = [failed_rows(run.work, record, silent) for record in writer.records]
    monkeypatch.setattr(pipeline.retry, "MAX_RANGES", 3)
    assert begin_retry(writer, run.plan, found, 2) == 3
    # One range of the corpus and two of the retry are there.
    with pytest.raises(ValueError, match="make the dataset anew with a larger"):
        begin_retry(writer, run.plan, found, 3)
    assert retry_names(writer.storage) == [f"{RETRIES}/000001.json"]
    assert len(writer.storage.names(RETRIES)) == 3


def test_lost_files_of_a_retry_are_made_again_from_its_list(
    corpus: Path, preprocess: Run
) -> None:
    run_on(corpus, preprocess)
    for seed in LATE[:3]:
        (corpus.parent / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
    output, made, _ = run_on(corpus, preprocess, "--retry_failed")
    assert damages(output, deep=True) == []
    whole = files(output)
    shard = made.shards[-1]
    assert (shard.range, shard.samples) == (3, 3)
    (output / shard.name).unlink()
    _, _, said = run_on(corpus, preprocess)
    assert "1 committed ranges lack files" in said
    assert files(output) == whole

    # Every byte of the list is sealed, and nothing is made of a damaged one.
    (listed,) = (output / RETRIES).glob("*.npy")
    place = listed.stat().st_size // 2
    flip(listed, place)
    (found,) = damages(output, deep=True)
    assert output / found.path == listed
    (output / shard.name).unlink()
    given = (f"--input={corpus}", f"--output={output}", *FLAGS)
    result = preprocess(*given)
    assert result.returncode == 1
    assert f"{listed}, which lists what is tried again, is gone or" in result.stderr
    flip(listed, place)
    run_on(corpus, preprocess)
    assert files(output) == whole


def test_a_list_without_its_record_is_no_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = three_of_four_fail(tmp_path)
    writer = run.committed()
    writer.finish(run.described, TOKENIZER)
    storage, whole = writer.storage, files(tmp_path / "out")

    def begin() -> int:
        found = [failed_rows(run.work, record, silent) for record in writer.records]
        return begin_retry(writer, run.plan, found, 2)

    def killed() -> dict[str, bytes]:
        """What is left by a driver killed just before the record."""
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.retry, "create_retry", _killed)
            with pytest.raises(KeyboardInterrupt):
                begin()
        return {name: storage.read(name) for name in storage.names(RETRIES)}

    announce_retry(writer)
    left = killed()
    assert len(left) == 2
    assert not retry_announced(writer)
    assert not writer.retry_begun()
    assert pending_ranges(writer, run.plan) == []
    assert damages(tmp_path / "out", deep=True) == []
    # It never comes to that retry, or it does.
    writer.finish(run.described, TOKENIZER)
    end_retry(writer)
    assert files(tmp_path / "out") == whole
    announce_retry(writer)
    assert killed() == left
    assert begin() == 3
    assert retry_announced(writer)
    assert [one.file for one in retried_ranges(storage)] == list(left)
    assert storage.names(RETRIES) == [*left, *retry_names(storage)]
    assert {name: storage.read(name) for name in left} == left


def test_what_a_killed_retry_has_placed_is_no_damage(tmp_path: Path) -> None:
    run = three_of_four_fail(tmp_path)
    writer = run.committed()
    writer.finish(run.described, TOKENIZER)
    output = tmp_path / "out"
    found = [failed_rows(run.work, record, silent) for record in writer.records]
    assert begin_retry(writer, run.plan, found, 2) == 3
    assert damages(output, deep=True) == []
    # Shards come before the record of their range, and that before the manifest.
    made = load_manifest(output).shards[0].name
    placed = output / "train" / "shard-000777.tar"
    shutil.copy(output / made, placed)
    begun = files(output)
    for flags in ((), ("--deep",), ("--deep", "--repair")):
        result = run_module("pipeline.validate", output, *flags)
        assert result.returncode == 0, result.stdout
        assert "--retry_failed` finishes it" in result.stdout
    assert files(output) == begun
    (output / made).unlink()
    assert [damage.path for damage in damages(output)] == [made]


def _killed(*given: object) -> bool:
    raise KeyboardInterrupt


def planned(*sources: int) -> Plan:
    table = np.zeros(len(sources), RANGE_DTYPE)
    table["source"] = sources
    return Plan(table=table, split_names=("train",))


def failures(
    number: int, failed: dict[int, str], superseded: Iterable[int] = ()
) -> FailedRows:
    """Failed inputs of a range by position, and keys of earlier attempts."""
    reasons = tuple(dict.fromkeys(failed.values()))
    codes = [reasons.index(reason) for reason in failed.values()]
    return FailedRows(
        keys=np.array([number * PER_RANGE + place for place in failed], np.int64),
        codes=np.array(codes, np.uint16),
        reasons=reasons,
        superseded=np.array(list(superseded), np.int64),
    )


def test_an_input_is_tried_again_after_its_last_attempt_in_any_order(
    tmp_path: Path,
) -> None:
    plan = planned(0, 0, 1)
    first = [
        failures(0, {1: "timeout", 5: "dns"}),
        failures(1, {2: "timeout", 3: "timeout"}),
        failures(2, {0: "dns"}),
    ]
    # Ranges 3 and 4 of two inputs each, and 5, as a source has ranges of its own.
    second = [
        *first,
        failures(3, {1: "http_404"}, [1, 5]),
        failures(4, {0: "timeout", 1: "dns"}, [PER_RANGE + 2, PER_RANGE + 3]),
        failures(5, {}, [2 * PER_RANGE]),
    ]
    stored = []
    for name, step in (("forth", 1), ("back", -1)):
        writer = DatasetWriter(open_storage(tmp_path / name))
        assert begin_retry(writer, plan, first[::step], 2) == 5
        assert begin_retry(writer, plan, second[::step], 2) == 3
        stored.append(files(tmp_path / name))
    assert stored[0] == stored[1]
    ranges = pending_ranges(writer, plan)
    assert [(one.number, one.source, one.inputs) for one in ranges] == [
        *((3, 0, 2), (4, 0, 2), (5, 1, 1)),
        *((6, 0, 2), (7, 0, 1)),
    ]
    lists = [
        read_attempts(writer.storage, one.retried) for one in ranges if one.retried
    ]
    assert [dict(one.by_range()) for one in lists] == [
        {0: {1: "000000000001", 5: "000000000005"}},
        {1: {2: "000001000002", 3: "000001000003"}},
        {2: {0: "000002000000"}},
        {0: {5: "000003000001"}, 1: {2: "000004000000"}},
        {1: {3: "000004000001"}},
    ]
    assert [one.counts() for one in lists] == [
        {"dns": 1, "timeout": 1},
        {"timeout": 2},
        {"dns": 1},
        {"http_404": 1, "timeout": 1},
        {"dns": 1},
    ]


def test_a_retry_takes_few_bytes_for_each_failed_attempt(tmp_path: Path) -> None:
    n_ranges, n_failed, samples = 100, 3_000, 10_000
    total = n_ranges * n_failed
    plan = planned(*[0] * n_ranges)
    writer = DatasetWriter(open_storage(tmp_path / "out"))

    def rows(number: int, count: int, superseded: np.ndarray) -> FailedRows:
        return FailedRows(
            keys=number * PER_RANGE + np.arange(count),
            codes=np.arange(count, dtype=np.uint16) % 2,
            reasons=("http_404", "timeout"),
            superseded=superseded,
        )

    def corpus() -> Iterator[FailedRows]:
        for number in range(n_ranges):
            yield rows(number, n_failed, np.empty(0, np.int64))

    def retried() -> Iterator[FailedRows]:
        yield from corpus()
        for one in pending_ranges(writer, plan):
            assert one.retried
            keys = read_attempts(writer.storage, one.retried).rows["key"]
            yield rows(one.number, one.inputs, keys)

    for found, attempts in ((corpus(), total), (retried(), 2 * total)):
        tracemalloc.start()
        assert begin_retry(writer, plan, found, samples) == total
        left, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"{peak / attempts:.1f} bytes for each of {attempts} failed attempts")
        assert peak < 64 * attempts
        assert left < attempts
    assert len(pending_ranges(writer, plan)) == 2 * total // samples
