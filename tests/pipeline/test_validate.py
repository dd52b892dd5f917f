"""No damage passes: every changed byte is found and named, and mended if it can be."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.audit import audit
from pipeline.damages import Damage
from pipeline.index import IndexConfig
from pipeline.indexing import index
from pipeline.inspect_data import read_view
from pipeline.lease import Lease
from pipeline.manifest import file_sha256, load_index, load_manifest
from pipeline.repair import repair
from pipeline.retokenize import main as retokenize
from pipeline.storage import open_storage
from pipeline.validate import main as validate
from tests.pipeline.corpora import run_module
from tests.pipeline.damage import (
    copied,
    damages,
    first_shard,
    flip,
    reseal,
    rewrite_first,
)
from tests.pipeline.foreign import img2dataset_files, img2dataset_shard, write_tar
from tests.pipeline.s3 import S3Server
from tests.pipeline.test_preprocess import files


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return copied(dataset, tmp_path / "copy")


def test_a_sound_dataset_exits_0(dataset: Path) -> None:
    for flags in ((), ("--deep",)):
        result = run_module("pipeline.validate", dataset, *flags)
        assert result.returncode == 0, result.stdout
        assert "sound; 24 samples" in result.stdout


def test_damage_exits_1_and_names_shard_and_offset(copy: Path) -> None:
    shard = first_shard(copy)
    record = load_index(copy, shard)[1]
    place = int(record["jpg_offset"])
    flip(copy / shard.name, place + 5)
    result = run_module("pipeline.validate", copy)
    assert result.returncode == 1
    assert f"{shard.name} offset {place}: sample 1" in result.stdout


def test_json_output_lists_every_damage(copy: Path) -> None:
    shard = first_shard(copy)
    place = int(load_index(copy, shard)[0]["jpg_offset"])
    flip(copy / shard.name, place)
    result = run_module("pipeline.validate", copy, "--json", "--workers=2")
    value = json.loads(result.stdout)
    assert result.returncode == 1
    assert value["sound"] is False
    (found,) = value["damages"]
    assert (found["path"], found["offset"]) == (shard.name, place)


def test_a_directory_that_is_no_dataset_exits_1(tmp_path: Path) -> None:
    result = run_module("pipeline.validate", tmp_path)
    assert result.returncode == 1
    assert "not a finished dataset" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_flipped_bit_in_any_header_is_named_by_its_offset(copy: Path) -> None:
    shard = first_shard(copy)
    path = copy / shard.name
    record = load_index(copy, shard)[1]
    start, size = int(record["span_offset"]), int(record["span_size"])
    headers = [start, int(record["jpg_offset"]) - 512]
    assert start + size < path.stat().st_size
    for header in headers:
        for place in (0, 13, 100, 124, 148, 156, 257, 300, 345, 511):
            flip(path, header + place)
            # The samples around the damaged one are still checked, and sound.
            assert {d.offset for d in damages(copy)} == {header}, place
            flip(path, header + place)


def test_a_damaged_header_is_found_without_an_index(copy: Path) -> None:
    shard = first_shard(copy)
    record = load_index(copy, shard)[1]
    flip(copy / shard.name, int(record["span_offset"]) + 100)
    (copy / shard.index).unlink()
    found = {(d.path, d.offset) for d in damages(copy)}
    assert found == {(shard.name, int(record["span_offset"])), (shard.index, None)}


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", ".parquet", ".tar.idx"])
def test_a_missing_or_short_file_is_found(copy: Path, suffix: str) -> None:
    shard = first_shard(copy)
    path = copy / shard.sidecar(suffix)
    path.write_bytes(path.read_bytes()[:-512])
    assert any(d.path == shard.sidecar(suffix) for d in damages(copy))
    path.unlink()
    found = [(d.path, d.message) for d in damages(copy)]
    assert (shard.sidecar(suffix), "the file is missing") in found


def test_a_damaged_index_is_named_by_its_record(copy: Path) -> None:
    shard = first_shard(copy)
    index = np.load(copy / shard.index)
    index["jpg_size"][2] += 1
    np.save(copy / shard.index, index)
    messages = [d.message for d in damages(copy) if d.path == shard.index]
    assert any("record 2" in message and "jpg_size" in message for message in messages)


def test_a_damaged_companion_is_named_by_its_first_wrong_byte(copy: Path) -> None:
    flip(copy / first_shard(copy).sidecar(".tar.idx"), 9)
    flip(copy / "README.md", 40)
    flip(copy / "manifest.json.sha256", 7)
    found = {d.path: d.offset for d in damages(copy)}
    assert set(found.values()) == {40, 7, 9}


def test_a_shard_that_the_manifest_does_not_name_is_found(copy: Path) -> None:
    shard = first_shard(copy)
    stray = copy / shard.split / "shard-000777.tar"
    shutil.copy(copy / shard.name, stray)
    (found,) = damages(copy)
    assert (found.path, found.message) == (
        f"{shard.split}/{stray.name}",
        "not in the manifest",
    )


def test_a_lost_table_of_rejected_inputs_is_found(copy: Path) -> None:
    lost = {f"rejected/{path.name}" for path in (copy / "rejected").iterdir()}
    assert lost
    shutil.rmtree(copy / "rejected")
    found = {(d.path, d.message) for d in damages(copy)}
    assert {(name, "the file is missing") for name in lost} <= found


def test_the_rows_of_a_dataset_are_its_inputs(copy: Path) -> None:
    """A table that was short from the start, its digest included."""
    shard = first_shard(copy)
    path = copy / shard.sidecar(".parquet")
    table = pq.read_table(path)
    gone = table["status"][0].as_py()
    pq.write_table(table[1:], path)
    reseal(copy)
    messages = {d.message for d in damages(copy) if d.path == "*.parquet"}
    assert "inputs 33, the manifest has 34" in messages
    assert gone != "success" or "written 23, the manifest has 24" in messages


def test_an_input_counts_once_by_its_last_attempt(copy: Path) -> None:
    """A row that tries a failed input again takes its place in the sums."""
    shard = first_shard(copy)
    failed = next(
        row["key"]
        for path in copy.glob("*/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["status"] == "failed" and row["reason"] == "missing_file"
    )
    path = copy / shard.sidecar(".parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    # A second attempt that fails like the first changes no sum.
    again = rows[0] | {"key": "000099000000", "retry_of": failed}
    again |= {"status": "failed", "reason": "missing_file"}
    schema = table.schema
    if "retry_of" not in schema.names:
        schema = schema.append(pq.read_schema(path).field("key").with_name("retry_of"))
    pq.write_table(type(table).from_pylist([*rows, again], schema), path)
    reseal(copy)
    assert damages(copy) == []


def test_a_damaged_manifest_is_named_whatever_it_says(copy: Path) -> None:
    """Nothing in it is believed, however it still parses."""
    text = (copy / "manifest.json").read_bytes()
    for old, new in ((b'"sep"', b'"se`"'), (b'"train"', b'"trayn"'), (b"34", b"35")):
        (copy / "manifest.json").write_bytes(text.replace(old, new))
        result = run_module("pipeline.validate", copy, "--deep", "--workers=1")
        assert result.returncode == 1
        said = result.stdout + result.stderr
        assert "manifest.json" in said
        assert "it is damaged" in said
        assert "Traceback" not in said
    seal = (copy / "manifest.json.sha256").read_bytes()
    (copy / "manifest.json").write_bytes(text)
    (copy / "manifest.json.sha256").write_bytes(seal[:9] + b"?" + seal[10:])
    (found,) = damages(copy)
    assert (found.path, found.offset) == ("manifest.json.sha256", 9)


def test_a_uid_that_occurs_twice_is_named(copy: Path) -> None:
    first, second = load_manifest(copy).shards[:2]
    index = np.load(copy / second.index)
    index["uid"][0] = np.load(copy / first.index)["uid"][1]
    np.save(copy / second.index, index)
    reseal(copy)
    found = {(d.path, d.message[:8]) for d in damages(copy) if "twice" in d.message}
    assert found == {(first.index, "record 1"), (second.index, "record 0")}


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "JPEG")
    return file.getvalue()


def shuffled_ids(member: bytes) -> bytes:
    """The same tokens in another order: as many captions, but other ones."""
    ids = np.load(io.BytesIO(member))
    file = io.BytesIO()
    np.save(file, np.append(ids[-2::-1], ids[-1]))
    return file.getvalue()


def with_json(member: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(member) | changes, ensure_ascii=False).encode()


LIES = {
    "txt": (lambda old: b"another caption", "txt is not the first caption"),
    "json": (lambda old: with_json(old, height=7), "json has height 7"),
    "json uid": (lambda old: with_json(old, uid="0" * 16), "json has uid"),
    "json url": (lambda old: with_json(old, url="elsewhere"), "the table"),
    "input_ids.npy": (shuffled_ids, "the tokens are not those of the captions"),
    "jpg": (lambda old: jpeg((9, 9)), "the image is 9 x 9"),
    "jpg cut": (lambda old: old[:-300], "does not decode"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_sample_that_contradicts_itself_is_found_by_deep(
    copy: Path, lie: str
) -> None:
    """All digests agree: only a look at what the sample says can tell."""
    change, message = LIES[lie]
    name = rewrite_first(copy, lie.partition(" ")[0], change)
    assert damages(copy) == []
    found = damages(copy, deep=True)
    assert {(d.path, d.offset) for d in found} == {(name, 0)}
    assert any(message in d.message for d in found), found


def test_repair_rewrites_what_follows_from_sound_files(copy: Path) -> None:
    shard = first_shard(copy)
    paths = [shard.sidecar(suffix) for suffix in (".index.npy", ".tar.idx")]
    paths += [shard.sidecar("_stats.json"), "README.md", ".nv-meta/split.yaml"]
    paths += ["tokenizer/tokenizer_config.json", "sizes.json", "manifest.json.sha256"]
    sound = {path: (copy / path).read_bytes() for path in paths}
    for path in paths:
        flip(copy / path, len(sound[path]) // 2)
    (copy / "train/sizes.json").unlink()
    result = run_module("pipeline.validate", copy, "--repair")
    assert result.returncode == 0, result.stderr
    assert {path: (copy / path).read_bytes() for path in paths} == sound
    assert not copy.with_name("copy.quarantine").exists()


def test_repair_turns_back_flipped_bits_without_the_corpus(copy: Path) -> None:
    shard = first_shard(copy)
    record = load_index(copy, shard)[1]
    places = [
        (shard.name, int(record["jpg_offset"]) + 9),
        (shard.sidecar(".parquet"), 900),
        ("rejected/range-000004-test.parquet", 77),
        (".palimpsest/plan.json", 50),
        (".palimpsest/ranges/000001.json", 90),
        ("tokenizer/tokenizer.json", 400),
        ("manifest.json", 2000),
    ]
    sound = {path: (copy / path).read_bytes() for path, _ in places}
    for path, place in places:
        flip(copy / path, place, bit=5)
    copy.with_name("copy.progress.json").unlink(missing_ok=True)
    result = run_module("pipeline.validate", copy, "--repair", "--deep")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path: (copy / path).read_bytes() for path in sound} == sound


def test_repair_puts_aside_what_it_cannot_mend_and_says_so(copy: Path) -> None:
    shard = first_shard(copy)
    # Two flipped bits: nothing but the corpus has these bytes.
    for place in (3000, 4000):
        flip(copy / shard.name, place)
    damaged = (copy / shard.name).read_bytes()
    copy.with_name("copy.progress.json").unlink(missing_ok=True)
    result = run_module("pipeline.validate", copy, "--repair")
    assert result.returncode == 1
    assert "copy.progress.json does not hold the configuration" in result.stderr
    assert f"{shard.samples} samples in 1 shards are missing" in result.stderr
    aside = copy.with_name("copy.quarantine") / shard.name
    assert aside.read_bytes() == damaged
    assert not (copy / shard.name).exists()


def test_repair_puts_files_at_the_top_aside_too(copy: Path) -> None:
    shutil.copy(copy / first_shard(copy).name, copy / "stray.tar")
    readme = (copy / "README.md").read_bytes()
    (copy / "README.md").write_bytes(b"damaged")
    result = run_module("pipeline.validate", copy, "--repair")
    assert result.returncode == 0, result.stdout + result.stderr
    aside = copy.with_name("copy.quarantine")
    assert [path.name for path in aside.iterdir()] == ["stray.tar"]
    assert not (copy / "stray.tar").exists()
    assert (copy / "README.md").read_bytes() == readme


def test_repair_waits_for_whoever_writes(copy: Path) -> None:
    stray = copy / "train" / "shard-000777.tar"
    shutil.copy(copy / first_shard(copy).name, stray)
    before = files(copy)
    with Lease(open_storage(copy)):
        result = run_module("pipeline.validate", copy, "--repair")
    assert result.returncode == 1
    assert "is being written by process" in result.stderr
    assert files(copy) == before
    assert not copy.with_name("copy.quarantine").exists()


def test_repair_makes_no_strays_again_and_says_nothing_of_it(copy: Path) -> None:
    (copy / "train" / "shard-000777.tar").write_bytes(b"x")
    (copy / "more").mkdir()
    (copy / "more" / "table.parquet").write_bytes(b"x")
    result = run_module("pipeline.validate", copy, "--repair")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count("moved to") == 2
    assert "made again" not in result.stderr


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", ".parquet", ".tar.idx"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_hides_no_other_damage(
    copy: Path, kind: str, suffix: str
) -> None:
    shard = first_shard(copy)
    path = copy / shard.sidecar(suffix)
    path.unlink()
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: path.symlink_to(path.name))()
    (copy / "README.md").write_bytes(b"damaged")
    result = run_module("pipeline.validate", copy, "--workers=1")
    assert result.returncode == 1
    assert f"{shard.sidecar(suffix)}: the file is missing" in result.stdout
    assert "README.md" in result.stdout
    assert not result.stderr


def test_repair_has_lost_shards_made_again_from_the_corpus(
    corpus: Path, copy: Path, tmp_path: Path
) -> None:
    shard = first_shard(copy)
    sound = {file: (copy / file).read_bytes() for file in shard.files.values()}
    for place in (3000, 4000):
        flip(copy / shard.name, place)
    (copy / shard.sidecar(".parquet")).unlink()
    result = run_module("pipeline.validate", copy, "--repair", "--json")
    value = json.loads(result.stdout)
    assert result.returncode == 0, value
    assert value["sound"]
    assert value["repaired"]
    assert {file: (copy / file).read_bytes() for file in sound} == sound


def test_repair_trains_a_lost_tokenizer_again(corpus: Path, copy: Path) -> None:
    sound = files(copy)
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / first_shard(copy).name).unlink()
    result = run_module("pipeline.validate", copy, "--repair", "--deep")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 files made again from the corpus" in result.stderr
    assert files(copy) == sound


@pytest.fixture(scope="module")
def indexed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset made by `pipeline.index` of tars with other headers and no tokens."""
    root = tmp_path_factory.mktemp("indexed") / "given"
    root.mkdir()
    for number, path in enumerate(sorted(dataset.glob("train/*.tar"))):
        with (
            tarfile.open(path) as tar,
            tarfile.open(root / f"{number}.tar", "w", format=tarfile.PAX_FORMAT) as to,
        ):
            for member in tar:
                if not member.name.endswith(".npy"):
                    member.mtime = 12.5
                    to.addfile(member, tar.extractfile(member))
    result = run_module("pipeline.index", root, "--tokenizer=train:64", "--workers=1")
    assert result.returncode == 0, result.stderr
    return root


