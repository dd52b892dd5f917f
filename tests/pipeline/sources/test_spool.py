"""What must be sorted first: COCO captions, image folders, scattered rows."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.options import InputOptions
from pipeline.sources import NeedsSpool, open_source
from pipeline.storage import open_storage
from tests.pipeline.sources.reading import (
    BAD,
    check_every_range,
    column,
    opened,
    rows,
    scanned,
)


def coco(path: Path, **changes: Any) -> Path:
    document = {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 5, "height": 6, "license": 3},
            {"id": 3, "file_name": "b.jpg"},
            {"id": 9, "file_name": "silent.jpg"},
            "nonsense",
        ],
        "annotations": [
            {"image_id": 3, "caption": "b one"},
            {"image_id": 7, "caption": "a one"},
            {"image_id": 3, "caption": "b two"},
            {"image_id": 99, "caption": "of nothing"},
            {"image_id": 7, "caption": "a two"},
        ],
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_captions_of_coco_stand_with_their_images(tmp_path: Path) -> None:
    path = coco(tmp_path / "captions.json")
    source = opened(path, spool=tmp_path / "out", images=str(tmp_path / "val2017"))
    assert (source.kind, source.base) == ("coco", str(tmp_path / "val2017"))
    found = rows(source, ["id", "file_name", "caption", "width", "license"])
    assert [tuple(row.values()) for row in found] == [
        ("7", "a.jpg", "a one", 5, "3"),
        ("7", "a.jpg", "a two", 5, "3"),
        ("3", "b.jpg", "b one", None, None),
        ("3", "b.jpg", "b two", None, None),
        ("9", "silent.jpg", None, None, None),
        (None, None, None, None, None),
        ("99", None, "of nothing", None, None),
    ]
    check_every_range(source)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"annotations": [{"image_id": 7, "bbox": []}]}, "captions_train2017.json"),
        ({"annotations": []}, "it has no annotations"),
        ({"images": {}}, "it has no images"),
    ],
)
def test_a_document_without_captions_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    path = coco(tmp_path / "c.json", **changes)
    with pytest.raises(ValueError, match=says):
        opened(path, format="coco")


def test_a_document_that_was_cut_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = coco(tmp_path / "c.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"c\.json is no whole JSON document"):
        opened(path, spool=tmp_path / "out")
    assert open_storage(tmp_path / "out").names() == []


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_images_of_a_folder_go_with_the_files_of_their_name(tmp_path: Path) -> None:
    files = {
        "b.jpg": b"B",
        "b.txt": b"\xef\xbb\xbfone\r\n\n  two \n",
        "a.PNG": b"A",
        "a.json": b'{"caption": "from json", "tags": ["x"], "width": 5}',
        "sub/a.webp": b"C",
        "sub/a.txt": b"\xff",
        "sub/a.json": b"{torn",
        ".hidden.jpg": b"H",
        "lonely.txt": b"of nothing",
    }
    source = opened(folder(tmp_path / "in", files), spool=tmp_path / "out")
    assert (source.kind, source.base) == ("folder", str(tmp_path / "in"))
    assert rows(source) == [
        {
            **{"image": "a.PNG", "txt": None, "source_caption": "from json"},
            **{"tags": ["x"], "source_width": 5, "captions": ["from json"]},
        },
        {
            **{"image": "b.jpg", "txt": ["one", "two"], "source_caption": None},
            **{"tags": None, "source_width": None, "captions": ["one", "two"]},
        },
        {
            **{"image": "sub/a.webp", "txt": BAD, "source_caption": BAD},
            **{"tags": BAD, "source_width": BAD, "captions": BAD},
        },
    ]
    assert source.default_columns == {"image": "image", "caption": "captions"}
    check_every_range(source)


def test_files_that_belong_to_no_image_say_nothing_about_images(tmp_path: Path) -> None:
    files = {"a.jpg": b"A", "a.json": b'{"caption": "a dog"}'}
    files |= {"LICENSE.txt": b"MIT", "dataset.json": b'{"caption": 5, "rows": 9}'}
    source = opened(folder(tmp_path / "in", files), spool=tmp_path / "out")
    assert source.schema.names == ["image", "captions", "source_caption"]
    assert column(source, "captions") == [["a dog"]]
    assert column(source, "source_caption") == ["a dog"]


def test_a_folder_is_not_left_through_links(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.jpg").write_bytes(b"S")
    (tmp_path / "secret" / "s.txt").write_text("secret")
    path = folder(tmp_path / "in", {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"C"})
    (path / "linked").symlink_to(tmp_path / "secret")
    (path / "a.txt").symlink_to(tmp_path / "secret" / "s.txt")
    os.mkfifo(path / "b.txt")
    (path / "c.txt").symlink_to("here")
    (path / "here").write_text("inside")
    source = opened(path, spool=tmp_path / "out")
    assert column(source, "image") == ["a.jpg", "b.jpg", "c.jpg"]
    assert column(source, "txt") == [BAD, BAD, ["inside"]]


def test_the_order_and_fingerprint_of_a_folder_are_those_of_its_names(
    tmp_path: Path,
) -> None:
    names = [f"{n % 7}/{n}.jpg" for n in range(100)]
    found = []
    for run in range(2):
        random.Random(run).shuffle(names)
        path = folder(tmp_path / str(run), dict.fromkeys(names, b"x"))
        source = opened(path, spool=tmp_path / f"out{run}")
        found.append((column(source, "image"), source.fingerprint()))
    assert found[0] == found[1]
    assert found[0][0] == sorted(names)
    (tmp_path / "0" / names[0]).write_bytes(b"longer")
    assert opened(tmp_path / "0", spool=tmp_path / "o").fingerprint() != found[0][1]


def test_scattered_rows_of_one_image_are_brought_together(tmp_path: Path) -> None:
    lines = [b"image\tcaption", b"b\t1", b"a\t2", b"\t3", b"b\t4", b"\t5"]
    lines += [b"torn", b"a\t\xff", b"b\t6"]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(lines))
    source = opened(tmp_path / "t.tsv", spool=tmp_path / "out", group_by="image")
    assert [tuple(row.values()) for row in rows(source)] == [
        *(("b", "1"), ("b", "4"), ("b", "6"), ("a", "2"), ("a", BAD)),
        *(("", "3"), ("", "5"), (BAD, BAD)),
    ]
    assert scanned(source, "image")[-1] is None
    assert source.fingerprint() == opened(tmp_path / "t.tsv").fingerprint()
    check_every_range(source)


def test_groups_are_those_of_a_dictionary_whatever_the_types(tmp_path: Path) -> None:
    generator = random.Random(0)
    keys = [generator.randrange(400) for _ in range(5000)]
    images = [{"bytes": os.urandom(30), "path": None} for _ in keys]
    table = pa.table({"id": keys, "image": images, "n": range(len(keys))})
    pq.write_table(table, tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet", spool=tmp_path / "out", group_by="id")
    groups: dict[int, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    expected = [number for group in groups.values() for number in group]
    assert column(source, "n") == expected
    assert column(source, "image") == [images[number] for number in expected]


def test_columns_whose_names_differ_in_case_alone_stay_apart(tmp_path: Path) -> None:
    table = pa.table(
        {"url": ["b", "a", "b"], "URL": [1, 2, 3], 'x "y"': ["p", "q", "r"]}
    ).append_column("nothing", pa.nulls(3))
    pq.write_table(table, tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet", spool=tmp_path / "out", group_by="url")
    assert [tuple(row.values()) for row in rows(source)] == [
        *(("b", 1, "p", None), ("b", 3, "r", None), ("a", 2, "q", None))
    ]


def test_a_folder_can_be_grouped_by_what_its_json_says(tmp_path: Path) -> None:
    files = {f"{n}.jpg": b"J" for n in range(6)}
    files |= {f"{n}.json": b'{"product": "%d"}' % (n % 2) for n in range(6)}
    path = folder(tmp_path / "in", files)
    source = opened(path, spool=tmp_path / "out", group_by="product")
    assert column(source, "image") == [f"{n}.jpg" for n in (0, 2, 4, 1, 3, 5)]
    names = open_storage(tmp_path / "out").names()
    assert [name.rpartition("/")[2] for name in names] == ["rows.parquet", "spool.json"]


def test_an_unknown_group_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("image\tcaption\na\tb\n")
    with pytest.raises(ValueError, match="--group: no column 'id'"):
        opened(tmp_path / "t.tsv", group_by="id")


def test_a_finished_spool_is_used_again_and_a_stale_one_is_not(tmp_path: Path) -> None:
    path = folder(tmp_path / "in", {"a.jpg": b"A"})
    storage = open_storage(tmp_path / "out")

    def spool() -> tuple[list[str], int]:
        source = open_source(InputOptions(path=str(path)))
        assert isinstance(source, NeedsSpool)
        images = column(source.spooled(storage, "corpus"), "image")
        (made,) = (name for name in storage.names() if name.endswith(".parquet"))
        return images, (tmp_path / "out" / made).stat().st_ino

    first = spool()
    assert spool() == first
    (path / "b.jpg").write_bytes(b"B")
    assert spool()[0] == ["a.jpg", "b.jpg"]
    # Without its marker a spool is not finished, whatever lies there.
    (marker,) = (name for name in storage.names() if name.endswith(".json"))
    storage.remove(marker)
    (tmp_path / "out" / marker).with_name("rows.parquet").write_bytes(b"torn")
    assert spool()[0] == ["a.jpg", "b.jpg"]
