"""Anybody's tars become a dataset, and stay as they are."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.captions import BadText
from pipeline.index import IndexConfig, main
from pipeline.indexing import index
from pipeline.manifest import Manifest, load_index, load_manifest
from pipeline.options import InputOptions
from pipeline.sources import open_source
from pipeline.sources.tars import TarSource
from tests.conftest import deepspeed_command, launch_environment
from tests.pipeline.corpora import REPOSITORY, caption, encoded, picture
from tests.pipeline.foreign import (
    every_kind_of_image,
    img2dataset_files,
    img2dataset_shard,
    write_tar,
)
from tests.trainer.tiny import TINY
from trainer.dataset import Dataset
from trainer.geometry import Box, decode_into


def indexed(folder: Path, **keys: Any) -> Manifest:
    """Index `folder` in one process, and read back what was written."""
    keys = {"tokenizer": "train:200", "name": "birds", "workers": 1, **keys}
    made = index(IndexConfig(dataset=str(folder), **keys))
    assert load_manifest(folder) == made
    return made


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    return [
        row
        for shard in manifest.shards
        for row in pq.read_table(folder / shard.files["parquet"]).to_pylist()
    ]


def reasons(manifest: Manifest) -> dict[str, int]:
    return {**manifest.accounting.failed, **manifest.accounting.filtered}


def samples(folder: Path) -> list[tuple[int, bytes, list[list[int]]]]:
    """(uid, image bytes, ids of each caption) as the trainer reads them."""
    dataset = Dataset(folder, "train")
    places = dataset.places()
    return [
        (
            int(record["uid"]),
            bytes(dataset.jpeg(int(shard), record)),
            [ids.tolist() for ids in dataset.captions(int(shard), record)],
        )
        for (shard, _), record in zip(places, dataset.records(places), strict=True)
    ]


def test_our_own_tars_get_the_index_that_they_had(
    dataset: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "birds"
    shutil.copytree(dataset / "tokenizer", lost / "tokenizer")
    tars = sorted(dataset.glob("*/shard-*.tar"))
    assert len(tars) > 2
    for tar in tars:
        target = lost / tar.relative_to(dataset)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(tar, target)
    made = index(IndexConfig(dataset=str(lost), workers=1))
    was = load_manifest(dataset)
    assert made.tokenizer == was.tokenizer
    assert made.totals() == was.totals()
    for shard in was.shards:
        for kind in ("tar", "index", "idx"):
            name = shard.files[kind]
            assert (lost / name).read_bytes() == (dataset / name).read_bytes(), name
    assert all(shard.ids is None for shard in made.shards)


def test_img2datasets_tars_stay_and_its_tables_are_set_aside(tmp_path: Path) -> None:
    for number in range(2):
        img2dataset_shard(tmp_path, number, range(number * 5, number * 5 + 5))
    before = tree(tmp_path)
    manifest = indexed(tmp_path)
    after = tree(tmp_path)
    for name, data in before.items():
        place = name if name.endswith(".tar") else f".palimpsest/set-aside/{name}"
        assert after[place] == data
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar"]
    assert manifest.accounting.inputs == manifest.accounting.written == 10
    for row in rows(tmp_path, manifest):
        number = row["key"].split("/")[1]
        assert row["url"] == f"https://example.com/{int(number)}.jpg"
        assert (row["width"], row["height"]) == (60, 40)
        assert (row["original_width"], row["original_height"]) == (640, 480)
        assert row["caption"] == caption(int(number))
        image = img2dataset_files(range(int(number), int(number) + 1))
        digest = hashlib.sha256(image[f"{number}.jpg"]).hexdigest()
        assert row["sha256"] == digest
    read = samples(tmp_path)
    assert [image for _, image, _ in read] == [
        data
        for name, data in img2dataset_files(range(10)).items()
        if name.endswith(".jpg")
    ]
    assert len({uid for uid, _, _ in read}) == 10


@pytest.mark.parametrize(
    ("kind", "folders", "prefix"),
    [
        (tarfile.USTAR_FORMAT, False, ""),
        (tarfile.GNU_FORMAT, True, "photos/" + "long" * 40),
        (tarfile.PAX_FORMAT, True, "photos/caf\u00e9" + "long" * 40),
    ],
)
def test_samples_are_those_that_webdataset_reads(
    tmp_path: Path, kind: int, folders: bool, prefix: str
) -> None:
    files = [
        (prefix + name, data) for name, data in img2dataset_files(range(4)).items()
    ]
    files.insert(3, ("LICENSE", b"a file without an extension"))
    write_tar(tmp_path / "a.tar", files, kind=kind, folders=folders)
    manifest = indexed(tmp_path, check="header")
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert len(read) == manifest.accounting.written == 4
    assert [image for _, image, _ in samples(tmp_path)] == [s["jpg"] for s in read]
    keys = [row["key"] for row in rows(tmp_path, manifest)]
    assert keys == [f"a/{sample['__key__']}" for sample in read]
    # Spans and Energon's offsets lead to each sample's first header.
    found = load_index(tmp_path, manifest.shards[0])
    offsets = np.frombuffer((tmp_path / "a.tar.idx").read_bytes(), "<u8")
    assert offsets[:-1].tolist() == found["span_offset"].tolist()
    data = (tmp_path / "a.tar").read_bytes()
    for record, sample in zip(found, read, strict=True):
        start = int(record["span_offset"])
        span = data[start : start + int(record["span_size"])] + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(span)) as tar:
            names = [member.name for member in tar if member.isreg()]
        assert f"{sample['__key__']}.jpg" in names


def test_samples_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    good = encoded(picture(1))
    files: list[tuple[str, bytes]] = [
        *[("good.jpg", good), ("good.txt", b"a red bird")],
        ("textonly.txt", b"no image here"),
        ("imageonly.jpg", good),
        *[("blank.jpg", good), ("blank.txt", b" \n ")],
        *[("two.jpg", good), ("two.png", good), ("two.txt", b"a bird")],
        *[("words.jpg", b"this is no image"), ("words.txt", b"a bird")],
        *[("cut.jpg", encoded(picture(2, (200, 150)))[:1500]), ("cut.txt", b"a kite")],
        *[("latin.jpg", good), ("latin.txt", "caf\u00e9".encode("latin-1"))],
        *[("torn.jpg", good), ("torn.json", b'{"caption": "a')],
        *[("twice.jpg", good), ("twice.jpg", good), ("twice.txt", b"a bird")],
        *[("good.jpg", good), ("good.txt", b"another bird")],
    ]
    write_tar(tmp_path / "train" / "a.tar", files)
    write_tar(tmp_path / "val" / "b.tar", {"none.txt": b"nothing to see"})
    manifest = indexed(tmp_path)
    assert manifest.accounting.written == 1
    assert reasons(manifest) == {
        "missing_image": 2,
        "empty_caption": 2,
        "several_images": 1,
        "not_an_image": 1,
        "truncated": 1,
        "bad_text": 2,
        "duplicate_member": 1,
        "duplicate_key": 1,
    }
    table = rows(tmp_path, manifest)
    assert len(table) == 11
    assert [row["key"] for row in table if row["status"] == "success"] == [
        "train/a/good"
    ]
    # A tar that has nothing is no shard, but its rows are kept.
    assert [shard.name for shard in manifest.shards] == ["train/a.tar"]
    assert "val/b.parquet" in manifest.files


def test_json_is_what_preprocess_reads(tmp_path: Path) -> None:
    image = encoded(picture(1))
    texts = [
        *(b'{"caption": "one", "s": NaN}', b'{"caption": "two", "s": -Infinity}'),
        *(b'{"caption": "half \\ud800"}', b'{"caption": "n", "s": 1e999}'),
        b'{"caption": "long", "s": %b}' % (b"9" * 5_000),
        *(b'{"caption": "torn", "s": nan}', b'{"caption": "torn"', b"\xff"),
        b'{"caption": "deep", "s": %b}' % (b"[" * 2_000 + b"]" * 2_000),
    ]
    files = [
        member
        for number, text in enumerate(texts)
        for member in ((f"{number}.jpg", image), (f"{number}.json", text))
    ]
    write_tar(tmp_path / "a.tar", files)
    source = open_source(InputOptions(path=str(tmp_path / "a.tar")))
    assert isinstance(source, TarSource)
    wanted = [row["captions"] for row in source.rows(["captions"], 0, source.end)]
    manifest = indexed(tmp_path)
    found = [row["captions"] for row in rows(tmp_path, manifest)]
    assert found[:5] == [["one"], ["two"], ["half \ufffd"], ["n"], ["long"]]
    assert found[:5] == wanted[:5]
    assert all(isinstance(cell, BadText) for cell in wanted[5:])
    assert reasons(manifest) == {"bad_text": 4}


def test_an_image_is_the_member_that_preprocess_reads(tmp_path: Path) -> None:
    one, other = encoded(picture(1)), encoded(picture(2))
    files = {
        **{"n0.photo.jpg": one, "n0.txt": b"a red bird"},
        **{"n1.Large.PNG": encoded(picture(3), "PNG"), "n1.txt": b"a blue bird"},
        **{"n2.mask.png": other, "n2.jpg": one, "n2.txt": b"a green bird"},
        **{"n3.a,b.jpg": other, "n3.txt": b"a grey bird"},
        **{"n4.left.jpg": one, "n4.right.jpg": other, "n4.txt": b"two birds"},
        **{"n5.caf\udce9.jpg": one, "n5.b.jpg": other, "n5.txt": b"two more"},
        **{"n6.jpg.exe": one, "n6.txt": b"a kite"},
    }
    tar = write_tar(tmp_path / "a.tar", files)
    manifest = indexed(tmp_path)
    source = open_source(InputOptions(path=str(tar)))
    assert isinstance(source, TarSource)
    (block,) = source.blocks(["image"], 0, source.end)
    read = block.batch.column("image").to_pylist()
    assert [image for _, image, _ in samples(tmp_path)] == read[:4]
    assert reasons(manifest) == {"several_images": 2, "missing_image": 1}
    details = [row["detail"] for row in rows(tmp_path, manifest) if row["detail"]]
    assert details[0] == "images: left.jpg, right.jpg"
    # A comma stands between two names there.
    energon = (tmp_path / ".nv-meta/dataset.yaml").read_text()
    assert "image: jpg,large.png,photo.jpg\n" in energon


@pytest.mark.parametrize("check", ["full", "header"])
def test_a_pickled_member_is_never_decoded(tmp_path: Path, check: str) -> None:
    trap = tmp_path / "trap"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(trap),))

    data = pickle.dumps(Payload())
    array = io.BytesIO()
    np.save(array, np.array([Payload()], dtype=object), allow_pickle=True)
    files = img2dataset_files(range(1))
    for name in ("pyd", "pickle", "pkl", "pth"):
        files[f"000000000.{name}"] = data
    files["000000000.input_ids.npy"] = array.getvalue()
    write_tar(tmp_path / "tars" / "a.tar", files)
    manifest = indexed(tmp_path / "tars", check=check)
    assert manifest.accounting.written == 1
    assert len(samples(tmp_path / "tars")) == 1
    assert not trap.exists()


def test_no_flipped_header_bit_lets_a_wrong_sample_in(tmp_path: Path) -> None:
    files = img2dataset_files(range(4))
    whole = write_tar(tmp_path / "whole" / "a.tar", files).read_bytes()
    with tarfile.open(tmp_path / "whole" / "a.tar") as tar:
        headers = [member.offset for member in tar]
    images = {data for name, data in files.items() if name.endswith(".jpg")}
    chance = np.random.default_rng(7)
    for number, offset in enumerate(headers):
        # Inside the part of the header that its checksum covers.
        place, bit = offset + int(chance.integers(257)), int(chance.integers(8))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.tar").write_bytes(damaged)
    # One process for all of them: every folder would start its own.
    together = tmp_path / "together"
    for number in range(len(headers)):
        (together / f"{number}").mkdir(parents=True)
        shutil.copy(tmp_path / str(number) / "a.tar", together / str(number) / "a.tar")
    manifest = indexed(together, check="header")
    for shard in manifest.shards:
        dataset = Dataset(together, shard.split)
        places = dataset.places()
        for record in dataset.records(places):
            assert bytes(dataset.jpeg(0, record)) in images
        assert 1 <= len(places) <= 3
    assert len(manifest.shards) == len(headers)
    assert set(reasons(manifest)) == {"damaged_header"}


def test_a_cut_tar_gives_its_whole_samples_and_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "a.tar", img2dataset_files(range(4)))
    with tarfile.open(tar) as found:
        last = found.getmembers()[-3]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + 100])
    manifest = indexed(tmp_path, check="header")
    assert manifest.accounting.written == 3
    assert manifest.accounting.failed == {"truncated_tar": 1}
    assert "no end-of-archive mark" in capfd.readouterr().err


def test_a_second_run_changes_nothing_and_takes_in_new_tars(tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 0, range(3))
    (tmp_path / "README.md").write_text("my own card")
    first = indexed(tmp_path, check="header")
    assert (tmp_path / ".palimpsest/set-aside/README.md").read_text() == "my own card"

    def times() -> dict[Path, int]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert indexed(tmp_path, check="header") == first
    assert times() == before
    img2dataset_shard(tmp_path, 1, range(3, 7))
    (tmp_path / "00000.index.npy").unlink()
    more = indexed(tmp_path, check="header")
    assert more.shards[0] == first.shards[0]
    assert [shard.samples for shard in more.shards] == [3, 4]
    with pytest.raises(ValueError, match=r"another configuration \(.*text.min_chars"):
        indexed(tmp_path, check="header", text=_text(min_chars=9))


def _text(**keys: Any) -> Any:
    from pipeline.options import TextOptions

    return TextOptions(**keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../b.tar"},
        {"samples": None},
        {"samples": -1},
        {"sha256": {}},
        {"sha256": []},
        {"accounting": {"inputs": "x"}},
        {"more": 1},
    ],
)
def test_a_record_that_cannot_be_true_is_made_anew(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    img2dataset_shard(tmp_path, 0, range(3))
    first = indexed(tmp_path)
    record = tmp_path / ".palimpsest/indexed/00000.tar.json"
    before = tree(tmp_path)
    record.write_text(json.dumps(json.loads(record.read_bytes()) | changes))
    assert indexed(tmp_path) == first
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"transform": 3}', "[" * 99_999])
def test_a_plan_of_another_shape_is_one_clear_line(text: str, tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 0, range(3))
    indexed(tmp_path)
    (tmp_path / ".palimpsest/index.json").write_text(text)
    with pytest.raises(ValueError, match=r"sound copy|again"):
        indexed(tmp_path)


def test_killed_at_any_moment_the_same_command_finishes(tmp_path: Path) -> None:
    for folder in ("calm", "killed"):
        for number in range(12):
            img2dataset_shard(
                tmp_path / folder, number, range(number * 3, number * 3 + 3)
            )
    killed, flags = tmp_path / "killed", ["--check=header", "--name=birds"]
    indexed(tmp_path / "calm", check="header")
    command = [sys.executable, "-m", "pipeline.index", str(killed), *flags]
    command += ["--workers=1", "--tokenizer=train:200"]
    moments = {
        "tokenizer": (killed / "tokenizer").exists,
        "first": lambda: any(killed.glob("*.index.npy")),
        "records": lambda: len([*(killed / ".palimpsest/indexed").glob("*")]) > 5,
        "companions": (killed / "sizes.json").exists,
    }
    deaths = 0
    for reached in moments.values():
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        while process.poll() is None and not reached():
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
    assert deaths >= 2
    indexed(killed, check="header")
    assert tree(killed) == tree(tmp_path / "calm")


def test_the_trainer_trains_on_indexed_tars_of_any_image(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    for number in range(2):
        img2dataset_shard(
            folder / "train", number, range(number * 12, number * 12 + 12)
        )
    write_tar(folder / "train" / "mixed.tar", every_kind_of_image())
    manifest = indexed(folder)
    assert manifest.accounting.written == 24 + len(every_kind_of_image()) // 2
    words = [f"--data={folder}", f"--output={tmp_path / 'run'}", "--schedule.steps=2"]
    done = subprocess.run(
        deepspeed_command(1, *TINY, *words, "--schedule.warmup=1"),
        env=launch_environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines]


def test_every_kind_of_image_is_decoded_as_a_viewer_shows_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", every_kind_of_image())
    manifest = indexed(tmp_path)
    table = rows(tmp_path, manifest)
    assert [row["status"] for row in table] == ["success"] * 11
    assert {(row["width"], row["height"]) for row in table} == {(48, 32)}
    shown = np.asarray(picture(1, (48, 32)).resize((24, 24), Image.Resampling.BICUBIC))
    out = np.empty((24, 24, 3), np.uint8)
    for row, (_, image, _) in zip(table, samples(tmp_path), strict=True):
        decode_into(out, memoryview(image), (48, 32), Box(0, 0, 48, 32))
        reference = shown
        if "grey" in row["key"]:
            grey = Image.fromarray(shown).convert("L").convert("RGB")
            reference = np.asarray(grey)
        assert np.abs(out.astype(int) - reference.astype(int)).mean() < 8, row["key"]
    with pytest.raises(ValueError, match="claims"):
        decode_into(out, memoryview(image), (47, 32), Box(0, 0, 47, 32))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no tars in .*name their folder"),
        (
            lambda folder: (folder / "a.tar.gz").write_bytes(b""),
            "unpack the compressed",
        ),
        (lambda folder: write_tar(folder / "My Set/a.tar", {}), "taken for a split"),
        (lambda folder: write_tar(folder / "a\n.tar", {}), "no name that a manifest"),
        (
            lambda folder: write_tar(folder / "a.tar", {"a.txt": b"words"}),
            "none of 1 samples could be indexed: 1 missing_image",
        ),
    ],
)
def test_folders_that_cannot_be_indexed_are_one_clear_line(
    tmp_path: Path, prepare: Any, message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path), "--tokenizer=train:200", "--workers=1"])


def test_a_preprocessed_dataset_and_copies_of_its_tars_are_refused(
    dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a dataset with an index already"):
        main([str(dataset), "--workers=1"])
    tar = next(iter(sorted((dataset / "train").glob("*.tar"))))
    for name in ("a.tar", "b.tar"):
        shutil.copy(tar, tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.tar and b\.tar: one tar is a copy"):
        main([str(tmp_path), "--check=header", "--workers=1"])
