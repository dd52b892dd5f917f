"""Keys of the command that choose inputs, cut shards or write other images, in three
runs; and the dry run, which must leave no trace.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.manifest import load_manifest, sample_uid
from pipeline.options import InputOptions
from tests.pipeline.corpora import (
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)
from tests.pipeline.test_preprocess import rows, samples

COMMON = ("--tokenizer=train:300", "--workers=1")
N_IMAGES = 24
# No multiple of anything: rows of one image lie far apart, in another order each time.
_STEPS = (1, 5, 7)
_LEFT_OUT = (3, 4)


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table in which every image has three rows, none beside another."""
    root = tmp_path_factory.mktemp("scattered")
    table = []
    for part, step in enumerate(_STEPS):
        for place in range(N_IMAGES):
            seed = place * step % N_IMAGES
            path = root / f"{seed}.png"
            if not path.exists():
                path.write_bytes(encoded(picture(seed, (60, 40 + seed)), "PNG"))
            words = f"{caption(seed)} {part}"
            table.append({"image": path.name, "text": words, "n": str(seed)})
    return write_table(root / "scattered.tsv", table)


def uid(path: Path, locator: object) -> str:
    return f"{sample_uid(path.stem, str(locator)):016x}"


def images(root: Path, ending: str) -> dict[str, Image.Image]:
    """The written images by the locator of their input."""
    keys = {row["key"]: row["url"] for row in rows(root)}
    return {
        keys[key]: Image.open(io.BytesIO(members[ending]))
        for key, members in samples(root).items()
    }


def check_deep(root: Path) -> None:
    result = run_module("pipeline.validate", root, "--deep")
    assert result.returncode == 0, result.stdout + result.stderr


def grouping(table: Path, root: Path) -> tuple[str, ...]:
    return (
        *(f"--input={table}", f"--output={root / 'out'}", *COMMON, "--group"),
        *(f"--allow_uids={root / 'allow.txt'}", f"--where=n <> '{_LEFT_OUT[1]}'"),
        *("--image.size=48", "--image.resize=border", "--image.format=webp"),
        *("--image.quality=80", "--shard.bytes=65536", "--split.group=n"),
        "--split.val=0.3",
    )


@pytest.fixture(scope="module")
def grouped(
    scattered: Path, tmp_path_factory: pytest.TempPathFactory, preprocess: Run
) -> Path:
    """Its rows brought together, some left out, as WebP on a border."""
    root = tmp_path_factory.mktemp("grouped")
    allowed = [uid(scattered, f"{n}.png") for n in range(N_IMAGES) if n != _LEFT_OUT[0]]
    (root / "allow.txt").write_text("\n".join(allowed))
    result = preprocess(*grouping(scattered, root))
    assert result.returncode == 0, result.stderr
    return root / "out"


def test_scattered_rows_are_one_sample(grouped: Path) -> None:
    found = {row["url"]: row for row in rows(grouped)}
    assert found.keys() == {f"{seed}.png" for seed in range(N_IMAGES)}
    for seed in set(range(N_IMAGES)) - set(_LEFT_OUT):
        row = found[f"{seed}.png"]
        assert row["captions"] == [f"{caption(seed)} {part}" for part in range(3)]
    reasons = [found[f"{seed}.png"]["reason"] for seed in _LEFT_OUT]
    assert reasons == ["not_allowed", "where"]
    assert not (grouped / ".palimpsest" / "spool").exists()


def test_shards_have_about_the_bytes_that_were_asked_for(grouped: Path) -> None:
    manifest = load_manifest(grouped)
    assert manifest.transform["shard"]["bytes"] == 65_536
    cut = manifest.transform["shard"]["samples"]
    counts = Counter(row["key"][:6] for row in rows(grouped))
    assert set(list(counts.values())[:-1]) <= {cut}
    sizes: Counter[int] = Counter()
    for shard in manifest.shards:
        sizes[shard.range] += shard.bytes
    assert len(sizes) > 1
    assert all(size < 2 * 65_536 for size in sizes.values())
    assert sizes[0] > 65_536 / 2


def test_webp_on_a_border_is_square_and_whole(grouped: Path) -> None:
    for url, image in images(grouped, "webp").items():
        assert (image.format, image.size) == ("WEBP", (48, 48)), url
    check_deep(grouped)


def test_a_resumed_run_keeps_the_cut_of_the_first(
    scattered: Path, grouped: Path, preprocess: Run
) -> None:
    result = preprocess(*grouping(scattered, grouped.parent))
    assert result.returncode == 0, result.stderr
    assert "already complete" in result.stderr


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_a_part_of_a_corpus_as_it_is(
    form: str, tmp_path: Path, preprocess: Run
) -> None:
    seeds = range(40)
    given = [encoded(picture(seed, (30 + seed, 50)), "PNG") for seed in seeds]
    text = [caption(seed) for seed in seeds]
    pq.write_table(pa.table({"image": given, "text": text}), tmp_path / "t.parquet")
    size = ["--image.resize=none"]
    if form == "jpg":
        size = ["--image.resize=center_crop", "--image.size=40"]
        size += ["--image.only_if_bigger"]
    result = preprocess(
        f"--input={tmp_path / 't.parquet'}",
        f"--output={tmp_path / 'out'}",
        *(*COMMON, *size, f"--image.format={form}", "--shard.samples=4"),
        *("--sample=0.5", "--limit=9", "--split.val=0"),
    )
    assert result.returncode == 0, result.stderr
    found = images(tmp_path / "out", form)
    numbers = [int(locator) for locator in found]
    assert len(numbers) == 9
    # The first of those that the hash takes, not the first of all.
    assert numbers == sorted(numbers)
    assert 9 < max(numbers) + 1 < 40
    for locator, image in found.items():
        width = 30 + int(locator)
        if form == "png":
            assert image.size == (width, 50)
            original = Image.open(io.BytesIO(given[int(locator)]))
            assert image.tobytes() == original.tobytes()
        else:
            # Whose shorter side is smaller already, that is left alone.
            assert image.size == ((40, 40) if width > 40 else (width, 50))
    check_deep(tmp_path / "out")


