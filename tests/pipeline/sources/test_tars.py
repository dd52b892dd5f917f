"""WebDataset tars: samples are rows, metadata is kept, and damage is never silent."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.columns import resolve_columns
from pipeline.options import ColumnOptions, SplitOptions
from tests.pipeline.sources.reading import (
    BAD,
    check_every_range,
    column,
    cursors,
    opened,
    rows,
    scanned,
    write_tar,
)


def sample(key: str, **members: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.{name}", data) for name, data in members.items()]


def test_samples_of_all_tars_are_rows(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    keys = ["a", "b", "./dir/c"]
    for name in ("1", "0", "more/0"):
        members = [part for key in keys for part in sample(key, jpg=b"J", txt=b"T")]
        write_tar(tmp_path / f"{name}.tar", members)
    source = opened(tmp_path)
    assert (source.kind, source.base) == ("webdataset", str(tmp_path))
    expected = [
        f"{tar}/{key}" for tar in ("0", "1", "more/0") for key in ("a", "b", "dir/c")
    ]
    assert column(source, "__key__") == scanned(source, "__key__") == expected
    assert column(source, "image") == [b"J"] * 9
    check_every_range(source)


def test_metadata_of_img2dataset_is_kept_under_names_that_are_free(
    tmp_path: Path,
) -> None:
    metadata = {"url": "http://x/1.jpg", "caption": "a bird", "width": 30}
    metadata |= {"similarity": 0.3, "key": "000", "sha256": "ab", "error_message": None}
    members = sample("000", jpg=b"J", txt=b"a bird", json=json.dumps(metadata).encode())
    write_tar(tmp_path / "00000.tar", members)
    # Its table of successes and failures lies beside the tar.
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    source = opened(tmp_path)
    defaults = source.default_columns
    assert defaults["caption"] == "captions"
    assert defaults["url"] == "source_url"
    assert defaults["keep"] == (
        *("source_url", "source_caption", "source_width", "similarity"),
        *("source_key", "source_sha256", "error_message"),
    )
    (row,) = rows(source, [defaults["image"], defaults["id"], *defaults["keep"]])
    assert list(row.values()) == [
        *(b"J", "00000/000", "http://x/1.jpg", "a bird", 30, 0.3, "000", "ab", None)
    ]


def test_several_captions_in_the_json_go_before_the_text(tmp_path: Path) -> None:
    fields = b'{"captions": ["one", "two"], "caption": "one"}'
    write_tar(tmp_path / "t.tar", sample("0", jpg=b"J", txt=b"one", json=fields))
    source = opened(tmp_path)
    assert source.default_columns["caption"] == "captions"
    assert column(source, "captions") == column(source, "source_captions")
    assert column(source, "source_captions") == [["one", "two"]]


def test_every_sample_has_the_captions_of_its_own_text_or_json(tmp_path: Path) -> None:
    """A mixture: no kind of sample may lose its captions because of another kind."""
    several, empty = b'{"captions": ["a", "b"]}', b'{"captions": [], "caption": "no"}'
    members = [
        *sample("0", jpg=b"J", txt=b"text"),
        *sample("1", jpg=b"J", json=b'{"caption": "field"}'),
        *sample("2", jpg=b"J", json=several),
        *sample("3", jpg=b"J", json=several, txt=b"text"),
        *sample("4", jpg=b"J", json=empty, txt=b"text"),
        *sample("5", jpg=b"J", json=b'{"text": "last", "captions": 5}'),
        *sample("6", jpg=b"J", caption=b"cap", json=b'{"caption": "field"}'),
        *sample("7", jpg=b"J", txt=b"\xff", json=b'{"caption": "field"}'),
        *sample("8", jpg=b"J", json=b"{"),
        *sample("9", jpg=b"J"),
    ]
    expected = [
        *(["text"], ["field"], ["a", "b"], ["a", "b"], ["text"], ["last"], ["cap"]),
        *(BAD, BAD, None),
    ]
    write_tar(tmp_path / "t.tar", members)
    source = opened(tmp_path)
    assert source.default_columns["caption"] == "captions"
    assert column(source, "captions") == expected
    check_every_range(source)


def test_a_kind_of_captions_that_comes_late_is_found(tmp_path: Path) -> None:
    """Samples at the start decide types of fields, but not where captions stand."""
    fields = b'{"caption": "field"}'
    early = [part for n in range(80) for part in sample(f"{n:02}", jpg=b"J", txt=b"T")]
    late = [*early, *sample("99", jpg=b"J", json=fields)]
    write_tar(tmp_path / "t.tar", late)
    source = opened(tmp_path / "t.tar")
    assert column(source, source.default_columns["caption"])[-1] == ["field"]


def test_what_makes_no_image_is_a_row_without_one(tmp_path: Path) -> None:
    members = [
        *sample("good", jpg=b"J"),
        *sample("text", txt=b"alone"),
        *(("twice.jpg", b"1"), ("twice.jpg", b"2")),
        *sample("stranger", exe=b"MZ"),
        *(("x" * 2000 + ".jpg", b"J"),),
        *sample("torn", png=b"P", json=b"{", txt=b"\xff"),
        # None of these is a sample.
        *(("README", b"hello"), (".hidden", b"x"), ("dir/._a", b"x")),
        *sample("last", PNG=b"P", cls=b"7"),
    ]
    write_tar(tmp_path / "t.tar", members)
    source = opened(tmp_path)
    assert column(source, "image") == [b"J", None, None, None, None, b"P", b"P"]
    assert [key if key == BAD else key[2:] for key in column(source, "__key__")] == [
        *("good", "text", "twice", "stranger", BAD, "torn", "last")
    ]
    assert column(source, "txt") == [None, "alone", None, None, None, BAD, None]
    check_every_range(source)


def test_json_that_is_torn_is_bad_in_every_field(tmp_path: Path) -> None:
    good, torn = sample("0", jpg=b"J", json=b'{"a": 1}'), sample("1", json=b"[1]")
    write_tar(tmp_path / "t.tar", [*good, *torn])
    assert column(opened(tmp_path), "a") == [1, BAD]


def test_nan_in_the_json_of_img2dataset_is_an_empty_field(tmp_path: Path) -> None:
    texts = (b'{"caption": "a", "similarity": 0.3}', b'{"caption": "b", "similarity": ')
    endings = (b"", b"NaN}", b"-Infinity}", b"nan}", b"NaN")
    jsons = [texts[bool(ending)] + ending for ending in endings]
    members = [
        member
        for number, data in enumerate(jsons)
        for member in sample(str(number), jpg=b"J", json=data)
    ]
    write_tar(tmp_path / "t.tar", members)
    source = opened(tmp_path)
    assert column(source, "similarity") == [0.3, None, None, BAD, BAD]
    assert column(source, "captions") == [["a"], ["b"], ["b"], BAD, BAD]


def test_objects_in_the_json_are_no_captions(tmp_path: Path) -> None:
    fields = json.dumps({"captions": [{"raw": "a bird"}], "n": 1}).encode()
    write_tar(tmp_path / "t.tar", sample("0", jpg=b"J", json=fields))
    source = opened(tmp_path)
    for given, says in (
        (ColumnOptions(), "no caption column found"),
        (ColumnOptions(caption="source_captions"), "it holds JSON objects"),
    ):
        with pytest.raises(ValueError, match=says):
            resolve_columns(
                source.schema, given, SplitOptions(), source.default_columns
            )


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        for number in range(5):
            fields = {"n": number, "caption": f"bird {number}"}
            writer.write(
                {"__key__": f"s{number}", "jpg": b"J", "json": fields, "cls": number}
            )
    source = opened(tmp_path)
    assert source.default_columns["caption"] == "captions"
    assert rows(source, ["__key__", "n", "captions"]) == [
        {"__key__": f"t/s{n}", "n": n, "captions": [f"bird {n}"]} for n in range(5)
    ]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_pickles_and_arrays_are_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    names = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "pyd.jpg")
    write_tar(tmp_path / "t.tar", [("a.jpg", b"J"), *((f"a.{n}", bomb) for n in names)])
    source = opened(tmp_path)
    assert [name for name in source.schema.names if name != "__key__"] == ["image"]
    assert rows(source, ["image"]) == [{"image": b"J"}]
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_tars_of_all_makers_are_read(tmp_path: Path, kind: int) -> None:
    key = "d" * 90 + "/" + "é" * 40
    write_tar(tmp_path / "t.tar", sample(key, jpg=b"J", txt=b"T"), kind=kind)
    source = opened(tmp_path)
    expected = {"__key__": f"t/{key}", "image": b"J", "txt": "T", "captions": ["T"]}
    assert rows(source) == [expected]


def test_a_flipped_bit_of_a_header_never_hides_a_sample(tmp_path: Path) -> None:
    members = [part for key in "abc" for part in sample(key, jpg=b"J" * 700, txt=b"T")]
    data = write_tar(tmp_path / "t.tar", members).read_bytes()
    source = opened(tmp_path / "t.tar")
    whole = rows(source)
    header = cursors(source)[1]
    found = 0
    # Within 512 bytes every seventh bit: 586 damaged tars.
    for bit in range(0, 4096, 7):
        changed = bytearray(data)
        changed[header + bit // 8] ^= 1 << bit % 8
        (tmp_path / "t.tar").write_bytes(changed)
        try:
            # A blank that ends a number may be any blank.
            assert rows(source) == whole
        except ValueError as error:
            assert "t.tar is damaged or was cut short" in str(error)  # noqa: PT017
            found += 1
    assert found > 575


def test_a_tar_that_was_cut_short_is_refused_wherever_it_was_cut(
    tmp_path: Path,
) -> None:
    members = [part for key in "ab" for part in sample(key, jpg=b"J" * 700, txt=b"T")]
    data = write_tar(tmp_path / "t.tar", members).read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for size in (0, 100, 512, 1000, 2048, end // 2, end, end + 512):
        (tmp_path / "t.tar").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"t\.tar is damaged or was cut short"):
            cursors(opened(tmp_path / "t.tar"))
    (tmp_path / "t.tar").write_bytes(data[: end + 1024])
    assert len(cursors(opened(tmp_path / "t.tar"))) == 2


def test_a_tar_without_samples_is_an_empty_corpus(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [])
    with pytest.raises(ValueError, match="has no rows: the corpus is empty"):
        opened(tmp_path)


def test_the_fingerprint_of_a_large_tar_sees_its_ends_and_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.files._READ", 512)
    members = [("a.jpg", b"J"), ("b.jpg", bytes(200_000)), ("c.jpg", b"J")]
    write_tar(tmp_path / "t.tar", members)
    source = opened(tmp_path)
    (first,) = source.fingerprint()
    assert list(first) == ["file", "bytes", "sha256_of_pieces"]
    data = (tmp_path / "t.tar").read_bytes()
    for at in (5, len(data) - 5):
        changed = bytearray(data)
        changed[at] ^= 1
        (tmp_path / "t.tar").write_bytes(changed)
        assert source.fingerprint() != [first]
    (tmp_path / "t.tar").write_bytes(data + bytes(512))
    assert opened(tmp_path).fingerprint()[0]["bytes"] == first["bytes"] + 512