def test_tars_of_other_makers_are_checked(indexed: Path, tmp_path: Path) -> None:
    root = copied(indexed, tmp_path / "copy")
    assert damages(root, deep=True) == []
    shard = first_shard(root)
    record = load_index(root, shard)[1]
    ids = shard.ids
    assert ids is not None
    for name, place in (
        (shard.name, int(record["jpg_offset"]) + 3),
        (shard.name, int(record["span_offset"]) + 3),
        (ids, int(record["ids_offset"])),
        (shard.index, 300),
        (shard.sidecar(".tar.idx"), 9),
    ):
        flip(root / name, place)
        assert name in {damage.path for damage in damages(root)}, (name, place)
        flip(root / name, place)


def index_birds(root: Path) -> None:
    index(
        IndexConfig(dataset=str(root), tokenizer="train:200", name="birds", workers=1)
    )


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """An indexed folder in which its owner has a tar without samples, one that index
    leaves out, tables, and a tar that came later.
    """
    root = tmp_path / "owned"
    img2dataset_shard(root / "train", 0, range(3))
    write_tar(root / "validation" / "a.tar", {"notes.txt": b"no image"})
    write_tar(root / "raw" / "deep" / "b.tar", img2dataset_files(range(2)))
    index_birds(root)
    for name in ("urls.parquet", "train/more.parquet"):
        shutil.copy(root / ".palimpsest/set-aside/train/00000.parquet", root / name)
    write_tar(root / "train" / "later.tar", img2dataset_files(range(5, 7)))
    return root


