"""Cells of every kind become bytes, in order, whatever the order they arrive in."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

import pipeline.fetch
from pipeline.addresses import Network, Place
from pipeline.fetch import Cell, FileReader, ImageReader
from pipeline.images import ImageError
from pipeline.lookahead import NoRoom, Room, Share
from pipeline.options import FetchOptions
from tests.pipeline.corpora import REPOSITORY
from tests.pipeline.web import Reply, WebServer

_LIMIT = 100_000


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


def reader(
    base: Path | str,
    *,
    image_list: str = "refuse",
    hashes: str | None = None,
    network: Network | None = None,
    **options: object,
) -> ImageReader:
    given = {"retries": 0, "allow_private": True, **options}
    return ImageReader(
        FetchOptions(**given),  # type: ignore[arg-type]
        base=str(base),
        max_bytes=_LIMIT,
        image_list=image_list,
        hashes=hashes,
        network=network,
    )


def read(base: Path | str, *values: object, **options: object) -> list[bytes | str]:
    """Bytes or reasons of cells with these values."""
    with reader(base, **options) as images:  # type: ignore[arg-type]
        found = list(images.read(Cell(value=value) for value in values))
    return [each.reason if isinstance(each, ImageError) else each for each in found]


def test_a_corpus_that_mixes_everything_keeps_its_order(
    tmp_path: Path, server: WebServer
) -> None:
    kinds = itertools.cycle(["bytes", "path", "web", "struct", "absent", "list"])
    values: list[object] = []
    expected: list[bytes | str] = []
    for number, kind in zip(range(120), kinds, strict=False):
        data = str(number).encode()
        (tmp_path / f"{number}.jpg").write_bytes(data)
        pause = 0.1 if number % 24 == 2 else 0.0
        url = server.serve(f"/{number}", Reply(body=data, pause_s=pause))
        value = {
            "bytes": data,
            "path": f"{number}.jpg",
            "web": url,
            "struct": {"bytes": None, "path": f"{number}.jpg"},
            "absent": server.url("/none"),
            "list": [url],
        }[kind]
        values.append(value)
        expected.append("http_404" if kind == "absent" else data)
    assert read(tmp_path, *values) == expected


def test_what_a_cell_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    image = {"bytes": b"b", "path": "a.jpg"}
    empty = {"bytes": None, "path": None}
    cells = (b"b", image, {"path": "a.jpg"}, ["a.jpg"], [image], "a.jpg")
    assert read(tmp_path, *cells) == [b"b", b"b", b"a", b"a", b"b", b"a"]
    cells = (None, "", b"", [], [None], [""], empty, {}, 7, object(), [["a.jpg"]])
    assert read(tmp_path, *cells) == ["missing_image"] * len(cells)
    several = ["a.jpg", image]
    assert read(tmp_path, several, [b"x", None]) == ["several_images"] * 2
    assert read(tmp_path, several, [None, "a.jpg"], image_list="first") == [
        b"a",
        "missing_image",
    ]


def test_bytes_must_have_the_hash_that_is_expected(
    tmp_path: Path, server: WebServer
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    url = server.serve("/a", Reply(body=b"a"))
    right = hashlib.sha256(b"a").hexdigest()
    wrong = hashlib.sha256(b"b").hexdigest()
    forms = (right, f" {right.upper()}\n", f"sha256:{right}", bytes.fromhex(right))
    forms += (right.encode(), f"SHA256:{right}".encode())
    hashes = (*forms, None, "", b"", wrong, "a" * 63, "none", b"a" * 31)
    with reader(tmp_path, hashes="digest") as images:
        for value in (b"a", "a.jpg", url):
            found = list(images.read(Cell(value=value, sha256=each) for each in hashes))
            assert found[:9] == [b"a"] * 9
            failed = [each for each in found[9:] if isinstance(each, ImageError)]
            assert [each.reason for each in failed] == ["hash_mismatch"] * 4
            says = ["'digest' holds no sha256" in each.detail for each in failed]
            assert says == [False, True, True, True]
        (missing,) = images.read([Cell(value="b.jpg", sha256=right)])
        assert isinstance(missing, ImageError)
        assert missing.reason == "missing_file"


def test_paths_stay_inside_the_corpus(tmp_path: Path) -> None:
    inside = tmp_path / "corpus"
    inside.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (inside / "a.jpg").write_bytes(b"fine")
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    fine = ("a.jpg", str(inside / "a.jpg"), (inside / "a.jpg").as_uri())
    assert read(inside, *fine) == [b"fine"] * 3
    secret = tmp_path / "secret.jpg"
    outside = ("../secret.jpg", str(secret), secret.as_uri(), "link.jpg", "s3://b/a")
    assert read(inside, *outside) == ["path_outside_input"] * 5
    assert read(inside, *outside[:4], allow=[str(tmp_path)]) == [b"secret"] * 4


def test_paths_that_cannot_be_are_missing_files(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    cells = ("no.jpg", ".", "loop.jpg", "file/a.jpg", "a" * 300, "pipe.jpg", "a\0b")
    assert read(tmp_path, *cells, "\ud800") == ["missing_file"] * (len(cells) + 1)
    assert read(tmp_path, "data:image/png;base64,AAAA") == ["bad_url"]


def test_a_name_that_is_not_utf8_is_told_from_one_that_is_not_there(
    tmp_path: Path,
) -> None:
    with reader(tmp_path) as images:
        cells = [Cell(value="a\\udcff.jpg"), Cell(value="no.jpg")]
        strange, missing = images.read(cells)
    assert str(strange).endswith(": its name is not UTF-8; rename the file")
    assert str(missing) == "missing_file: no.jpg"


def test_large_images_are_refused_wherever_they_lie(
    tmp_path: Path, server: WebServer
) -> None:
    for size in (_LIMIT, _LIMIT + 1):
        data = bytes(size)
        (tmp_path / "a").write_bytes(data)
        url = server.serve("/a", Reply(body=data))
        expected = data if size == _LIMIT else "too_large"
        assert read(tmp_path, data, "a", url, {"bytes": data}) == [expected] * 4


def test_a_file_without_room_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5000))
    room = Room()
    files = FileReader(1, _LIMIT)
    place = Place(path=str(tmp_path / "a"))
    assert isinstance(files.start(place, "a", Share(room, 4999)).exception(), NoRoom)
    assert room.held == 0
    assert files.start(place, "a", Share(room, 5000)).result() == bytes(5000)
    assert room.held == 5000
    files.close()


def test_a_storage_error_is_no_fault_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"fine")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with reader(tmp_path) as images:
        # No open file is left to be had: an error of the machine, as EIO would be.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match=r"a\.jpg cannot be read \(Too many open"):
                list(images.read([Cell(value="a.jpg")]))
            timer = threading.Timer(
                0.2, resource.setrlimit, (resource.RLIMIT_NOFILE, limits)
            )
            timer.start()
            assert list(images.read([Cell(value="a.jpg")])) == [b"fine"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert images.retried["storage"] >= 4


@pytest.mark.parametrize("quick", [0.0, 1000.0])
def test_files_are_the_same_whoever_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: float
) -> None:
    """The process itself, while that takes no time, or threads ahead of it."""
    monkeypatch.setattr(pipeline.fetch, "_QUICK_SECONDS", quick)
    # The page cache has these files: nothing waits for them.
    monkeypatch.setattr(pipeline.fetch, "_waits", itertools.count().__next__)
    readers = set()
    content = FileReader._content

    def noted(self: FileReader, file: BinaryIO, share: Share) -> bytes:
        readers.add(threading.current_thread())
        return content(self, file, share)

    monkeypatch.setattr(FileReader, "_content", noted)
    values: list[object] = []
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(str(number).encode())
        values.append(f"{number}.jpg" if number % 7 else "absent.jpg")
    expected = [
        str(number).encode() if number % 7 else "missing_file" for number in range(40)
    ]
    assert read(tmp_path, *values) == expected
    alone = readers == {threading.current_thread()}
    assert alone == (quick > 0)


def test_a_machine_without_sockets_is_no_fault_of_the_input(server: WebServer) -> None:
    url = server.serve("/a", Reply(body=b"fine"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with reader("/nowhere") as images:
        assert list(images.read([Cell(value=server.url("/none"))]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            other = url.replace("127.0.0.1", "127.0.0.3")
            with pytest.raises(OSError, match=r"--fetch.concurrency or raise .ulimit"):
                list(images.read([Cell(value=other)]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_fetches_run_ahead_of_whoever_reads(server: WebServer) -> None:
    urls = [server.serve(f"/{number}", Reply(body=b"x")) for number in range(8)]
    # The first is answered only once all of the others were asked for.
    server.serve("/0", Reply(body=b"x", until_hits=8))
    with reader("/nowhere", concurrency=8, per_host=8) as images:
        assert list(images.read(Cell(value=url) for url in urls)) == [b"x"] * 8


_PIECES = (
    *(
        "http://",
        "https://",
        "s3://",
        "file://",
        "//",
        "..",
        "%2e",
        "%00",
        "xn--",
        "::",
    ),
    *("[", "]", "[::1]", "@", ":", "?", "#", "\\", " ", "\n", "\0", "a", "7", "é", "İ"),
    *("\ud800", "\udc80", "①", "localhost", ".", "-", "%"),
)


def test_no_mixture_of_characters_ends_the_run() -> None:
    def nowhere(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    draw = random.Random(0)
    starts = ("http://", "https://[", "HTTP:/", "", "s3://b/", "file:///")
    texts = [
        draw.choice(starts) + "".join(draw.choices(_PIECES, k=draw.randrange(12)))
        for _ in range(1500)
    ]
    with reader("/nowhere", network=Network(resolve=nowhere)) as images:
        found = list(images.read(Cell(value=text) for text in texts))
    reasons = {failed.reason for failed in found if isinstance(failed, ImageError)}
    assert len(found) == len(texts)
    assert reasons >= {"bad_url", "dns", "address_refused", "path_outside_input"}
    for failed in found:
        assert isinstance(failed, ImageError)
        # What Parquet can hold; a cell that is no text is no detail either.
        failed.detail.encode()


def test_damaged_answers_never_end_the_run(server: WebServer) -> None:
    body = b"Content-Encoding: identity\r\nX-Robots-Tag: all\r\n\r\n" + b"a" * 20
    whole = b"HTTP/1.1 200 OK\r\nRetry-After: 3\r\nContent-Length: 20\r\n" + body
    draw = random.Random(0)
    urls = [server.serve("/whole", Reply(raw=whole))]
    for number in range(300):
        raw = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(raw))
            raw[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
        urls.append(server.serve(f"/{number}", Reply(raw=bytes(raw))))
    with reader("/nowhere", timeout_s=5.0, concurrency=8, per_host=8) as images:
        found = list(images.read(Cell(value=url) for url in urls))
    assert len(found) == len(urls)
    assert found[0] == b"a" * 20
    failures = [failed for failed in found if isinstance(failed, ImageError)]
    assert {failed.reason for failed in failures} >= {"bad_answer", "truncated"}
    for failed in failures:
        failed.detail.encode()


def test_what_is_tried_again_is_counted(server: WebServer) -> None:
    url = server.serve("/a", Reply(status=503), Reply(status=500), Reply(body=b"x"))
    with reader("/nowhere", retries=2) as images:
        assert images.retried == {}
        assert list(images.read([Cell(value=url)])) == [b"x"]
        assert images.retried == {"http_500": 1, "http_503": 1}
    assert images.retried == {"http_500": 1, "http_503": 1}


def test_leaving_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, server: WebServer
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    stuck = server.serve("/stuck", Reply(body=b"x", pause_s=30))
    fine = server.serve("/fine", Reply(body=b"x"))
    cells = [Cell(value=value) for value in (fine, "a.jpg", *[stuck] * 20)]
    with reader(tmp_path) as images:
        found = images.read(cells)
        assert [next(found), next(found)] == [b"x", b"a"]
    assert not [each for each in threading.enumerate() if "palimpsest" in each.name]
    with pytest.raises(ValueError, match="no_slash"), reader(tmp_path) as images:
        list(images.read(_failing(stuck)))
    assert not [each for each in threading.enumerate() if "palimpsest" in each.name]


def _failing(url: str) -> Iterator[Cell]:
    yield Cell(value=url)
    raise ValueError("no_slash")


def test_failures_keep_nothing_of_what_they_read(server: WebServer) -> None:
    url = server.serve("/a", Reply(endless=True))
    encoded = {"Content-Encoding": "gzip"}
    bomb = Reply(body=gzip.compress(bytes(10 * _LIMIT)), headers=encoded)
    cells = [Cell(value=each) for each in [url, server.serve("/b", bomb)] * 50]
    with reader("/nowhere") as images:
        (first,) = images.read(cells[:1])
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        failures = list(images.read(cells))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert {str(failed) for failed in failures} == {str(first)}
    assert after - before < len(failures) * _LIMIT / 4


def test_addresses_are_checked_unless_they_are_allowed(server: WebServer) -> None:
    url = server.serve("/a", Reply(body=b"secret"))
    assert read("/nowhere", url, allow_private=False) == ["address_refused"]
    assert not server.hits
    assert read("/nowhere", url) == [b"secret"]


def test_paths_below_a_web_address_are_fetched(server: WebServer) -> None:
    server.serve("/images/a%20b.jpg", Reply(body=b"x"))
    base = server.url("/images")
    assert read(base, "a b.jpg", "../c", "none.jpg") == [
        b"x",
        "path_outside_input",
        "http_404",
    ]


def test_any_file_system_of_fsspec_serves() -> None:
    files = fsspec.filesystem("memory")
    files.pipe({"/corpus/a.jpg": b"a", "/shared/b.jpg": b"b", "/corpus2/c.jpg": b"c"})
    files.pipe("/corpus/big.jpg", bytes(_LIMIT + 1))
    cells = (
        "a.jpg",
        "memory://corpus/a.jpg",
        "none.jpg",
        "big.jpg",
        "../corpus2/c.jpg",
    )
    assert read("memory://corpus", *cells, "memory://shared/b.jpg") == [
        *(b"a", b"a", "missing_file", "too_large"),
        *("path_outside_input", "path_outside_input"),
    ]
    allowed = read("memory://corpus", "memory://shared/b.jpg", allow="memory://shared")
    assert allowed == [b"b"]


def test_images_in_s3_are_read_and_other_buckets_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    try:
        host, port = s3.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=endpoint)
        for bucket in ("corpus", "other"):
            client.create_bucket(Bucket=bucket)
            for name in ("in/a b%20c.jpg", "in/sub/b.jpg", "secret.jpg"):
                client.put_object(Bucket=bucket, Key=name, Body=name.encode())
        cells = (
            "a b%20c.jpg",
            "./x/../sub/b.jpg",
            "s3://corpus/in/sub/b.jpg",
            "no.jpg",
        )
        outside = ("../secret.jpg", "s3://corpus/secret.jpg", "s3://other/in/sub/b.jpg")
        assert read("s3://corpus/in", *cells, *outside, "sub", "a" * 1001) == [
            *(b"in/a b%20c.jpg", b"in/sub/b.jpg", b"in/sub/b.jpg", "missing_file"),
            *["path_outside_input"] * 3,
            *["missing_file"] * 2,
        ]
        many = ["sub/b.jpg"] * 100
        assert read("s3://corpus/in", *many) == [b"in/sub/b.jpg"] * 100
    finally:
        s3.stop()


def test_an_allowed_prefix_that_is_none_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"--fetch.allow images is neither"):
        reader("/nowhere", allow="images")


def test_a_corpus_without_urls_never_loads_the_web_client() -> None:
    code = (
        "import sys; from pipeline.fetch import *; from pipeline.options import *\n"
        "given = {'base': '.', 'max_bytes': 9, 'image_list': 'first'}\n"
        "with ImageReader(FetchOptions(), **given) as images:\n"
        "    assert list(images.read([Cell(value=b'a')])) == [b'a']\n"
        "assert not {'aiohttp', 'fsspec'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
