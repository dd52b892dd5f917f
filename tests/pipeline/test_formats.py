"""The command on every format at once, on scattered rows, on a part of a corpus, and on
other image formats: what it makes of each, read from the dataset.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import load_manifest, sample_uid
from tests.pipeline.corpora import (
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)
from tests.pipeline.foreign import img2dataset_shard
from tests.pipeline.test_preprocess import rows, samples

FLAGS = ("--image.size=32", "--tokenizer=train:300", "--split.val=0")
Made = dict[str, list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """One input of several, and what must become of it."""

    flags: dict[str, Any]
    captions: Made
    """Captions of each sample by its locator; none where the input fails."""
    weight: float = 1.0


def parquet(root: Path) -> Given:
    """A glob of files with image structs, and captions in two columns."""
    for part in range(2):
        seeds = range(2 * part, 2 * part + 2)
        table = {
            "image": [{"bytes": encoded(picture(s)), "path": None} for s in seeds],
            "title": [caption(seed) for seed in seeds],
            "alt": [[f"alt {seed}", "again"] for seed in seeds],
        }
        pq.write_table(pa.table(table), root / f"part{part}.parquet")
    (root / "other.txt").write_text("no part of the glob")
    return Given(
        flags={"path": f"{root}/part*.parquet", "columns": {"caption": "[title,alt]"}},
        captions={str(s): [caption(s), f"alt {s}", "again"] for s in range(4)},
    )


def lists(root: Path) -> Given:
    """Lists of images: a list of one is that one, several are refused."""
    one, two = encoded(picture(10)), encoded(picture(11))
    table = pa.table({"images": [[one], [one, two], []], "text": ["one", "two", "no"]})
    pq.write_table(table, root / "lists.parquet")
    return Given(
        flags={"path": str(root / "lists.parquet")},
        captions={"0": ["one"], "1": [], "2": []},
    )


def arrow(root: Path) -> Given:
    """`save_to_disk` of `datasets`, with its Image feature."""
    features = datasets.Features(
        {"picture": datasets.Image(), "sentences": [datasets.Value("string")]}
    )
    given = {
        "picture": [{"bytes": encoded(picture(s)), "path": None} for s in (20, 21)],
        "sentences": [["first", "second"], ["third"]],
    }
    made = datasets.Dataset.from_dict(given, features=features)
    made.save_to_disk(str(root / "saved"))
    return Given(
        flags={"path": str(root / "saved"), "columns": {"image": "picture"}},
        captions={"0": ["first", "second"], "1": ["third"]},
        weight=2.5,
    )


def tsv(root: Path) -> Given:
    """Paths, and adjacent rows of one image."""
    for seed in (30, 31):
        (root / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
    names = ("30.jpg", "30.jpg", "31.jpg", "gone.jpg")
    table = [{"path": name, "text": f"row {n}"} for n, name in enumerate(names)]
    return Given(
        flags={"path": str(write_table(root / "table.tsv", table))},
        captions={"30.jpg": ["row 0", "row 1"], "31.jpg": ["row 2"], "gone.jpg": []},
    )


def csv(root: Path) -> Given:
    """`file://` URLs inside and outside of the corpus, an id and an expected hash."""
    (root / "a.jpg").write_bytes(encoded(picture(40)))
    outside = root.parent / "outside.jpg"
    outside.write_bytes(encoded(picture(41)))
    table = [
        {"n": f"id{n}", "link": f"file://{path}", "title": "a, b\nc", "hash": digest}
        for n, (path, digest) in enumerate(
            [(root / "a.jpg", ""), (outside, ""), (root / "a.jpg", "0" * 64)]
        )
    ]
    return Given(
        flags={
            "path": str(write_table(root / "table.csv", table)),
            "columns": {"id": "n", "sha256": "hash"},
        },
        captions={"id0": ["a, b c"], "id1": [], "id2": []},
    )


def jsonl(root: Path) -> Given:
    """A template, a kept column, and images in a folder of their own."""
    (root / "photos").mkdir()
    objects = []
    for seed in (50, 51):
        (root / "photos" / f"{seed}.png").write_bytes(encoded(picture(seed), "PNG"))
        objects.append({"file": f"{seed}.png", "what": "hat", "tone": f"red{seed}"})
    lines = "\n".join(json.dumps(each) for each in objects)
    (root / "lines.jsonl").write_text(lines)
    columns = {"template": "a {tone} {what}", "keep": "tone"}
    return Given(
        flags={
            "path": str(root / "lines.jsonl"),
            "images": str(root / "photos"),
            "columns": columns,
        },
        captions={f"{seed}.png": [f"a red{seed} hat"] for seed in (50, 51)},
        weight=0.5,
    )


def coco(root: Path) -> Given:
    """Captions apart from images, in any order."""
    (root / "val").mkdir()
    images, notes = [], []
    for number in (7, 3):
        name = f"{number:012d}.jpg"
        (root / "val" / name).write_bytes(encoded(picture(60 + number)))
        images.append({"id": number, "file_name": name, "width": 60, "height": 40})
    for place, number in enumerate((3, 7, 3)):
        text = f"caption {place}"
        notes.append({"id": place, "image_id": number, "caption": text})
    document = {"info": {}, "images": images, "annotations": notes}
    (root / "captions.json").write_text(json.dumps(document))
    return Given(
        flags={"path": str(root / "captions.json"), "images": str(root / "val")},
        captions={"7": ["caption 1"], "3": ["caption 0", "caption 2"]},
    )


def folder(root: Path) -> Given:
    """Images with a text or json of the same name."""
    (root / "deep").mkdir()
    for number, name in enumerate(("a", "deep/b", "c")):
        (root / f"{name}.jpg").write_bytes(encoded(picture(80 + number)))
    (root / "a.txt").write_text("one\ntwo\n")
    (root / "deep" / "b.txt").write_text("three")
    return Given(
        flags={"path": str(root)},
        captions={"a.jpg": ["one", "two"], "deep/b.jpg": ["three"], "c.jpg": []},
    )


def tars(root: Path) -> Given:
    """img2dataset's output, its tables and statistics beside it."""
    for shard in range(2):
        img2dataset_shard(root, shard, range(90 + 2 * shard, 92 + 2 * shard))
    return Given(
        flags={"path": str(root)},
        captions={
            f"{(seed - 90) // 2:05d}/{seed:09d}": [caption(seed)]
            for seed in range(90, 94)
        },
    )


