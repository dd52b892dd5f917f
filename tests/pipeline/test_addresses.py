"""A corpus names nothing outside of its folder, its allowed prefixes and the web."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.addresses import AddressRefused, Network, Place, Places, is_public
from pipeline.images import ImageError

_PRIVATE = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1"),
    *("127.255.0.9", "169.254.169.254", "172.16.0.1", "172.31.255.255"),
    *("192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
    *("198.51.100.7", "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "168.63.129.16"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1"),
    *("fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "100::1"),
    *("2001::1", "2001:0:53aa:64c::1", "2001:db8::1", "2002:7f00:1::1"),
    *("2002:808:808::1", "3fff::1", "2606:4700::1%eth0", "localhost", "", "1.2.3"),
)
_PUBLIC = (
    *("1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1"),
    *("172.32.0.1", "192.0.3.1", "223.255.255.255", "126.255.255.255"),
    *("2606:4700::1", "2a00:1450::1", "2001:4860:4860::8888", "64:ff9b::808:808"),
)


@pytest.mark.parametrize("address", _PRIVATE)
def test_no_address_of_this_machine_its_network_or_its_cloud_is_public(
    address: str,
) -> None:
    assert not is_public(address)
    with pytest.raises(AddressRefused, match="allow_private"):
        Network().check(address)
    Network(allow_private=True).check(address)


@pytest.mark.parametrize("address", _PUBLIC)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)
    Network().check(address)


def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    found = {"mixed": ["8.8.8.8", "10.0.0.1"], "fine": ["8.8.8.8", "2606:4700::1"]}
    network = Network(resolve=lambda host, port: found[host])
    assert network.addresses("fine", 80) == found["fine"]
    with pytest.raises(AddressRefused):
        network.addresses("mixed", 80)


def test_the_system_resolves_odd_spellings_into_what_is_then_refused() -> None:
    for host in ("127.1", "2130706433", "0x7f.1", "017700000001", "localhost"):
        with pytest.raises(AddressRefused):
            Network().addresses(host, 80)
        assert Network(allow_private=True).addresses(host, 80)
    for host in ("a" * 80, "a" * 64 + ".com", "a..b"):
        with pytest.raises(OSError, match=r".") as caught:
            Network().addresses(host, 80)
        assert not isinstance(caught.value, AddressRefused)


def reason(places: Places, cell: str) -> str:
    """The code under which a cell is refused."""
    with pytest.raises(ImageError) as caught:
        places.locate(cell)
    return caught.value.reason


def test_a_folder_that_was_seen_lets_no_link_lead_out(tmp_path: Path) -> None:
    """What is remembered of a folder says nothing about the files in it."""
    inside = tmp_path / "corpus"
    (inside / "sub").mkdir(parents=True)
    (inside / "out").symlink_to(tmp_path)
    (tmp_path / "secret.jpg").touch()
    for folder in (inside, inside / "sub"):
        (folder / "a.jpg").touch()
        (folder / "fine.jpg").symlink_to("a.jpg")
        (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    places = Places(base=str(inside))
    for _ in range(2):
        for folder in ("", "sub/"):
            for name in ("a.jpg", "fine.jpg"):
                found = places.locate(folder + name)
                assert found == Place(path=str(inside / folder / "a.jpg"))
            with pytest.raises(ImageError, match="path_outside_input"):
                places.locate(f"{folder}link.jpg")
        for cell in ("out/secret.jpg", "sub/../out/secret.jpg", "sub/../..", ".."):
            with pytest.raises(ImageError, match="path_outside_input"):
                places.locate(cell)


def test_paths_stay_in_a_local_folder(tmp_path: Path) -> None:
    inside = tmp_path / "corpus"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (inside / "fine.jpg").symlink_to("sub/a.jpg")
    for base in (str(inside), f"{inside}/", inside.as_uri(), f"file://{inside}/"):
        places = Places(base=base)
        at = os.path.realpath(inside / "sub" / "a.jpg")
        absolute = f"{inside}/sub/a.jpg"
        cells = ("sub/a.jpg", "./sub//a.jpg", "sub/../sub/a.jpg", "fine.jpg", absolute)
        urls = (f"file://{absolute}", f"file://localhost{absolute}")
        for cell in (
            *cells,
            *urls,
            f"FILE://{absolute}",
            f"file:{absolute}",
            f" file://{absolute} \n",
            f"file://{inside}/s%75b/a.jpg",
        ):
            assert places.locate(cell) == Place(path=at)
        outside = ("../secret.jpg", "link.jpg", "/etc/hostname", f"{inside}x/a.jpg")
        urls = ("file:///etc/hostname", f"file://{inside}/%2e%2e/secret.jpg")
        urls += (
            "file:/etc/hostname",
            " File:/etc/hostname",
            f"file:{inside}/../secret.jpg",
        )
        others = ("file://elsewhere/etc/hostname", "s3://bucket/a", "zip://a::b")
        for cell in (*outside, *urls, *others, "ftp://a/b", "memory://a"):
            assert reason(places, cell) == "path_outside_input"
        for cell in ("a\0b", "file:///a%00b", "a\ud800", "s3://b/\udc80"):
            assert reason(places, cell) == "missing_file"
        web = "http://example.com/a%2e%2e/../b c"
        assert places.locate(web) == places.locate(f" {web}\n") == Place(web=web)


def test_an_image_inside_a_url_is_told_from_a_path(tmp_path: Path) -> None:
    for base in (str(tmp_path), "s3://bucket/images", "http://example.com"):
        places = Places(base=base)
        for cell in (
            "data:image/png;base64,iVBORw0KGgo=",
            "DATA:image/svg+xml;charset=utf-8,%3Csvg/%3E",
            "data:,x",
        ):
            assert reason(places, cell) == "bad_url"
    (tmp_path / "data:1").mkdir()
    at = os.path.realpath(tmp_path / "data:1" / "a,b.jpg")
    assert Places(base=str(tmp_path)).locate("data:1/a,b.jpg") == Place(path=at)


def test_an_allowed_folder_is_allowed_and_its_neighbours_are_not(
    tmp_path: Path,
) -> None:
    for name in ("corpus", "images", "images2"):
        (tmp_path / name).mkdir()
    for prefix in (str(tmp_path / "images"), (tmp_path / "images").as_uri() + "/"):
        places = Places(base=str(tmp_path / "corpus"), allow=[prefix])
        at = os.path.realpath(tmp_path / "images" / "a.jpg")
        for cell in (f"{tmp_path}/images/a.jpg", "../images/a.jpg"):
            assert places.locate(cell) == Place(path=at)
        for cell in (f"{tmp_path}/images2/a.jpg", f"{tmp_path}/images/../images2/a"):
            assert reason(places, cell) == "path_outside_input"
        assert (
            reason(places, f"file://{tmp_path}/images2/a.jpg") == "path_outside_input"
        )


@pytest.mark.parametrize(
    ("cell", "url"),
    [
        ("a.jpg", "s3://bucket/folder/a.jpg"),
        ("./x/../a b%20c.jpg", "s3://bucket/folder/a b%20c.jpg"),
        ("x//a#1?.jpg", "s3://bucket/folder/x//a#1?.jpg"),
        ("s3://bucket/folder/a.jpg", "s3://bucket/folder/a.jpg"),
        ("S3://bucket/folder/./a.jpg", "s3://bucket/folder/a.jpg"),
        ("s3://shared/images/a.jpg", "s3://shared/images/a.jpg"),
        ("../../../shared/images/a.jpg", None),
        ("../a.jpg", None),
        ("x/../../folder2/a.jpg", None),
        ("%2e%2e/a.jpg", None),
        ("%252E%252e%252fa.jpg", None),
        ("..%2fa.jpg", None),
        ("..\\a.jpg", None),
        ("/etc/hostname", None),
        ("a::file:///etc/hostname", None),
        ("file:///etc/hostname", None),
        ("s3://bucket/folder2/a.jpg", None),
        ("s3://bucket/a.jpg", None),
        ("s3://Bucket/folder/a.jpg", None),
        ("s3:///bucket/folder/a.jpg", None),
        ("s3://bucket//folder/a.jpg", None),
        ("s3://bucket/folder/../folder2/a.jpg", None),
        ("s3://bucket/folder/%2e%2e/a.jpg", None),
        ("s3://shared/images2/a.jpg", None),
        ("s3://shared/../bucket/folder/a.jpg", None),
        ("s3://bucket/folder/a::s3://other/b", None),
        ("gs://bucket/folder/a.jpg", None),
    ],
)
def test_urls_stay_under_the_base_and_the_allowed_prefixes(
    cell: str, url: str | None
) -> None:
    places = Places(base="s3://bucket/folder/", allow=["s3://shared/images/"])
    if url:
        assert places.locate(cell) == Place(url=url)
    else:
        assert reason(places, cell) == "path_outside_input"


def test_a_whole_bucket_may_be_allowed_and_no_other(tmp_path: Path) -> None:
    places = Places(base=str(tmp_path), allow=["s3://bucket"])
    assert places.locate("s3://bucket/x/a.jpg") == Place(url="s3://bucket/x/a.jpg")
    for cell in ("s3://bucket2/a.jpg", "s3://bucket/../bucket2/a.jpg", "s3://"):
        assert reason(places, cell) == "path_outside_input"


def test_paths_below_a_web_address_are_joined_to_it() -> None:
    places = Places(base="https://example.com/images")
    url = "https://example.com/images/sub/a b.jpg?w=3"
    assert places.locate("sub/a b.jpg?w=3") == Place(web=url)
    for cell in ("../secret.jpg", "x/%2e%2e/%2e%2e/y", "/etc/hostname"):
        assert reason(places, cell) == "path_outside_input"


def test_a_name_that_no_object_can_have_is_a_missing_file() -> None:
    places = Places(base="s3://bucket")
    assert places.locate("a" * 900).url == "s3://bucket/" + "a" * 900
    assert reason(places, "a" * 1100) == "missing_file"
    assert reason(places, "ä" * 600) == "missing_file"


def test_a_prefix_that_is_none_is_refused_with_the_cure() -> None:
    for prefix in ("images", "./images", "", "file://elsewhere/images", "s3://b/../.."):
        with pytest.raises(ValueError, match=r"neither an absolute folder nor a URL"):
            Places(base="s3://bucket", allow=[prefix])
    with pytest.raises(ValueError, match=r"may be named without it"):
        Places(base="s3://bucket", allow=["https://example.com/"])


_PIECES = st.sampled_from(
    ["..", ".", "", "a", "/", "//", "%2e%2e", "%2E.", "%2f", "\\", "::", "s3://", "b"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES, max_size=12).map("".join))
def test_no_mixture_of_pieces_leaves_the_folder(cell: str) -> None:
    places = Places(base="s3://bucket/b")
    place = None
    with contextlib.suppress(ImageError):
        place = places.locate(cell)
    if place is None:
        assert reason(places, cell) == "path_outside_input"
        return
    assert place.url
    assert place.url.startswith("s3://bucket/b")
    assert place.url[len("s3://bucket/b") :][:1] in ("", "/")
    lower = place.url.lower().replace("%2e", ".").replace("%2f", "/")
    path = os.path.normpath("/" + lower.replace("\\", "/").removeprefix("s3://"))
    assert path == "/bucket/b" or path.startswith("/bucket/b/")
