"""What the loader benchmark makes of its figures, and that our contender gives whole
batches.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import placement
from benchmarks.loader import _evicted, _medians, ratios, ratios_of_rounds, table
from benchmarks.loader_data import check_squares
from benchmarks.loader_ours import OURS
from benchmarks.loader_peers import BATCH, Where


def figure(rate: float) -> dict[str, Any]:
    return {
        "images_s": rate,
        "first_s": 1.0,
        "start_s": 3.0,
        "peak_mib": 100.0,
        "spread": 0.0,
    }


def test_ratios_are_to_webdataset_the_fastest_peer_and_the_limit() -> None:
    figures = {
        "Palimpsest": figure(900),
        "Palimpsest, crops": figure(5_000),
        "limit": figure(1_000),
        "webdataset": figure(300),
        "LitData": figure(450),
    }
    found = ratios(figures)
    assert found == {
        "of_webdataset": pytest.approx(3.0),
        "of_fastest": pytest.approx(2.0),
        "of_limit": pytest.approx(0.9),
    }
    errors = {"Energon": "ImportError: no such thing"}
    text = "\n".join(table({"contenders": figures, "errors": errors, "ratios": found}))
    assert text.count("reached") == 3
    assert "Energon                   not measured: ImportError" in text
    assert "cannot" in text
    figures["LitData"] |= {"resume_s": 0.5, "same_batch": True}
    figures["webdataset"] |= {"resume_s": 0.6, "same_batch": False}
    figures["Palimpsest, crops"] |= {"resume_error": "TypeError: no such thing"}
    figures["LitData"] |= {"cold_images_s": 431.0}
    figures["webdataset"] |= {"cold_error": "took more than 240 s"}
    figures["limit"] = figure(1_200)
    found = ratios(figures)
    text = "\n".join(table({"contenders": figures, "errors": {}, "ratios": found}))
    assert "of limit                       0.75   target 0.9: MISSED" in text
    assert "0.50 s " in text
    assert "0.60 s +" in text
    assert text.count("failed") == 2
    assert "431" in text


def test_a_machine_that_slows_down_between_rounds_changes_no_ratio() -> None:
    runs = {
        "limit": [figure(1_000), figure(500), figure(800)],
        "Palimpsest": [figure(900), figure(450), figure(720)],
        "LitData": [figure(450), figure(180)],
        "MosaicML": [figure(400), figure(225), figure(300)],
        "webdataset": [figure(300)],
    }
    found = ratios_of_rounds(runs)
    # The fastest of each round; one that failed is in no later one.
    assert found["of_limit"] == pytest.approx(0.9)
    assert found["of_fastest"] == pytest.approx(2.0)
    assert found["of_webdataset"] == pytest.approx(3.0)
    # One round of three says nothing.
    runs["Palimpsest"][1] = figure(100)
    assert ratios_of_rounds(runs)["of_limit"] == pytest.approx(0.9)
    runs["limit"] = runs["limit"][:1]
    assert ratios_of_rounds(runs)["of_limit"] == pytest.approx(0.9)
    assert ratios_of_rounds(runs | {"Palimpsest": []}) == {}


def test_medians_and_the_spread_of_the_rates() -> None:
    found = _medians([figure(100), figure(130), figure(110)])
    assert found["images_s"] == 110
    assert found["spread"] == pytest.approx(30 / 110)


def test_files_that_the_page_cache_keeps_are_told_from_those_it_has_dropped(
    tmp_path: Path,
) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for path in files:
        path.write_bytes(bytes(1 << 20))
    if kept := _evicted(files, tries=1):
        assert kept == 1.0
        pytest.skip("this file system keeps all its files in memory")
    with files[0].open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        # Of a page that somebody maps no kernel drops anything.
        mapped[1 << 19]
        assert _evicted(files, tries=1) == 0.25
    links = [tmp_path / f"link to {path.name}" for path in files]
    for link, path in zip(links, files, strict=True):
        link.hardlink_to(path)
    assert _evicted([*files, *links], tries=1) == 0


@pytest.mark.parametrize("name", [name for name in OURS if "limit" not in name])
def test_our_contenders_give_whole_batches_and_resume_where_they_were(
    mixed_squares: Path, name: str
) -> None:
    side = check_squares(mixed_squares)
    where = Where(dataset=mixed_squares, formats=mixed_squares, side=side)
    source, state_of = OURS[name](where, None)
    first = pixels_of(next(source)).copy()
    second = pixels_of(next(source)).copy()
    assert first.shape == (BATCH, side, side, 3)
    assert (first != second).any()
    assert state_of is not None
    again, _ = OURS[name](where, 1)
    assert np.array_equal(pixels_of(next(again)), second)


def pixels_of(batch: object) -> np.ndarray:
    micros = getattr(batch, "micro_batches", None)
    return (micros[0] if micros else batch).pixels.numpy()  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def mixed_squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 emoji of 32 px."""
    from tests.trainer.datasets import preprocess, slices

    folder = tmp_path_factory.mktemp("squares")
    (table_path,) = slices(folder, 160)
    return preprocess(
        folder / "shards", f"--input={table_path}", tokenizer=Path("train:600")
    )


@pytest.mark.parametrize("beside", [0, 20])
def test_placement_measures_and_writes(tmp_path: Path, beside: int) -> None:
    output = tmp_path / "placement.json"
    words = ["--ranks=16", "--shards=400", "--samples=50", "--global_batch=64"]
    words += ["--places=3", f"--beside={beside}", f"--output={output}"]
    placement.main(words)
    found = json.loads(output.read_text())
    assert (found["ranks"], found["beside"]) == (16, beside)
    assert 0 < found["warm_ms"] <= found["cold_worst_ms"]