def test_a_dry_run_says_what_would_be_and_writes_nothing(
    scattered: Path, corpus: Path, tmp_path: Path, preprocess: Run
) -> None:
    def present() -> list[tuple[str, Any]]:
        roots = tmp_path, scattered.parent, corpus.parent
        paths = [path for root in roots for path in root.rglob("*")]
        return sorted((str(path), path.stat().st_mtime_ns) for path in paths)

    before = present()
    inputs = [
        {"path": str(scattered), "columns": {"caption": "text"}, "weight": 2},
        {"path": str(corpus), "name": "birds"},
    ]
    result = preprocess(
        f"--input={json.dumps(inputs)}",
        f"--output={tmp_path / 'out'}",
        *("--group", "--dry_run", "--image.size=32", "--shard.samples=10"),
    )
    assert result.returncode == 0, result.stderr
    assert present() == before
    said = result.stdout
    # 24 images; 34 inputs in the other, whose scattered rows are together now.
    assert "source scattered (tsv, weight 2)\n  inputs    24\n" in said
    assert "source birds (tsv, weight 1)\n  inputs    32\n" in said
    assert "up to 7 ranges of 10 inputs" in said
    for word in ("size      about ", "time      about ", "missing_file"):
        assert word in said


def test_a_dry_run_tells_programs_what_it_tells_people(
    corpus: Path, tmp_path: Path, preprocess: Run
) -> None:
    words = (f"--input={corpus}", f"--output={tmp_path / 'out'}", *COMMON)
    done = preprocess(*words, "--dry_run", "--json", "--tokenizer=train:300")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sample = found["sample"]
    lost = sum(sum(sample[part].values()) for part in ("filtered", "failed"))
    assert sample["inputs"] == sample["written"] + lost
    assert sample["written"] == sum(
        split["samples"] for split in sample["splits"].values()
    )
    written = sum(split["bytes"] for split in sample["splits"].values())
    assert found["bytes"] == pytest.approx(written / sample["inputs"] * found["inputs"])
    assert found["seconds"] == found["seconds_of_one_core"] / found["cores"]
    assert found["vocab_size"] == 300
    for source in found["sources"]:
        assert source["kind"] == "tsv"
    assert sum(source["inputs"] for source in found["sources"]) == found["inputs"]
    assert not (tmp_path / "out").exists()
    refused = preprocess(*words, "--json")
    assert refused.returncode == 2
    assert "give --dry_run too" in refused.stderr


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("photos.tsv", "photos"),
        ("/data/birds.v2.parquet", "birds"),
        ("/data/shards/", "shards"),
        ("s3://corpus/products/*.parquet", "products"),
        ("s3://corpus/*.parquet", "corpus"),
        ("/data/20[12]?/p*/x-*.tsv", "data"),
        ("https://example.com/birds.tsv?token=a/b*", "birds"),
    ],
)
def test_a_source_is_named_after_its_file_or_the_folder_of_many(
    path: str, name: str
) -> None:
    assert InputOptions(path=path).source_name == name
    assert InputOptions(path=path, name="mine").source_name == "mine"


def test_names_of_any_script_are_fine_for_inputs_and_outputs(
    scattered: Path, tmp_path: Path
) -> None:
    """Ray takes only ASCII for the tags of its metrics."""
    table = Path(tmp_path / "Vögel 鳥.tsv")
    table.write_bytes(scattered.read_bytes())
    flags = (f"--images={scattered.parent}", "--name=birds", *COMMON)
    output = tmp_path / "ü 鳥"
    done = run_module(
        "pipeline.preprocess", f"--input={table}", f"--output={output}", *flags
    )
    assert done.returncode == 0, done.stderr
    assert load_manifest(output).accounting.written == N_IMAGES


@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_folders_that_look_like_splits_are_told_not_taken(
    tmp_path: Path, flag: str
) -> None:
    corpus = tmp_path / "corpus"
    for split in ("train", "test"):
        (corpus / split).mkdir(parents=True)
        (corpus / split / "a.jpg").write_bytes(encoded(picture(len(split))))
        (corpus / split / "a.txt").write_text(f"a picture of {split}")
    done = run_module(
        "pipeline.preprocess",
        *(f"--input={corpus}", f"--output={tmp_path / 'out'}", flag, *COMMON),
    )
    assert done.returncode == 0, done.stderr
    assert "its folders test, train are read as one corpus" in done.stderr


def test_a_dry_run_refuses_the_output_that_the_run_would(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jpg").write_bytes(encoded(picture(1)))
    (corpus / "a.txt").write_text("a picture")
    done = run_module(
        "pipeline.preprocess",
        *(f"--input={corpus}", f"--output={corpus / 'out'}", "--dry_run", *COMMON),
    )
    assert done.returncode == 1
    assert "choose an --output outside of it" in done.stderr
