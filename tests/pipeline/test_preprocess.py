"""What a finished dataset holds, read as the contract says, by plain tools."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import tarfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image
from tokenizers import Tokenizer

from pipeline.manifest import INDEX_DTYPE, captions_of, load_index, load_manifest
from pipeline.shards import members
from tests.pipeline.corpora import FLAGS, REPOSITORY, SPECIAL_CAPTION, Run


def files(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def samples(root: Path) -> dict[str, dict[str, bytes]]:
    """Members of every sample by key, read with the standard library."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in load_manifest(root).shards:
        with tarfile.open(root / shard.name) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                payload = tar.extractfile(member)
                assert payload is not None
                found.setdefault(key, {})[name] = payload.read()
    return found


def rows(root: Path) -> list[dict[str, Any]]:
    """The parquet rows of every input."""
    tables = [*root.glob("*/shard-*.parquet"), *root.glob("rejected/*.parquet")]
    return [row for table in tables for row in pq.read_table(table).to_pylist()]


def by_url(root: Path) -> dict[str, dict[str, Any]]:
    return {row["url"]: row for row in rows(root) if row["status"] != "duplicate"}


def test_one_and_two_workers_write_the_same_bytes(
    dataset: Path, dataset_of_two: Path
) -> None:
    one, two = files(dataset), files(dataset_of_two)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len(load_manifest(dataset).shards) > 4


def test_no_file_names_a_time_a_host_or_a_path(dataset: Path) -> None:
    found = files(dataset)
    times = [(dataset / name).stat().st_mtime for name in found]
    start, end = min(times) - 600, max(times) + 600
    moments = [datetime.fromtimestamp(time, UTC) for time in (start, *times, end)]
    words = {moment.strftime("%Y-%m-%d") for moment in moments}
    words |= {moment.astimezone().strftime("%Y-%m-%d") for moment in moments}
    words |= {str(dataset.parent), str(REPOSITORY)}
    assert [
        (name, word)
        for name, data in found.items()
        for word in sorted(words)
        if word.encode() in data
    ] == []
    # Short names and numbers stand in compressed bytes by chance; text is searched.
    texts = {
        name: data.decode()
        for name, data in found.items()
        if Path(name).suffix in (".json", ".yaml", ".md", ".sha256")
    }
    assert {".palimpsest/plan.json", "manifest.json", "README.md"} <= texts.keys()
    host = re.escape(socket.gethostname())
    for name, text in texts.items():
        assert not re.search(rf"\b{host}\b", text), name
        assert not re.search(r'"(pid|process|host|hostname|user|time|date)"', text), (
            name
        )
        # Seconds, milliseconds or nanoseconds since 1970.
        seconds = [int(number[:10]) for number in re.findall(r"\b\d{10,19}\b", text)]
        assert [number for number in seconds if start < number < end] == [], name
    assert not (dataset / ".palimpsest" / "lease.json").exists()
    assert not (dataset / ".palimpsest" / "staging").exists()
    progress = json.loads((dataset.parent / "birds.progress.json").read_text())
    assert progress["accounting"]["inputs"] == 34


def test_every_input_is_accounted_for(dataset: Path) -> None:
    accounting = load_manifest(dataset).accounting
    accounting.check()
    assert accounting.inputs == 34
    assert accounting.written == 24
    assert dict(accounting.filtered) == {"empty_caption": 1}
    assert dict(accounting.failed) == {
        "missing_file": 3,
        "not_an_image": 1,
        "path_outside_input": 1,
        "truncated": 1,
    }
    assert accounting.duplicates == 3


def test_every_input_has_one_parquet_row(dataset: Path) -> None:
    found = rows(dataset)
    assert len(found) == len({row["key"] for row in found}) == 34
    assert Counter(row["status"] for row in found) == {
        "success": 24,
        "failed": 6,
        "filtered": 1,
        "duplicate": 3,
    }
    assert len(samples(dataset)) == 24
    written = {row["key"] for row in found if row["status"] == "success"}
    assert written == samples(dataset).keys()


def test_a_range_that_keeps_nothing_for_a_split_makes_no_shard(dataset: Path) -> None:
    assert not (dataset / "test").exists()
    (table,) = (dataset / "rejected").glob("*-test.parquet")
    assert pq.read_table(table)["reason"].to_pylist() == ["missing_file"] * 2


def test_the_tar_is_what_the_contract_says(dataset: Path) -> None:
    for shard in load_manifest(dataset).shards:
        data = (dataset / shard.name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found = tar.getmembers()
        assert all(m.isreg() and m.mode == 0o644 for m in found)
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in found} == {(0, 0, 0, "")}
        assert data[257:265] == b"ustar\x0000"
        names = [member.name.partition(".")[2] for member in found]
        assert names == [*members("jpg")] * shard.samples
        last = found[-1]
        end = last.offset_data + last.size + -last.size % 512
        assert data[end:] == bytes(1024)


