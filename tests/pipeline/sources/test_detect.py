"""Formats are told by content, and what cannot be read names its cure."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.options import InputOptions
from pipeline.sources import open_source
from tests.pipeline.corpora import encoded, picture
from tests.pipeline.sources.reading import column, opened, rows, write_tar


def write(path: Path, kind: str) -> Path:
    """A corpus of one format whatever its name says."""
    table = pa.table({"image": ["a.jpg"], "caption": ["x, y"]})
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file:
            writer = pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            writer.close()
    elif kind == "webdataset":
        write_tar(path, [("a.jpg", b"J"), ("a.txt", b"x")])
    else:
        texts = {
            "tsv": "image\tcaption\na.jpg\tx, y\n",
            "csv": 'image,caption\na.jpg,"x, y"\n',
            "jsonl": '{"image": "a.jpg"}\n{"image": "b.jpg"}\n',
            "coco": json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.jpg"}],
                    "annotations": [{"image_id": 1, "caption": "x"}],
                },
                indent=1 if path.suffix == ".pretty" else None,
            ),
        }
        path.write_text(texts[kind])
    return path


KINDS = ("parquet", "arrow", "webdataset", "tsv", "csv", "jsonl", "coco")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".data", ".txt", "", ".pretty"])
def test_the_content_tells_the_format(tmp_path: Path, kind: str, suffix: str) -> None:
    given = InputOptions(path=str(write(tmp_path / f"corpus{suffix}", kind)))
    assert open_source(given).kind == kind


def test_a_format_that_is_given_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "one_column"
    path.write_text("caption\none, two\n")
    assert column(opened(path, format="tsv"), "caption") == ["one, two"]
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        opened(path, format="parquet")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(b"image\tcaption\n", mtime=0), "gunzip"),
        (b"\x28\xb5\x2f\xfd\0\0", "unzstd"),
        (b"PK\x03\x04\0\0", "unpack it and give the folder"),
        ("image\tcaption\n".encode("utf-16"), "iconv -f UTF-16"),
        (encoded(picture(1)), "give the folder that it lies in"),
        (pickle.dumps([1]) + bytes(600), "none of the formats"),
        (b"image\na.jpg\n", "give --format"),
    ],
)
def test_what_cannot_be_read_names_its_cure(
    tmp_path: Path, data: bytes, says: str
) -> None:
    (tmp_path / "corpus").write_bytes(data)
    with pytest.raises(ValueError, match=r"--input .*corpus cannot be read: ") as error:
        opened(tmp_path / "corpus")
    assert says in str(error.value)


def test_a_json_array_names_its_cure(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"image": "a"}]')
    with pytest.raises(ValueError, match="jq -c"):
        opened(tmp_path / "t.json")


@pytest.mark.parametrize(
    "row", ['{"image": "a", "score": NaN}', '{"image": "\\ud800"}']
)
def test_what_python_writes_as_json_is_a_line_of_json(tmp_path: Path, row: str) -> None:
    (tmp_path / "t.json").write_text(f"{row}\n{row}\n")
    source = opened(tmp_path / "t.json")
    assert source.kind == "jsonl"
    assert len(column(source, "image")) == 2


def test_nothing_there_is_said_so(tmp_path: Path) -> None:
    for path in (tmp_path / "no.tsv", tmp_path / "*.tsv"):
        with pytest.raises(ValueError, match="does not exist"):
            opened(path)
    with pytest.raises(ValueError, match="it is a folder without files"):
        opened(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(ValueError, match="it is no regular file"):
        opened(tmp_path / "a.tsv")
    write(tmp_path / "b.tsv", "tsv")
    assert opened(tmp_path).base == opened(tmp_path / "*.tsv").base == str(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "coco"])
def test_what_a_link_in_a_folder_leads_to_is_no_part_of_it(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "in" / "sub").mkdir(parents=True)
    ending = {"webdataset": "tar"}.get(kind, kind)
    secret = write(tmp_path / "private" / f"x.{ending}", kind)
    write(tmp_path / "in" / f"a.{ending}", kind)
    link = tmp_path / "in" / "sub" / f"b.{ending}"
    link.symlink_to(secret)
    (tmp_path / "in" / "other").symlink_to(secret.parent)
    for path in ("in", f"in/*/b.{ending}", f"in/o*/*.{ending}", "in/**"):
        with pytest.raises(ValueError, match=r"is a link that leads out of .*a copy"):
            opened(tmp_path / path)
    # What the user names himself may be a link, and so may what stays inside.
    assert opened(link).kind == kind
    link.unlink()
    link.symlink_to(tmp_path / "in" / f"a.{ending}")
    assert len(opened(tmp_path / "in").fingerprint()) == 2
    (tmp_path / "here").symlink_to(tmp_path / "in")
    assert len(opened(tmp_path / "here").fingerprint()) == 2


@pytest.mark.parametrize(
    ("kinds", "images", "expected"),
    [
        (("tsv",), True, "tsv"),
        (("parquet",), True, "parquet"),
        (("jsonl",), False, "jsonl"),
        ((), True, "folder"),
    ],
)
def test_the_corpus_in_a_folder_of_several_things(
    tmp_path: Path, kinds: tuple[str, ...], images: bool, expected: str
) -> None:
    for kind in kinds:
        write(tmp_path / f"corpus.{kind}", kind)
    if images:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.jpg").write_bytes(encoded(picture(1)))
    assert open_source(InputOptions(path=str(tmp_path))).kind == expected


def test_a_folder_that_could_be_several_corpora_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", "tsv")
    write(tmp_path / "b.csv", "csv")
    with pytest.raises(ValueError, match="--format tsv or csv"):
        opened(tmp_path)
    assert opened(tmp_path, format="csv").kind == "csv"
    assert opened(tmp_path / "b*").kind == "csv"
    write(tmp_path / "c.tar", "webdataset")
    write(tmp_path / "d.parquet", "parquet")
    with pytest.raises(
        ValueError, match="--format webdataset or parquet or tsv or csv"
    ):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"it is a folder without \*\.jsonl or"):
        opened(tmp_path, format="jsonl")


@pytest.mark.parametrize("binary", ["webdataset", "parquet", "arrow"])
def test_no_table_is_left_out_unsaid(tmp_path: Path, binary: str) -> None:
    ending = {"webdataset": "tar"}.get(binary, binary)
    write(tmp_path / f"a.{ending}", binary)
    write(tmp_path / "b.tsv", "tsv")
    with pytest.raises(ValueError, match=f"--format {binary} or tsv"):
        opened(tmp_path)
    assert opened(tmp_path, format="tsv").kind == "tsv"


def test_files_of_img2dataset_are_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000000000.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "00000" / "000000000.txt").write_text("a bird")
    (tmp_path / "00000" / "000000000.json").write_text('{"similarity": NaN}')
    (tmp_path / "00000_stats.json").write_text("{}")
    write(tmp_path / "00000.parquet", "parquet")
    source = opened(tmp_path, spool=tmp_path / "spool")
    assert source.kind == "folder"
    assert column(source, "similarity") == [None]
    assert column(source, "captions") == [["a bird"]]
    assert opened(tmp_path, format="parquet").kind == "parquet"
    write(tmp_path / "urls.tsv", "tsv")
    with pytest.raises(ValueError, match="--format folder or tsv"):
        opened(tmp_path)


def test_tables_beside_the_tars_that_they_tell_of_are_no_corpus(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        write(tmp_path / f"{name}.tar", "webdataset")
        (tmp_path / f"{name}_stats.json").write_text("{}")
    write(tmp_path / "00000.parquet", "parquet")
    assert opened(tmp_path).kind == "webdataset"
    write(tmp_path / "more.jsonl", "jsonl")
    with pytest.raises(ValueError, match="--format webdataset or jsonl"):
        opened(tmp_path)
    assert opened(tmp_path, format="webdataset").kind == "webdataset"


def test_what_spark_leaves_beside_its_parts_is_no_part(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / f"part-{part:05d}.snappy.parquet", "parquet")
        (tmp_path / f".part-{part:05d}.snappy.parquet.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_metadata", "_common_metadata"):
        (tmp_path / name).touch()
    assert opened(tmp_path).kind == "parquet"


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_a_null_character_in_a_cell_does_not_hide_a_table(
    tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path / f"a.{kind}", kind)
    path.write_bytes(path.read_bytes().replace(b"x, y", b"x\0, y"))
    assert b"\0" in path.read_bytes()
    assert opened(path).kind == kind
    path.write_bytes("image\tcaption\n".encode("utf-16-le") * 9)
    with pytest.raises(ValueError, match="none of the formats"):
        opened(path)


def test_paths_are_relative_to_the_folder_that_all_tables_share(tmp_path: Path) -> None:
    for name in ("x/a", "x/b"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "t.parquet", "parquet")
    source = opened(tmp_path)
    assert source.base == str(tmp_path / "x")
    names = [entry["file"] for entry in source.fingerprint()]
    assert names == ["a/t.parquet", "b/t.parquet"]
    assert opened(tmp_path / "x/a/t.parquet").base == str(tmp_path / "x/a")
    assert opened(tmp_path, images=str(tmp_path)).base == str(tmp_path)
    assert opened(tmp_path, images="s3://bucket/images/").base == "s3://bucket/images"
    url = f"file://{tmp_path}/x/a/t.parquet"
    assert rows(opened(url)) == [{"image": "a.jpg", "caption": "x, y"}]
