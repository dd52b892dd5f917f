"""An input is a sample or counts under its own reason, whatever its neighbours are."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.grouping
import pipeline.plan
import pipeline.ranges
from pipeline.captions import CaptionCleaner
from pipeline.manifest import Accounting
from pipeline.options import (
    ColumnOptions,
    DedupOptions,
    FilterOptions,
    ImageOptions,
    PreprocessConfig,
    ShardOptions,
    SplitOptions,
    TextOptions,
)
from pipeline.plan import training_captions
from pipeline.ranges import write_range
from pipeline.staging import COMPARE
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.runs import LocalRun, Row, silent, write_rows

GOOD = encoded(picture(1))


def run_of(folder: Path, rows: list[Row], **options: object) -> LocalRun:
    given: dict[str, object] = {
        "image": ImageOptions(size=32),
        "split": SplitOptions(column="split"),
        **options,
    }
    path = write_rows(folder / "birds.parquet", rows)
    return LocalRun(
        PreprocessConfig(input=str(path), output=str(folder / "out"), **given)
    )


def outcome(
    folder: Path, rows: list[Row], **options: object
) -> tuple[Accounting, dict[str, int]]:
    """Accounting of a corpus, and its samples by split."""
    run = run_of(folder, rows, **options)
    writer = run.committed()
    counts = writer.accounting()
    counts.check()
    assert counts.inputs == len(rows)
    totals: dict[str, int] = {}
    for record in writer.records:
        for shard in record.shards:
            totals[shard.split] = totals.get(shard.split, 0) + shard.samples
    return counts, totals


@pytest.mark.parametrize("broken", [b"not an image", b"", GOOD[: len(GOOD) // 2]])
def test_broken_images_are_no_duplicates_of_each_other(
    tmp_path: Path, broken: bytes
) -> None:
    rows = [(encoded(picture(seed)), "train", "a bird") for seed in range(4)]
    rows += [(broken, split, "a bird") for split in ("train", "val") * 3]
    counts, samples = outcome(tmp_path, rows)
    assert (sum(counts.failed.values()), counts.duplicates) == (6, 0)
    assert samples == {"train": 4}


def test_an_image_in_two_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    rows = [(GOOD, "train", "a bird"), (GOOD, "val", "a bird")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.written, counts.duplicates) == (1, 1)
    assert samples == {"val": 1}


def test_a_held_out_copy_that_is_filtered_keeps_no_image(tmp_path: Path) -> None:
    rows = [(GOOD, "train", "a bird"), (GOOD, "val", " ")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.written, counts.filtered) == (1, {"empty_caption": 1})
    assert samples == {"train": 1}


def test_a_copy_without_a_caption_is_filtered_and_no_duplicate(tmp_path: Path) -> None:
    rows = [(GOOD, "train", ""), (GOOD, "val", "a bird")]
    counts, samples = outcome(tmp_path, rows)
    assert (counts.filtered, counts.duplicates) == ({"empty_caption": 1}, 0)
    assert samples == {"val": 1}


def test_exact_copies_are_dropped_across_ranges_and_name_the_first(
    tmp_path: Path,
) -> None:
    rows = [(encoded(picture(seed)), "train", f"bird {seed}") for seed in range(5)]
    # The same pixels in other bytes, in another range.
    again = encoded(picture(2)) + b"\0" * 9
    rows.append((again, "train", "a late copy"))
    options = {"dedup": DedupOptions(exact=True), "shard": ShardOptions(samples=2)}
    counts, samples = outcome(tmp_path, rows, **options)
    assert (counts.written, counts.duplicates) == (5, 1)
    assert samples == {"train": 5}
    table = pq.read_table(tmp_path / "out" / "train" / "shard-000002.parquet")
    (row,) = [row for row in table.to_pylist() if row["status"] == "duplicate"]
    assert (row["key"], row["reason"]) == ("000002000001", "exact")
    assert row["duplicate_of"] == "000001000000"
    assert row["captions"] == ["a late copy"]


def test_boilerplate_captions_are_filtered_beyond_the_limit(tmp_path: Path) -> None:
    rows = [(encoded(picture(seed)), "train", "buy now") for seed in range(5)]
    options = {"dedup": DedupOptions(caption_repeats=3)}
    counts, _ = outcome(tmp_path, rows, **options)
    assert (counts.written, counts.filtered) == (3, {"caption_repetition": 2})


def test_filters_count_by_their_reason(tmp_path: Path) -> None:
    rows = [
        (encoded(picture(1, (60, 40))), "train", "a good bird"),
        (encoded(picture(2, (60, 20))), "train", "a flat bird"),
        (encoded(picture(3, (20, 20))), "train", "a small bird"),
        (encoded(picture(4)), "train", "bird"),
        (encoded(picture(5)), "train", "untitled"),
        (encoded(picture(6)), "", "a bird of no split"),
    ]
    counts, _ = outcome(
        tmp_path,
        rows,
        filter=FilterOptions(min_size=19, max_aspect=2.0),
        text=TextOptions(min_chars=5),
        where="caption <> 'a good bird'",
        dedup=DedupOptions(near=0),
    )
    assert counts.written == 1
    assert counts.failed == {"missing_split": 1}
    assert counts.filtered == {
        "aspect": 1,
        "placeholder_caption": 1,
        "short_caption": 1,
        "where": 1,
    }


def test_an_attempt_that_was_staged_is_not_made_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, [(GOOD, "train", "a bird")])
    run.open()
    first = write_range(run.work, run.plan.range(0), silent)
    assert write_range(run.work, run.plan.range(0), silent) == first
    lost = tmp_path / "out" / first.directory / "train.tar"
    lost.unlink()
    again = write_range(run.work, run.plan.range(0), silent)
    assert again.directory != first.directory
    assert again.shards == first.shards


def test_a_task_that_comes_too_late_leaves_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, [(GOOD, "train", "a bird")])
    with pytest.raises(RuntimeError, match="the run that wanted this range is over"):
        write_range(run.work, run.plan.range(0), silent)
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left in (["000000.bin"], [])


def test_a_fault_of_the_users_function_names_the_input_that_it_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def judge(one):\n    assert 'kite' not in one.captions[0], 'a kite!'\n"
    (tmp_path / "no_kites.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [(GOOD, "train", caption) for caption in ("a bird", "a kite", "a dog")]
    run = run_of(tmp_path, [(b"", "train", "no image"), *rows])
    run.open()
    work = replace(run.work, filter=FilterOptions(function="no_kites:judge"))
    function = r"--filter.function no_kites:judge raised AssertionError\('a kite!'\)"
    says = rf"^input 000000000002 \(2\): {function} in line 2"
    with pytest.raises(RuntimeError, match=says):
        write_range(work, run.plan.range(0), silent)


def test_what_is_no_fault_of_an_input_names_those_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fits_and_starts.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = run_of(tmp_path, [(GOOD, "train", "a bird"), (GOOD, "train", "a kite")])
    run.open()
    work = replace(run.work, filter=FilterOptions(function="fits_and_starts:judge"))
    says = r"^inputs 000000000000 to 000000000001 \(0 ...\): the image decoder's proc"
    with pytest.raises(RuntimeError, match=says):
        write_range(work, run.plan.range(0), silent)


def test_what_an_older_configuration_stages_does_not_count(tmp_path: Path) -> None:
    rows = [(GOOD, "train", "a bird")]
    old = run_of(tmp_path, rows)
    old.open()
    write_range(old.work, old.plan.range(0), silent)
    # The user deletes the folder, as he is told to, and starts anew beside a task that
    # is still at work.
    staged = tmp_path / "out" / ".palimpsest" / "candidates"
    (tmp_path / "kept").mkdir()
    staged.rename(tmp_path / "kept" / "candidates")
    shutil.rmtree(tmp_path / "out")
    new = run_of(tmp_path, rows, image=ImageOptions(size=64))
    new.open()
    with pytest.raises(RuntimeError, match="the run that wanted this range is over"):
        write_range(old.work, old.plan.range(0), silent)
    (tmp_path / "kept" / "candidates").rename(staged)
    made = write_range(new.work, new.plan.range(0), silent)
    assert made.run == new.described["transform_sha256"]
    table = pq.read_table(tmp_path / "out" / made.directory / "train.parquet")
    assert table["width"].to_pylist() == [96]


def test_the_comparison_sees_the_attempt_that_counts(tmp_path: Path) -> None:
    """Of two attempts with other answers from the web, one is staged."""
    rows = [(GOOD, "train", "a bird"), (GOOD, "train", "a kite")]
    run = run_of(tmp_path, rows, dedup=DedupOptions(exact=True))
    run.open()
    first = write_range(run.work, run.plan.range(0), silent)
    stored = f"{COMPARE}/stored"
    (name,) = run.storage.names(stored)
    right = run.storage.read(name)
    run.storage.remove(name)
    assert write_range(run.work, run.plan.range(0), silent) == first
    assert run.storage.read(name) == right


def test_rejected_inputs_do_not_pile_up_with_their_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    rows = [(noise.tobytes(), "train", f"bird {n}") for n in range(500)]
    run = run_of(tmp_path, rows, where="caption = 'none of them'")
    run.open()
    tracemalloc.start()
    staged = write_range(run.work, run.plan.range(0), silent)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert staged.accounting.filtered == {"where": 500}
    # All of them are 100 MB.
    assert peak < 40_000_000


def grouped(folder: Path, ids: list[int], images: list[bytes | None]) -> LocalRun:
    captions = [f"bird {number}" for number in range(len(ids))]
    table = {"image": images, "caption": captions, "id": ids}
    pq.write_table(pa.table(table), folder / "t.parquet", row_group_size=50)
    return LocalRun(
        PreprocessConfig(
            input=str(folder / "t.parquet"),
            output=str(folder / "out"),
            columns=ColumnOptions(id="id"),
            image=ImageOptions(size=32),
            split=SplitOptions(val=0),
        )
    )


def test_an_input_of_too_many_rows_fails_alone_and_all_its_rows_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline.grouping, pipeline.ranges, pipeline.plan):
        monkeypatch.setattr(module, "MAX_ROWS", 4)
    run = grouped(tmp_path, [1] * 4 + [2] * 9 + [3], [GOOD] * 14)
    seen = training_captions(run.plan, run.corpora, CaptionCleaner(TextOptions()))
    assert list(seen) == [f"bird {number}" for number in (0, 1, 2, 3, 13)]
    (record,) = run.committed().records
    counts = record.accounting
    assert (counts.inputs, counts.written, record.rows) == (3, 2, 14)
    assert counts.failed == {"too_many_rows": 1}


def test_rows_of_one_image_hold_it_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    run = grouped(tmp_path, [7] * 400 + [8], [noise.tobytes()] * 401)
    run.open()
    tracemalloc.start()
    staged = write_range(run.work, run.plan.range(0), silent)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (staged.rows, staged.accounting.inputs) == (401, 2)
    # All of them are 80 MB.
    assert peak < 40_000_000


def test_rows_of_one_id_that_differ_in_image_fail(tmp_path: Path) -> None:
    other = encoded(picture(2))
    run = grouped(
        tmp_path,
        [1, 1, 1, 2, 2, 3, 3],
        [GOOD, GOOD, other, None, GOOD, other, other],
    )
    counts = run.committed().accounting()
    assert (counts.written, counts.failed) == (1, {"images_differ": 2})


def test_the_table_shows_the_caption_that_was_thought_too_little(
    tmp_path: Path,
) -> None:
    rows = [(encoded(picture(1)), "train", "a bird"), (GOOD, "train", "untitled")]
    outcome(tmp_path, rows)
    table = pq.read_table(tmp_path / "out" / "train" / "shard-000000.parquet")
    dropped = table.to_pylist()[1]
    assert (dropped["status"], dropped["detail"]) == ("filtered", "untitled")


def test_kept_cells_are_the_text_that_people_write(tmp_path: Path) -> None:
    cells = {
        "seen": pa.array([datetime(2020, 5, 1, 12, 30)], pa.timestamp("s")),
        "day": pa.array([date(2020, 5, 1)]),
        "price": pa.array([Decimal("9.90")]),
        "score": [0.5],
        "good": [True],
        "tags": [["a", "b"]],
        "none": pa.array([None], pa.string()),
    }
    table = pa.table({"image": [GOOD], "caption": ["a bird"], **cells})
    pq.write_table(table, tmp_path / "t.parquet")
    given = PreprocessConfig(
        input=str(tmp_path / "t.parquet"),
        output=str(tmp_path / "out"),
        columns=ColumnOptions(keep=list(cells)),
        split=SplitOptions(val=0.0),
    )
    LocalRun(given).committed()
    (row,) = pq.read_table(tmp_path / "out/train/shard-000000.parquet").to_pylist()
    assert [row[name] for name in cells] == [
        *("2020-05-01 12:30:00", "2020-05-01", "9.90", "0.5", "true", '["a", "b"]', ""),
    ]


@pytest.mark.parametrize("group", [False, True])
def test_an_object_among_captions_fails_and_a_kept_one_is_json(
    tmp_path: Path, group: bool
) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    cells: list[object] = [["a bird", "a kite"], {"en": "a bird"}, "a kite"]
    lines = [
        json.dumps({"id": str(n), "image": "a.jpg", "caption": cell, "more": cell})
        for n, cell in enumerate(cells)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    given = PreprocessConfig(
        input=str(tmp_path / "t.jsonl"),
        output=str(tmp_path / "out"),
        columns=ColumnOptions(id="id", keep="more"),
        split=SplitOptions(val=0.0),
        group=group,
    )
    LocalRun(given).committed()
    table = pq.read_table(tmp_path / "out/train/shard-000000.parquet")
    made = [(row["captions"], row["reason"], row["more"]) for row in table.to_pylist()]
    assert made == [
        (["a bird", "a kite"], None, '["a bird","a kite"]'),
        (None, "bad_text", '{"en":"a bird"}'),
        (["a kite"], None, "a kite"),
    ]


def test_a_cell_that_is_no_hash_is_told_with_its_column(tmp_path: Path) -> None:
    digest = hashlib.sha256(GOOD).digest()
    hashes = {"digest": [digest, b"md5:" + b"a" * 32]}
    table = {"image": [GOOD] * 2, "caption": ["a bird", "a kite"], **hashes}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    given = PreprocessConfig(
        input=str(tmp_path / "t.parquet"),
        output=str(tmp_path / "out"),
        columns=ColumnOptions(sha256="digest"),
        split=SplitOptions(val=0.0),
    )
    LocalRun(given).committed()
    made = pq.read_table(tmp_path / "out/train/shard-000000.parquet").to_pylist()
    assert [row["reason"] for row in made] == [None, "hash_mismatch"]
    assert made[1]["detail"].startswith("column 'digest' holds no sha256")
