"""Tables of every supported form give the same rows, whole or in parts."""

from __future__ import annotations

import io
import os
import resource
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import holds_paths, resolve_columns
from pipeline.images import ImageError
from pipeline.options import ColumnOptions, SplitOptions
from pipeline.sources import open_source, read_image
from tests.pipeline.corpora import encoded, picture, write_table


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (7, 9), (30, 31), (19, 83)])
def test_a_part_of_a_parquet_folder_is_its_rows(
    tmp_path: Path, start: int, stop: int
) -> None:
    for number, (first, last) in enumerate([(0, 30), (30, 31), (31, 100)]):
        table = pa.table(
            {"image": [b"x"] * (last - first), "text": list(range(first, last))}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=20)
    source = open_source(str(tmp_path))
    assert source.n_rows == 100
    rows = source.part(start, stop).rows(["text"])
    assert [row["text"] for row in rows] == list(range(start, stop))
    assert source.column("text").to_pylist() == list(range(100))


def test_batches_inside_a_large_row_group_are_cut_right(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(1000))}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    for start, stop in [(0, 64), (63, 65), (100, 700), (999, 1000)]:
        rows = [row["n"] for row in source.part(start, stop).rows(["n"])]
        assert rows == list(range(start, stop))


def test_a_tsv_takes_quotes_as_they_are_and_a_csv_reads_them(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(
        'image\tcaption\na.jpg\t"a bird\nb.jpg\tit\'s "red"\n'
    )
    source = open_source(str(tmp_path / "t.tsv"))
    assert source.column("caption").to_pylist() == ['"a bird', 'it\'s "red"']
    texts = ['a "red" bird', "one, two", "line\nbreak", "007"]
    rows = [{"image": "a.jpg", "caption": text} for text in texts]
    source = open_source(str(write_table(tmp_path / "t.csv", rows)))
    assert source.column("caption").to_pylist() == texts


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufeffimage,caption\na.jpg,ä\n".encode())
    source = open_source(str(tmp_path / "t.csv"))
    assert source.schema.names == ["image", "caption"]


def test_the_fingerprint_knows_the_corpus_but_not_where_it_lies(tmp_path: Path) -> None:
    prints = []
    for folder, caption in (("a", "bird"), ("b", "bird"), ("c", "kite")):
        (tmp_path / folder).mkdir()
        table = pa.table({"image": [b"x"], "caption": [caption]})
        pq.write_table(table, tmp_path / folder / "t.parquet")
        prints.append(open_source(str(tmp_path / folder / "t.parquet")).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_usual_column_names_are_found_whatever_their_case(tmp_path: Path) -> None:
    rows = [{"id": "1", "Filepath": "a.jpg", "TITLE": "a bird"}]
    source = open_source(str(write_table(tmp_path / "t.csv", rows)))
    columns = resolve_columns(source.schema, ColumnOptions(), SplitOptions())
    assert (columns.image, columns.captions) == ("Filepath", ("TITLE",))
    assert holds_paths(source.schema, columns)


def test_images_of_hugging_face_datasets_are_read(tmp_path: Path) -> None:
    data = encoded(picture(1))
    (tmp_path / "b.jpg").write_bytes(data)
    cells = [{"bytes": data, "path": None}, {"bytes": None, "path": "b.jpg"}]
    table = pa.table({"image": cells, "caption": [["one", "two"], ["three"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    columns = resolve_columns(source.schema, ColumnOptions(), SplitOptions())
    assert not holds_paths(source.schema, columns)
    rows = list(source.part(0, 2).rows(["image", "caption"]))
    assert [read_image(row["image"], source.folder) for row in rows] == [data, data]


def test_paths_stay_inside_the_corpus(tmp_path: Path) -> None:
    inside = tmp_path / "corpus"
    inside.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (inside / "a.jpg").write_bytes(b"fine")
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert read_image("a.jpg", inside) == b"fine"
    assert read_image(str(inside / "a.jpg"), inside) == b"fine"
    outside = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "/etc/hostname",
    ]
    reasons = []
    for cell in [*outside, "no.jpg", ".", "", None, "a\0b"]:
        with pytest.raises(ImageError) as caught:
            read_image(cell, inside)
        reasons.append(caught.value.reason)
    assert reasons[:4] == ["path_outside_input"] * 4
    assert reasons[4:] == [
        *["missing_file"] * 2,
        *["missing_image"] * 2,
        "missing_file",
    ]


def test_paths_that_cannot_be_are_missing_files(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    for cell in ("loop.jpg", "file/a.jpg", "a" * 300, "pipe.jpg"):
        with pytest.raises(ImageError, match="missing_file"):
            read_image(cell, tmp_path)


def test_a_storage_error_is_no_fault_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"fine")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No open file is left to be had: an error of the machine, as EIO would be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a\.jpg cannot be read \(Too many open"):
            read_image("a.jpg", tmp_path)
        timer = threading.Timer(
            0.2, resource.setrlimit, (resource.RLIMIT_NOFILE, limits)
        )
        timer.start()
        assert read_image("a.jpg", tmp_path) == b"fine"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_rows_are_read_without_other_columns(tmp_path: Path) -> None:
    table = pa.table({"image": [io.BytesIO(b"x").getvalue()], "caption": ["a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    (row,) = source.part(0, 1).rows(["caption"])
    assert dict(row) == {"caption": "a"}