def files_below(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_what_an_index_did_not_take_in_is_no_damage_and_stays(owned: Path) -> None:
    before = files_below(owned)
    assert "raw/deep/b.tar" in before
    assert damages(owned, deep=True) == []
    assert validate([str(owned), "--repair", "--workers=1"]) == 0
    assert files_below(owned) == before
    assert not owned.with_name("owned.quarantine").exists()


def test_retokenized_tars_that_no_index_took_in_are_no_damage(owned: Path) -> None:
    new = owned.with_name("new")
    words = [str(owned), f"--tokenizer={owned}/tokenizer", f"--output={new}"]
    assert retokenize([*words, "--workers=1"]) == 0
    before = files_below(new)
    assert "raw/deep/b.tar" in before
    assert validate([str(new), "--repair", "--workers=1"]) == 0
    assert files_below(new) == before


def test_an_indexed_tar_without_samples_is_known(owned: Path) -> None:
    tar = owned / "validation" / "a.tar"
    assert load_manifest(owned).files["validation/a.tar"] == file_sha256(tar)
    sound = tar.read_bytes()
    flip(tar, 3)
    assert [damage.path for damage in damages(owned)] == ["validation/a.tar"]
    assert validate([str(owned), "--repair", "--workers=1"]) == 0
    assert tar.read_bytes() == sound


def test_a_table_that_an_index_wrote_for_a_tar_that_is_gone_is_put_aside(
    owned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index_birds(owned)
    (owned / "train" / "later.tar").unlink()
    index_birds(owned)
    (found,) = damages(owned)
    assert (found.path, found.message) == ("train/later.parquet", "not in the manifest")
    assert validate([str(owned), "--repair", "--workers=1"]) == 0
    assert "not made again" not in capsys.readouterr().err
    aside = owned.with_name("owned.quarantine")
    assert list(files_below(aside)) == ["train/later.parquet"]


def test_repair_moves_nothing_without_a_digest_out_of_an_indexed_folder(
    owned: Path,
) -> None:
    before = files_below(owned)
    done = repair(
        open_storage(str(owned)),
        lambda: [
            Damage(path=name, offset=None, message="not in the manifest")
            for name in ("urls.parquet", "train/later.tar", "*.parquet")
        ],
        config=None,
        say=lambda line: None,
    )
    assert len(done) == 2
    assert files_below(owned) == before


@pytest.mark.parametrize("name", ["index.json", "*.tar.json", "files.json"])
def test_damage_of_the_state_of_an_index_is_found_and_mended(
    name: str, indexed: Path, tmp_path: Path
) -> None:
    copy = copied(indexed, tmp_path / "copy")
    assert damages(copy, deep=True) == []
    path = sorted((copy / ".palimpsest").rglob(name))[0]
    sound = path.read_bytes()
    flip(path, len(sound) // 2, bit=1)
    (found,) = damages(copy, deep=True)
    assert name == "files.json" or copy / found.path == path
    if name != "files.json":
        assert validate([str(copy), "--deep", "--repair", "--workers=1"]) == 0
        assert path.read_bytes() == sound
    path.unlink()
    assert damages(copy, deep=True)


def test_a_dataset_on_an_object_store_is_checked(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as server:
        check_remote(copy, f"{server.bucket(monkeypatch)}/birds")


def check_remote(copy: Path, url: str) -> None:
    storage = open_storage(url)
    shard = first_shard(copy)
    place = int(load_index(copy, shard)[0]["jpg_offset"])
    flip(copy / shard.name, place)
    for path in copy.rglob("*"):
        if path.is_file():
            storage.write(path.relative_to(copy).as_posix(), path.read_bytes())
    (found,) = audit(storage, deep=True)
    assert (found.path, found.offset) == (shard.name, place)
    view = read_view(storage, rows=1_000, samples=3)
    assert len(view.pairs) == 3
