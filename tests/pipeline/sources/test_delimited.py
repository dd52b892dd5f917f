"""TSV and CSV: every line is a row, wherever reading starts, and no row stops a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import Source
from pipeline.sources import rows as row_places
from tests.pipeline.corpora import write_table
from tests.pipeline.sources.reading import (
    BAD,
    check_every_range,
    column,
    cursors,
    opened,
    rows,
    scanned,
)


def table(path: Path, data: bytes) -> Source:
    path.write_bytes(data)
    return opened(path)


def test_a_tsv_takes_quotes_as_they_are_and_a_csv_reads_them(tmp_path: Path) -> None:
    source = table(
        tmp_path / "t.tsv", b'image\tcaption\na.jpg\t"a bird\nb.jpg\tit\'s "red"\n'
    )
    assert column(source, "caption") == ['"a bird', 'it\'s "red"']
    texts = ['a "red" bird', "one, two", "line\nbreak", "007", ""]
    given = [{"image": "a.jpg", "caption": text} for text in texts]
    source = opened(write_table(tmp_path / "t.csv", given))
    assert column(source, "caption") == texts
    check_every_range(source)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_marks_and_blank_lines_are_no_content(
    tmp_path: Path, mark: bytes, end: bytes, last: bool
) -> None:
    lines = [b'"image","caption"', b"a.jpg,one", b"", b"b.jpg,two", b"c.jpg,three"]
    data = mark + end.join(lines) + (end if last else b"")
    source = table(tmp_path / "t.csv", data)
    assert source.schema.names == ["image", "caption"]
    assert column(source, "image") == ["a.jpg", "b.jpg", "c.jpg"]
    assert column(source, "caption") == ["one", "two", "three"]
    check_every_range(source)


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_row_that_cannot_be_parsed_is_a_row(tmp_path: Path, separator: str) -> None:
    lines = [b"image\tcaption", b"a.jpg\tone", b"b.jpg", b"c.jpg\ttwo\tthree"]
    lines += [b"\xff.jpg\tfour", b"d.jpg\t\xff", b"e.jpg\tfive"]
    data = b"\n".join(lines).replace(b"\t", separator.encode())
    name = "t.tsv" if separator == "\t" else "t.csv"
    source = table(tmp_path / name, data)
    assert [tuple(row.values()) for row in rows(source)] == [
        ("a.jpg", "one"),
        (BAD, BAD),
        (BAD, BAD),
        (BAD, "four"),
        ("d.jpg", BAD),
        ("e.jpg", "five"),
    ]
    # Without a key they group with no other row.
    assert scanned(source, "image") == ["a.jpg", None, None, None, "d.jpg", "e.jpg"]
    check_every_range(source)


def test_only_bad_rows_are_counted_too(tmp_path: Path) -> None:
    source = table(tmp_path / "t.tsv", b"image\tcaption\n" + b"x\n" * 5)
    assert rows(source) == [{"image": BAD, "caption": BAD}] * 5


def test_a_carriage_return_inside_a_field_is_no_line_end(tmp_path: Path) -> None:
    source = table(tmp_path / "t.tsv", b"image\tcaption\na\tone\rtwo\nb\tthree\r\n")
    assert column(source, "caption") == ["one\rtwo", "three"]
    check_every_range(source)


def test_a_quote_inside_a_field_is_a_character(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", b'image,size\na,5" nail\nb,"6"" nail"\n')
    assert column(source, "size") == ['5" nail', '6" nail']
    check_every_range(source)


def test_a_quote_that_is_never_closed_costs_its_line_alone(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", b'image,size\na,1\nb,"2\nc,3\nd,4\n')
    assert column(source, "image") == ["a", BAD, "c", "d"]
    check_every_range(source)


def test_a_row_that_is_too_long_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_places, "MAX_ROW", 1000)
    monkeypatch.setattr(row_places, "_BLOCK", 64)
    for name, long in (("t.tsv", b"x" * 3000), ("t.csv", b'"' + b"\ny" * 1000 + b'"')):
        separator = b"," if name == "t.csv" else b"\t"
        data = b"image,n\na,1\nLONG,2\nb,3\n".replace(b",", separator)
        source = table(tmp_path / name, data.replace(b"LONG", long))
        images = column(source, "image")
        assert (images[:2], images[-1]) == (["a", BAD], "b")
        places = cursors(source)
        assert rows(source, ["image"], places[1], places[2]) == [{"image": BAD}]
        assert rows(source, ["image"], places[-1]) == [{"image": "b"}]


def test_rows_longer_than_a_block_are_whole(tmp_path: Path) -> None:
    long = "long " * (1 << 20)
    source = table(tmp_path / "t.tsv", f"image\ttext\na\t{long}\nb\tx\n".encode())
    assert column(source, "text") == [long, "x"]


def test_blocks_are_cut_between_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f'{number} "quoted"\n{"x" * (number % 97)}, end' for number in range(900)]
    given = [{"image": f"{n}.jpg", "caption": text} for n, text in enumerate(texts)]
    source = opened(write_table(tmp_path / "t.csv", given))
    whole = cursors(source)
    monkeypatch.setattr(row_places, "_BLOCK", 128)
    assert cursors(source, ["caption"]) == whole
    assert scanned(source, "caption") == texts == column(source, "caption")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.text('ab",\n\r é', max_size=6), min_size=2, max_size=2)))
def test_what_python_writes_as_csv_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerows([["image", "caption"], *cells])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(file.getvalue().encode())
    if not cells:
        with pytest.raises(ValueError, match="has no rows"):
            opened(path)
        return
    assert [list(row.values()) for row in rows(opened(path))] == cells


@settings(max_examples=150, deadline=None)
@given(st.text('a",\n\r', min_size=1, max_size=40), st.integers(1, 9))
def test_any_text_has_the_same_rows_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(b"image,caption\nx,y\n" + text.encode())
    source = opened(path)
    whole, places = rows(source), cursors(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_places, "_BLOCK", block)
        assert (rows(source), cursors(source)) == (whole, places)
    check_every_range(source)


def test_several_tables_are_one_corpus(tmp_path: Path) -> None:
    for name, ids in (("b", "345"), ("a", "12"), ("c", "6")):
        lines = [f"{number}.jpg\tx" for number in ids]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["image\tcaption", *lines]))
    expected = [f"{number}.jpg" for number in range(1, 7)]
    for path in (tmp_path, tmp_path / "*.tsv"):
        source = opened(path)
        assert column(source, "image") == expected
        assert [entry["file"] for entry in source.fingerprint()] == [
            *("a.tsv", "b.tsv", "c.tsv")
        ]
        check_every_range(source)
    (tmp_path / "d.tsv").write_text("image\tother\nx\ty\n")
    with pytest.raises(ValueError, match=r"d\.tsv has other columns \(image, other\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot be read: it has no header line with column names"),
        (b"\n\n", "cannot be read: it has no header line with column names"),
        (b"image,caption", "has no rows: the corpus is empty"),
        (b"image,caption\n\n\r\n", "has no rows: the corpus is empty"),
        (b"image,\xff\na,b\n", "iconv -f LATIN1"),
        (b"image,caption\ra,b\rc,d\r", "end with CR alone"),
        (b'image,"caption\na,b\n', "a quote in the header"),
    ],
)
def test_a_table_without_a_usable_header_is_refused(
    tmp_path: Path, data: bytes, says: str
) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"--input .*t\.csv ") as caught:
        opened(tmp_path / "t.csv")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = table(tmp_path / "t.tsv", b"image\tcaption\n" + b"a\tb\n" * 100)
    (tmp_path / "t.tsv").write_bytes(b"image\tcaption\na\tb\n")
    with pytest.raises(OSError, match="it was changed while it was read"):
        rows(source)
