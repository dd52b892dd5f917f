"""A real S3 server on loopback, behind a real HTTP proxy that can spoil its answers.

Owns starting `moto` as a process of its own, and the faults. Tests that need it make a
`S3Server` per module and take a `bucket` from it per test.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

import pytest
from s3fs import S3FileSystem

from tests.conftest import free_port

_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "expect", "content-length")
)
_ERROR = "<Error><Code>{code}</Code><Message>from the tests</Message></Error>"
# Without any signature moto refuses to replace an object; it checks none.
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/"
    "aws4_request, SignedHeaders=host, Signature=0"
}
_CODES = {
    500: "InternalError",
    503: "SlowDown",
    429: "TooManyRequests",
    403: "AccessDenied",
    501: "NotImplemented",
}


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    status: answered with this code and never forwarded. drop: the connection closes
    before it is forwarded. lose: forwarded, and the connection closes unanswered.
    truncate: half of the answer's body, then the connection closes. slow: `seconds`
    pass before it is forwarded. held: `until` is set before it is forwarded.
    """

    kind: str
    status: int = 503
    seconds: float = 0.0
    until: threading.Event | None = None


DROP, LOSE, TRUNCATE = Fault("drop"), Fault("lose"), Fault("truncate")


def status(code: int) -> Fault:
    """The server refuses with this HTTP status."""
    return Fault("status", status=code)


def slow(seconds: float) -> Fault:
    """The server takes its time."""
    return Fault("slow", seconds=seconds)


def held(until: threading.Event) -> Fault:
    """The request is on its way until `until` is set."""
    return Fault("held", until=until)


class S3Server:
    """A moto process and the proxy in front of it, until the exit of the context."""

    def __enter__(self) -> S3Server:
        self._backend = ("127.0.0.1", free_port())
        host, port = self._backend
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._faults: Iterator[Fault | None] = iter(())
        self._matches: Callable[[str, str], bool] = _any
        self._lock = threading.Lock()
        # S3 compares and writes in one step, and a reader of an object that is replaced
        # gets the old one or the new: moto does neither.
        self.one_at_a_time = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self._await_backend()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.kill()
        self._process.wait()

    def bucket(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """URL of a new, empty bucket, and the environment in which it is found; no
        faults, and no requests noted.
        """
        name = f"b{uuid.uuid4().hex}"
        answer, _ = self.forward("PUT", f"/{name}", {}, b"")
        assert answer.status == 200
        for key, value in self.environment.items():
            monkeypatch.setenv(key, value)
        for key in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(key, raising=False)
        # fsspec keeps clients of a server that an earlier test had, under equal words.
        S3FileSystem.clear_instance_cache()
        self.inject(())
        self.requests.clear()
        return f"s3://{name}"

    def put(self, url: str, data: bytes) -> None:
        """Write an object behind the proxy's back, as another process would."""
        path = f"/{url.removeprefix('s3://')}"
        answer, body = self.forward("PUT", path, _SIGNED, data)
        assert answer.status == 200, body

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def inject(
        self,
        faults: Iterable[Fault | None],
        matches: Callable[[str, str], bool] | None = None,
    ) -> None:
        """Spoil the next requests for which `matches(method, path)`, each by the next
        of `faults` (None: not this one); `itertools.cycle` for all to come.
        """
        with self._lock:
            self._faults = iter(faults)
            self._matches = matches or _any

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request that came in."""
        with self._lock:
            self.requests.append((method, path))
            return next(self._faults, None) if self._matches(method, path) else None

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """moto's own answer."""
        connection = http.client.HTTPConnection(*self._backend, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def _await_backend(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(self._backend, timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, "moto did not start"
                assert time.monotonic() < deadline, "moto does not listen"
                time.sleep(0.05)


def _handler(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            try:
                body = self._body()
            except EOFError:
                # Whoever was killed while it sent has stored nothing.
                self.close_connection = True
                return
            fault = server.fault(self.command, self.path)
            if fault and fault.kind == "slow":
                time.sleep(fault.seconds)
            if fault and fault.until:
                fault.until.wait(60)
            if fault and fault.kind == "drop":
                self.close_connection = True
            elif fault and fault.kind == "status":
                code = _CODES.get(fault.status, "Spoilt")
                self._send(fault.status, [], _ERROR.format(code=code).encode(), None)
            else:
                self._forward(body, fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self._exactly(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := self._chunk_size():
                parts.append(self._exactly(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _chunk_size(self) -> int:
            line = self.rfile.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            return int(line.split(b";")[0], 16)

        def _exactly(self, size: int) -> bytes:
            data = self.rfile.read(size)
            if len(data) < size:
                raise EOFError
            return data

        def _forward(self, body: bytes, fault: Fault | None) -> None:
            headers = {
                key: value
                for key, value in self.headers.items()
                if key.lower() not in _HOP_BY_HOP
            }
            with server.one_at_a_time:
                answer, data = server.forward(self.command, self.path, headers, body)
            if fault and fault.kind == "lose":
                self.close_connection = True
                return
            self._send(answer.status, answer.getheaders(), data, fault)

        def _send(
            self,
            code: int,
            headers: Iterable[tuple[str, str]],
            data: bytes,
            fault: Fault | None,
        ) -> None:
            self.send_response_only(code)
            length = str(len(data))
            for key, value in headers:
                if key.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif key.lower() not in _HOP_BY_HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault and fault.kind == "truncate":
                data, self.close_connection = data[: len(data) // 2], True
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Tests look at `S3Server.requests` instead."""

    return Handler


def _any(method: str, path: str) -> bool:
    return True
