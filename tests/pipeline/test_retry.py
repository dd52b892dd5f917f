"""Failed inputs can be tried again alone, and count once, by their last attempt."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.retry
from pipeline.dataset import RETRIES
from pipeline.manifest import Manifest, load_index, load_manifest
from pipeline.options import PreprocessConfig
from pipeline.retry import RETRYING, begin_retry, failed_rows
from tests.pipeline.corpora import Run, caption, encoded, picture, write_table
from tests.pipeline.runs import LocalRun, silent, write_rows
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


def test_an_unfinished_dataset_cannot_retry(corpus: Path, preprocess: Run) -> None:
    output = corpus.parent.parent / "out"
    given = (f"--input={corpus}", f"--output={output}", *FLAGS, "--retry_failed")
    result = preprocess(*given)
    assert result.returncode == 1
    assert "run the same command without it first" in result.stderr
    assert not output.exists()


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
    assert len(writer.storage.names(RETRIES)) == 1
