"""Servers cannot hang, flood or mislead a fetch, and every failure has its reason.

127.0.0.2 plays the public internet where addresses are checked, 127.0.0.1 the machine
that must not be reached; both are real sockets.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import ipaddress
import itertools
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.addresses import Network
from pipeline.download import Downloader
from pipeline.images import ImageError
from pipeline.lookahead import NoRoom, Room, Share
from pipeline.options import FetchOptions
from tests.pipeline.corpora import REPOSITORY
from tests.pipeline.web import Reply, WebServer

_LIMIT = 100_000
_PUBLIC = "127.0.0.2"
_BODY = bytes(range(256)) * 20

Fetch = Callable[..., "bytes | str"]


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


@pytest.fixture
def public_server() -> Iterator[WebServer]:
    with WebServer(_PUBLIC) as running:
        yield running


def opened(network: Network | None = None, **options: object) -> Downloader:
    given = {"timeout_s": 5.0, "total_timeout_s": 20.0, "retries": 0, **options}
    return Downloader(
        FetchOptions(**given),  # type: ignore[arg-type]
        max_bytes=_LIMIT,
        network=network or Network(allow_private=True),
    )


def result(downloader: Downloader, url: str) -> bytes | str:
    """The body, or the reason of the failure."""
    room = Room()
    future = downloader.start(url, Share(room, 1 << 30))
    error = future.exception(60)
    if not isinstance(error, ImageError):
        assert room.held == len(future.result())
        return future.result()
    assert room.held == 0
    # What no two runs share.
    assert not any(part in error.detail for part in ("127.0", "0x", "object"))
    return error.reason


def fetched(url: str, network: Network | None = None, **options: object) -> bytes | str:
    downloader = opened(network, **options)
    try:
        return result(downloader, url)
    finally:
        downloader.close()


def test_a_body_comes_whole_and_the_request_says_who_asks(server: WebServer) -> None:
    url = server.serve("/a%20b.jpg?x=1", Reply(body=_BODY))
    spelled = url.replace("%20", " ") + "#part"
    assert fetched(f" {spelled}\n", user_agent="palimpsest (+a@b)") == _BODY
    headers = server.headers["/a%20b.jpg?x=1"]
    assert headers["User-Agent"] == "palimpsest (+a@b)"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization"} & set(headers)


@pytest.mark.parametrize("status", [204, 206, 300, 304, 400, 401, 403, 404, 410, 451])
def test_other_statuses_fail_at_once(server: WebServer, status: int) -> None:
    url = server.serve("/a", Reply(status=status, length=0))
    assert fetched(url, retries=3) == f"http_{status}"
    assert server.hits["/a"] == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520])
def test_statuses_that_may_pass_are_tried_again(server: WebServer, status: int) -> None:
    url = server.serve("/a", Reply(status=status), Reply(body=_BODY))
    downloader = opened(retries=1)
    assert result(downloader, url) == _BODY
    assert downloader.retried == {f"http_{status}": 1}
    downloader.close()


def test_tries_are_bounded_and_the_last_reason_stays(server: WebServer) -> None:
    url = server.serve("/a", Reply(status=502), Reply(status=500), Reply(status=503))
    downloader = opened(retries=2)
    assert result(downloader, url) == "http_503"
    assert downloader.retried == {"http_502": 1, "http_500": 1}
    assert result(downloader, server.serve("/b", Reply(drop=True))) == "connection"
    assert downloader.retried["connection"] == 2
    # aiohttp asks again by itself where the connection is dropped.
    assert server.hits["/b"] <= 6
    downloader.close()


def test_a_pause_that_is_asked_for_is_made_or_declined(server: WebServer) -> None:
    later = {"Retry-After": "1"}
    url = server.serve("/a", Reply(status=429, headers=later), Reply(body=_BODY))
    assert fetched(url, retries=1) == _BODY
    never = {"Retry-After": "100000"}
    url = server.serve("/b", Reply(status=503, headers=never), Reply(body=_BODY))
    assert fetched(url, retries=3) == "http_503"
    assert server.hits["/b"] == 1


def test_a_body_that_ends_early_is_tried_again(server: WebServer) -> None:
    short = Reply(body=_BODY, length=len(_BODY) + 1)
    url = server.serve("/a", short, Reply(body=_BODY))
    assert fetched(url, retries=1) == _BODY
    assert fetched(server.serve("/b", short), retries=1) == "truncated"
    assert server.hits["/b"] == 2
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    assert fetched(server.serve("/c", Reply(raw=chunks))) == "truncated"
    assert fetched(server.serve("/d", Reply(raw=chunks + b"0\r\n\r\n"))) == b"hello"


def test_bytes_behind_a_body_change_nothing_however_they_arrive(
    server: WebServer,
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(_BODY)
    for extra in (b"z", b"zzzzzz" * 1_000, b"HTTP/1.1 200 OK\r\n\r\n", b"\r\n"):
        url = server.serve("/at_once", Reply(raw=head + _BODY + extra))
        assert fetched(url) == _BODY
        closed = b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head[17:]
        url = server.serve("/closed", Reply(raw=closed + _BODY + extra))
        assert fetched(url) == _BODY
    # What comes late may meet the next request of the same connection.
    url = server.serve("/late", Reply(body=_BODY, after=b"zzzzzz"))
    downloader = opened(per_host=2, retries=3)
    try:
        share = Share(Room(), 1 << 30)
        futures = [downloader.start(url, share) for _ in range(40)]
        assert {future.result(60) for future in futures} == {_BODY}
    finally:
        downloader.close()


def test_a_body_without_a_length_is_read_to_its_end(server: WebServer) -> None:
    assert fetched(server.serve("/a", Reply(body=_BODY, length=-1))) == _BODY


def test_a_large_answer_is_refused_by_its_length_or_cut_off(server: WebServer) -> None:
    claims = Reply(body=b"small", length=_LIMIT + 1)
    assert fetched(server.serve("/a", claims)) == "too_large"
    exact = bytes(_LIMIT)
    assert fetched(server.serve("/b", Reply(body=exact))) == exact
    assert fetched(server.serve("/c", Reply(body=bytes(_LIMIT + 1), length=-1))) == (
        "too_large"
    )
    assert fetched(server.serve("/d", Reply(endless=True))) == "too_large"


def test_a_gzip_bomb_and_other_encodings(server: WebServer) -> None:
    encoded = {"Content-Encoding": "gzip"}
    small = Reply(body=gzip.compress(_BODY), headers=encoded)
    assert fetched(server.serve("/a", small)) == _BODY
    bomb = Reply(body=gzip.compress(bytes(80_000_000), 9), headers=encoded)
    assert len(bomb.body) < _LIMIT
    assert fetched(server.serve("/b", bomb)) == "too_large"
    cut = Reply(body=gzip.compress(_BODY)[:-8], headers=encoded)
    assert fetched(server.serve("/c", cut)) == "truncated"
    assert fetched(server.serve("/d", Reply(body=_BODY, headers=encoded))) == (
        "content_encoding"
    )
    other = Reply(body=_BODY, headers={"Content-Encoding": "br"})
    assert fetched(server.serve("/e", other)) == "content_encoding"


def test_servers_that_wait_or_drip_run_out_of_time(server: WebServer) -> None:
    downloader = opened(timeout_s=0.3, retries=1)
    silent = server.serve("/a", Reply(body=_BODY, pause_s=60))
    assert result(downloader, silent) == "timeout"
    assert downloader.retried == {"timeout": 1}
    downloader.close()
    # Every byte comes in time, but not all of them.
    downloader = opened(timeout_s=30.0, total_timeout_s=0.5, retries=3)
    drip = server.serve("/b", Reply(body=_BODY, drip_s=0.05))
    assert result(downloader, drip) == "timeout"
    assert not downloader.retried
    downloader.close()


def test_floods_and_nonsense_are_no_answers(server: WebServer) -> None:
    start = b"HTTP/1.1 200 OK\r\n"
    for number, raw in enumerate(
        [
            start + b"X-A: " + b"a" * 1_000_000,
            start + b"X-A: a\r\n" * 100_000,
            b"HTTP/1.1 200 " + b"a" * 1_000_000,
            b"\xff\xd8 just a picture",
            b"HTTP/1.1 99999 OK\r\n\r\n",
            start + b"Content-Length: -5\r\n\r\n",
            start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        ]
    ):
        url = server.serve(f"/{number}", Reply(raw=raw))
        assert fetched(url) in ("bad_answer", "truncated", "connection"), raw[:60]


def test_redirects_are_followed_within_a_limit(server: WebServer) -> None:
    for hop in range(7):
        moved = Reply(status=[301, 302, 303, 307, 308][hop % 5], length=0)
        headers = {"Location": f"{hop + 1}"}
        server.serve(f"/{hop}", Reply(**{**vars(moved), "headers": headers}))
    server.serve("/7", Reply(body=_BODY))
    assert fetched(server.url("/2")) == _BODY
    assert fetched(server.url("/1")) == "too_many_redirects"
    assert fetched(server.serve("/a", Reply(status=302))) == "http_302"
    for location in (
        "file:///etc/hostname",
        "ftp://a/",
        "http://u:p@127.0.0.1/",
        "//[",
    ):
        reply = Reply(status=301, headers={"Location": location})
        assert fetched(server.serve("/b", reply)) == "bad_url", location


def test_opt_outs_count_for_the_image_and_not_for_what_leads_to_it(
    server: WebServer,
) -> None:
    tag = {"X-Robots-Tag": "noindex"}
    url = server.serve("/a", Reply(body=_BODY, headers=tag))
    assert fetched(url) == "opted_out"
    assert fetched(url, opt_out=[]) == _BODY
    other = Reply(body=_BODY, headers={"X-Robots-Tag": "otherbot: noai"})
    url = server.serve("/b", other)
    assert fetched(url) == _BODY
    assert fetched(url, user_agent="OtherBot/2.0") == "opted_out"
    moved = Reply(status=301, length=0, headers={**tag, "Location": "/b"})
    assert fetched(server.serve("/c", moved)) == _BODY


def test_urls_that_cannot_be_fetched(server: WebServer) -> None:
    url = server.serve("/a", Reply(body=_BODY))
    assert fetched(url.replace("//", "//user:secret@")) == "bad_url"
    for bad in (
        "http://",
        "http:///a",
        "http://[::1",
        "http://a:0/",
        "http://a:99999/",
        "http://a b/x",
        "http://a\u2003b/x",
    ):
        assert fetched(bad) == "bad_url"
    for bad in ("http://\ud800/", "http://xn--/", "http://a\\@b/"):
        assert fetched(bad) == "bad_url"
    assert not server.hits


def test_hosts_that_do_not_resolve_or_do_not_listen() -> None:
    def nowhere(host: str, port: int) -> list[str]:
        code = socket.EAI_NONAME if host == "gone.test" else socket.EAI_AGAIN
        raise socket.gaierror(code, "no answer")

    network = Network(resolve=nowhere)
    downloader = opened(network, retries=1)
    assert result(downloader, "http://gone.test/") == "dns"
    assert not downloader.retried
    assert result(downloader, "http://later.test/") == "dns"
    assert downloader.retried == {"dns": 1}
    downloader.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert fetched(f"http://127.0.0.1:{port}/") == "connection"


def test_private_addresses_are_refused_however_they_are_spelled(
    server: WebServer,
) -> None:
    server.serve("/", Reply(body=b"secret"))
    hosts = ("127.0.0.1", "localhost", "LOCALHOST", "127.1", "2130706433", "0x7f000001")
    odd = ("0177.0.0.1", "017700000001", "0x7f.1", "0", "127.0.0.1.", "①②⑦.0.0.1")
    six = ("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]")
    more = ("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "169.254.169.254")
    downloader = opened(Network())
    for host in (*hosts, *odd, *six, *more, "[fd00:ec2::254]", "100.100.100.200"):
        assert result(downloader, server.url("/", host)) in ("address_refused", "dns")
        if host in hosts or host in six:
            assert result(downloader, server.url("/", host)) == "address_refused"
    downloader.close()
    assert not server.hits
    assert fetched(server.url("/")) == b"secret"


def test_a_redirect_to_a_private_address_is_refused(
    server: WebServer, public_server: WebServer
) -> None:
    server.serve("/", Reply(body=b"secret"))
    network = Network(public=lambda address: address == _PUBLIC)
    for target in (server.url("/"), server.url("/", "localhost")):
        moved = Reply(status=302, length=0, headers={"Location": target})
        url = public_server.serve("/a", moved)
        assert fetched(url, network) == "address_refused"
    assert public_server.hits["/a"] == 2
    assert not server.hits


@pytest.fixture
def two_at_one_port() -> Iterator[tuple[WebServer, socket.socket]]:
    """A server at the public address, and a socket at its port of the private one."""
    private = None
    with contextlib.ExitStack() as stack:
        while private is None:
            public = stack.enter_context(WebServer(_PUBLIC))
            # Somebody else may have that one.
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", int(public.port))
                private = stack.enter_context(socket.create_server(address))
        yield public, private


def test_a_name_that_changes_its_address_gains_nothing(
    two_at_one_port: tuple[WebServer, socket.socket],
) -> None:
    """DNS rebinding: whatever was checked is what gets connected."""
    public, private = two_at_one_port
    port = int(public.port)
    public.serve("/", Reply(body=b"public", headers={"Connection": "close"}))
    answers = itertools.cycle([[_PUBLIC], ["127.0.0.1"], [_PUBLIC, "127.0.0.1"]])
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    network = Network(public=lambda address: address == _PUBLIC, resolve=rebinding)
    private.settimeout(0.2)
    outcomes = [fetched(f"http://rebind.test:{port}/", network) for _ in range(6)]
    with pytest.raises(TimeoutError):
        private.accept()
    assert outcomes == [b"public", "address_refused", "address_refused"] * 2
    # One look-up for each connection: none between the check and its use.
    assert len(asked) == 6


def test_proxies_of_the_environment_are_not_used(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WebServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        assert fetched(server.serve("/a", Reply(body=_BODY))) == _BODY
        assert not proxy.hits


def test_requests_at_once_are_bounded_by_host_and_in_all(server: WebServer) -> None:
    for per_host, concurrency, most in ((2, 8, 2), (8, 3, 3)):
        server.hits.clear()
        server.most_at_once = 0
        url = server.serve("/a", Reply(body=b"x", until_hits=most, pause_s=0.03))
        downloader = opened(per_host=per_host, concurrency=concurrency)
        futures = [downloader.start(url, Share(Room(), _LIMIT)) for _ in range(30)]
        assert [future.result(60) for future in futures] == [b"x"] * 30
        assert server.most_at_once == most
        downloader.close()


def test_waiting_for_a_turn_takes_none_of_an_images_time(server: WebServer) -> None:
    # Twenty in a row take longer than any one of them may.
    url = server.serve("/a", Reply(body=b"x", pause_s=0.3))
    downloader = opened(per_host=1, total_timeout_s=5.5)
    futures = [downloader.start(url, Share(Room(), _LIMIT)) for _ in range(20)]
    assert [future.result(60) for future in futures] == [b"x"] * 20
    downloader.close()


def test_a_body_without_room_is_given_up_and_holds_nothing(server: WebServer) -> None:
    room = Room()
    url = server.serve("/a", Reply(body=bytes(5000)))
    downloader = opened(retries=3)
    failed = downloader.start(url, Share(room, 4999)).exception(60)
    assert isinstance(failed, NoRoom)
    assert room.held == 0
    assert server.hits["/a"] == 1
    assert downloader.start(url, Share(room, 5000)).result(60) == bytes(5000)
    downloader.close()


def test_closing_leaves_no_thread_and_no_socket(server: WebServer) -> None:
    threads = set(threading.enumerate())
    idle = server.serve("/a", Reply(body=_BODY))
    stuck = server.serve("/b", Reply(body=_BODY, pause_s=30))
    downloader = opened(timeout_s=30.0)
    assert result(downloader, idle) == _BODY
    waiting = downloader.start(stuck, Share(Room(), _LIMIT))
    while not server.hits["/b"]:
        threading.Event().wait(0.01)
    downloader.close()
    assert waiting.cancelled()
    mine = {each for each in threading.enumerate() if "palimpsest" in each.name}
    assert not mine - threads
    left = psutil.Process().net_connections()
    assert left
    assert not [each for each in left if each.raddr and each.raddr.port == server.port]
    downloader.close()


def test_a_user_agent_that_no_header_can_hold() -> None:
    for name in ("", "a\r\nX-B: c", "ä"):
        with pytest.raises(ValueError, match=r"--fetch.user_agent .* printable ASCII"):
            opened(user_agent=name)


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's TLS for 127.0.0.1, with a certificate that only itself vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_certificates_are_checked_against_the_systems(
    tmp_path: Path, server: WebServer
) -> None:
    with WebServer(tls=certificate(tmp_path)) as secure:
        url = secure.serve("/a", Reply(body=_BODY))
        assert fetched(url, retries=3) == "tls"
        assert not secure.hits
        # The system's certificates are read when a process starts.
        code = (
            "import sys; from tests.pipeline.test_download import fetched, _BODY\n"
            "assert fetched(sys.argv[1]) == _BODY\n"
            "assert fetched(sys.argv[2]) == 'tls'\n"
        )
        other = url.replace("127.0.0.1", "localhost")
        subprocess.run(
            [sys.executable, "-c", code, url, other],
            cwd=REPOSITORY,
            env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "cert.pem")},
            check=True,
        )
        assert secure.hits["/a"] == 1
    plain = server.serve("/a", Reply(body=_BODY)).replace("http:", "https:")
    assert fetched(plain) == "tls"