def test_the_index_finds_and_seals_every_member(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    contents = samples(dataset)
    for shard in manifest.shards:
        data = (dataset / shard.name).read_bytes()
        index = load_index(dataset, shard)
        assert index.dtype == INDEX_DTYPE
        with tarfile.open(dataset / shard.name) as tar:
            keys = [
                name.split(".")[0] for name in tar.getnames()[:: len(members("jpg"))]
            ]
        for key, record in zip(keys, index, strict=True):
            for part, name in (("jpg", "jpg"), ("ids", "input_ids.npy")):
                start, size = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
                assert data[start : start + size] == contents[key][name]
                assert crc32c.crc32c(contents[key][name]) == record[f"{part}_crc32c"]
            start, size = int(record["span_offset"]), int(record["span_size"])
            assert crc32c.crc32c(data[start : start + size]) == record["span_crc32c"]
            about = json.loads(contents[key]["json"])
            assert int(about["uid"], 16) == record["uid"]
            assert (about["width"], about["height"]) == (
                record["width"],
                record["height"],
            )
        offsets = np.fromfile(dataset / shard.sidecar(".tar.idx"), "<u8")
        # Energon's own writer appends the reader's position after the last member.
        assert offsets.tolist() == [*index["span_offset"], len(data) - 1024]


def test_ids_are_the_captions_each_ended_by_the_separator(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    sep = manifest.tokenizer.special_ids["sep"]
    for parts in samples(dataset).values():
        about = json.loads(parts["json"])
        ids = np.load(io.BytesIO(parts["input_ids.npy"]))
        assert ids.dtype == manifest.tokenizer.dtype == np.uint16
        captions = captions_of(ids, sep)
        assert len(captions) == len(about["captions"])
        for text, of_text in zip(about["captions"], captions, strict=True):
            assert tokenizer.decode(of_text[:-1]).replace(
                " ", ""
            ) == text.lower().replace(" ", "")
        assert parts["txt"].decode() == about["captions"][0] == about["caption"]


def test_five_captions_are_one_sample_and_special_tokens_in_them_are_text(
    dataset: Path,
) -> None:
    row = by_url(dataset)["images/five.jpg"]
    assert row["n_captions"] == len(row["captions"]) == 5
    assert row["captions"][-1] == SPECIAL_CAPTION
    special = load_manifest(dataset).tokenizer.special_ids
    ids = np.load(io.BytesIO(samples(dataset)[row["key"]]["input_ids.npy"]))
    assert np.count_nonzero(ids == special["sep"]) == 5
    assert not np.isin(ids, [special["mask"], special["cls"], special["unk"]]).any()


def test_images_have_the_configured_shorter_side(dataset: Path) -> None:
    for parts in samples(dataset).values():
        image = Image.open(io.BytesIO(parts["jpg"]))
        assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 32)
        assert image.layer == [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # 4:2:0
        assert not image.info.get("progressive")
        assert not image.getexif()


def test_exif_orientation_is_applied(dataset: Path) -> None:
    row = by_url(dataset)["images/turned.jpg"]
    assert (row["original_width"], row["original_height"]) == (40, 60)
    assert (row["width"], row["height"]) == (32, 48)
    assert json.loads(row["exif"])["Orientation"] == "6"


def test_the_held_out_copy_of_an_image_stays(dataset: Path) -> None:
    found = {row["url"]: row for row in rows(dataset)}
    assert found["images/held_copy.jpg"]["status"] == "success"
    assert found["images/held_copy.jpg"]["split"] == "val"
    assert found["images/train_copy.jpg"]["status"] == "duplicate"


def test_every_json_has_the_same_keys_and_types(dataset: Path) -> None:
    shapes = set()
    for parts in samples(dataset).values():
        about = json.loads(parts["json"])
        assert all(value is not None and value != [] for value in about.values())
        shapes.add(tuple((key, type(value)) for key, value in about.items()))
    assert len(shapes) == 1
    assert ("mood", str) in next(iter(shapes))


def test_json_names_the_source_bytes(dataset: Path, corpus: Path) -> None:
    row = by_url(dataset)["images/plain1.jpg"]
    about = json.loads(samples(dataset)[row["key"]]["json"])
    source = (corpus.parent / "images" / "plain1.jpg").read_bytes()
    assert about["sha256"] == hashlib.sha256(source).hexdigest()


def test_webdataset_reads_every_sample(dataset: Path) -> None:
    urls = [str(dataset / shard.name) for shard in load_manifest(dataset).shards]
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    read = list(reader.decode("rgb8").to_tuple("jpg", "txt", "json", "input_ids.npy"))
    assert len(read) == 24
    for image, text, about, ids in read:
        assert image.shape == (about["height"], about["width"], 3)
        assert text == about["caption"]
        assert ids.ndim == 1


def test_companions_list_every_shard(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    counts = {shard.name: shard.samples for shard in manifest.shards}
    assert json.loads((dataset / "sizes.json").read_text()) == counts
    local = json.loads((dataset / "train" / "sizes.json").read_text())
    assert {f"train/{name}": n for name, n in local.items()}.items() <= counts.items()
    parts = yaml.safe_load((dataset / ".nv-meta" / "split.yaml").read_text())
    listed = [name for names in parts["split_parts"].values() for name in names]
    assert sorted(listed) == sorted(counts)
    front = (dataset / "README.md").read_text().split("---")[1]
    for entry in yaml.safe_load(front)["configs"][0]["data_files"]:
        assert list(dataset.glob(entry["path"]))


def test_a_finished_dataset_is_recognised(
    dataset: Path, corpus: Path, preprocess: Run
) -> None:
    before = files(dataset)
    result = preprocess(
        f"--input={corpus}", f"--output={dataset}", *FLAGS, "--columns.keep=mood"
    )
    assert result.returncode == 0
    assert "already complete" in result.stderr
    assert files(dataset) == before


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--image.size=64", "image.size: 32 -> 64"),
        ("--limit=3", "limit: None -> 3"),
        ("--tokenizer=train:200", "tokenizer.made: 'train:8000' -> 'train:200'"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(
    dataset: Path, corpus: Path, preprocess: Run, flag: str, says: str
) -> None:
    before = files(dataset)
    flags = [*FLAGS, "--columns.keep=mood", flag]
    result = preprocess(f"--input={corpus}", f"--output={dataset}", *flags)
    assert result.returncode == 1
    assert says in result.stderr
    assert "choose a new --output" in result.stderr
    assert result.stderr.count("\n") == 1
    assert files(dataset) == before
