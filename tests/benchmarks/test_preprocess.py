"""The benchmark of preprocessing runs and adds up; how fast is not for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import planning, preprocess
from benchmarks.photos import SETS, make_photos, write_table


def test_a_smoke_run_measures_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    work = tmp_path / "work"
    preprocess.main(
        ["--smoke", "--sets", "small", f"--work={work}", f"--results={results}"]
    )
    found = json.loads(results.read_text())
    small = found["small"]
    assert set(small["contenders"]) >= {"palimpsest 1"}
    for figures in small["contenders"].values():
        assert figures["peak_memory_bytes"] > 0
        assert figures["images_per_second"] > 0
    seconds = small["limit"]["seconds"]
    assert min(seconds.values()) > 0
    for kind in planning.FORMATS:
        assert found["planning"][kind]["inputs"] == 10_000
        assert found["planning"][kind]["ranges"] == 1
    assert "palimpsest 1" in capsys.readouterr().out


@pytest.mark.parametrize("from_originals", [True, False])
def test_photos_are_distinct_of_their_size_and_made_once(
    tmp_path: Path, *, from_originals: bool
) -> None:
    original = tmp_path / "original.jpg"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(original)
    folder = tmp_path / "photos"
    originals = [original] if from_originals else []
    make_photos(folder, SETS["small"], 4, originals)
    files = sorted(folder.iterdir())
    assert len({path.read_bytes() for path in files}) == len(files) == 4
    assert [Image.open(path).size for path in files] == [(640, 480), (480, 640)] * 2
    before = [path.stat().st_mtime_ns for path in files]
    make_photos(folder, SETS["small"], 4, originals)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_table_names_files_that_are_there(tmp_path: Path) -> None:
    make_photos(tmp_path, SETS["small"], 2, [])
    rows = pq.read_table(write_table(tmp_path, 2)).to_pylist()
    assert [Path(row["url"].removeprefix("file://")) for row in rows] == sorted(
        tmp_path.glob("*.jpg")
    )
    assert all(row["caption"] for row in rows)


def test_planned_corpora_hold_the_same_rows(tmp_path: Path) -> None:
    inputs = (1 << 18) + 3
    planning.write_parquet(tmp_path / "planned.parquet", inputs)
    planning.write_tsv(tmp_path / "planned.tsv", inputs)
    table = pq.read_table(tmp_path / "planned.parquet")
    header, *lines = (tmp_path / "planned.tsv").read_text().splitlines()
    assert header.split("\t") == table.column_names
    for row in np.unique([0, 1, inputs // 2, inputs - 1]).tolist():
        assert lines[row].split("\t") == list(
            table.slice(row, 1).to_pylist()[0].values()
        )
    assert len(lines) == inputs
    assert len(set(table["path"].to_pylist())) == inputs
    for kind in planning.FORMATS:
        made = planning.plan(tmp_path / f"planned.{kind}")
        assert (made["inputs"], made["ranges"]) == (inputs, 27)