MAKERS: tuple[Callable[[Path], Given], ...] = (
    *(parquet, lists, arrow, tsv, csv, jsonl, coco, folder, tars),
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Given]:
    """Every corpus by its name."""
    root = tmp_path_factory.mktemp("formats")
    made = {}
    for maker in MAKERS:
        name = maker.__name__
        (root / name).mkdir()
        made[name] = maker(root / name)
    return made


@pytest.fixture(scope="module")
def output(
    given: dict[str, Given], tmp_path_factory: pytest.TempPathFactory, preprocess: Run
) -> Path:
    """All of them in one dataset."""
    inputs = [
        {"name": name, "weight": one.weight, **one.flags} for name, one in given.items()
    ]
    out = tmp_path_factory.mktemp("formats") / "out"
    result = preprocess(
        f"--input={json.dumps(inputs)}", f"--output={out}", *FLAGS, "--shard.samples=3"
    )
    assert result.returncode == 0, result.stderr
    return out


def test_every_format_gives_its_samples(given: dict[str, Given], output: Path) -> None:
    uids = {
        f"{sample_uid(name, locator):016x}": (name, locator)
        for name, one in given.items()
        for locator in one.captions
    }
    found: dict[str, Made] = {name: {} for name in given}
    for row in rows(output):
        name, locator = uids[row["uid"]]
        assert row["source"] == name
        written = row["status"] == "success"
        found[name][locator] = row["captions"] if written else []
    assert found == {name: one.captions for name, one in given.items()}


def test_every_other_row_has_its_reason(output: Path) -> None:
    reasons = {(row["source"], row["reason"]) for row in rows(output) if row["reason"]}
    assert reasons == {
        ("lists", "several_images"),
        ("lists", "missing_image"),
        ("tsv", "missing_file"),
        ("csv", "path_outside_input"),
        ("csv", "hash_mismatch"),
        ("folder", "empty_caption"),
    }


def test_a_shard_holds_one_source_and_weights_are_kept(
    given: dict[str, Given], output: Path
) -> None:
    manifest = load_manifest(output)
    weights = {name: one.weight for name, one in given.items()}
    assert dict(manifest.sources) == weights
    for shard in manifest.shards:
        table = pq.read_table(output / shard.sidecar(".parquet"))
        assert set(table["source"].to_pylist()) == {shard.source}
    assert {shard.source for shard in manifest.shards} == set(weights)


def test_metadata_of_img2dataset_is_kept(output: Path) -> None:
    found = [row for row in rows(output) if row["source"] == "tars"]
    assert {row["url"] for row in found} == {
        f"https://example.com/{seed}.jpg" for seed in range(90, 94)
    }
    abouts = [json.loads(one["json"]) for one in samples(output).values()]
    (kept,) = {
        json.dumps([about["original_height"], about["original_width"]])
        for about in abouts
        if about["source"] == "tars"
    }
    assert json.loads(kept)


def test_every_reader_finds_one_shape_of_json(output: Path) -> None:
    """Sources with columns of their own included."""
    abouts = [json.loads(members["json"]) for members in samples(output).values()]
    shapes = {tuple((k, type(v)) for k, v in about.items()) for about in abouts}
    assert len(shapes) == 1
    assert {about["tone"] for about in abouts if about["source"] == "tsv"} == {""}
    tones = {about["tone"] for about in abouts if about["source"] == "jsonl"}
    assert tones == {"red50", "red51"}
    loaded = datasets.load_dataset(str(output), split="train")
    assert len(loaded) == load_manifest(output).accounting.written


def test_validate_finds_no_damage(output: Path) -> None:
    result = run_module("pipeline.validate", output, "--deep")
    assert result.returncode == 0, result.stdout + result.stderr
