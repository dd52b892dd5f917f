"""A real HTTP server on loopback that answers as badly as it is told to."""

from __future__ import annotations

import socketserver
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

# Written until whoever reads hangs up.
_ENDLESS = b"x" * 65_536


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    """Content-Length to claim; default the body's, -1 for none."""
    pause_s: float = 0.0
    """Wait before answering."""
    until_hits: int = 0
    """Wait until this many requests have come."""
    drip_s: float = 0.0
    """Wait before each byte of the body."""
    endless: bool = False
    """Go on after the body for ever."""
    drop: bool = False
    """Hang up without an answer."""
    after: bytes = b""
    """Sent behind the body, by itself, on a connection that stays open."""
    raw: bytes | None = None
    """Send these bytes instead."""


class WebServer:
    """Answers each path with its replies in turn, the last of them for ever after; 404
    for paths without any. A context manager.
    """

    def __init__(
        self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.hits: Counter[str] = Counter()
        self.headers: dict[str, Mapping[str, str]] = {}
        self.most_at_once = 0
        self.stopped = threading.Event()
        self.lock = threading.Condition()
        self._at_once = 0
        self._server = _Server((host, 0), _Handler)
        self._server.web = self
        if tls:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._scheme = "https" if tls else "http"
        self.host, self.port = self._server.server_address[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}
        )

    def url(self, path: str, host: str | None = None) -> str:
        """URL of a path, by this or another name of the host."""
        return f"{self._scheme}://{host or self.host}:{self.port}{path}"

    def serve(self, path: str, *replies: Reply) -> str:
        """Answer a path with these; returns its URL."""
        self.replies[path] = list(replies)
        return self.url(path)

    def begin(self, path: str, headers: Mapping[str, str]) -> Reply:
        """Count a request, and say what to answer."""
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.hits[path] += 1
            self.lock.notify_all()
            self.headers[path] = headers
            replies = self.replies.get(path) or [Reply(status=404)]
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def wait_for_hits(self, number: int) -> None:
        """Return once so many requests have come, or the server stops."""
        with self.lock:
            self.lock.wait_for(
                lambda: self.hits.total() >= number or self.stopped.is_set()
            )

    def end(self) -> None:
        """Count the end of an answer."""
        with self.lock:
            self._at_once -= 1

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.stopped.set()
            self.lock.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256
    web: WebServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer and its body leave together.
    wbufsize = 65_536
    server: _Server

    def do_GET(self) -> None:
        web = self.server.web
        reply = web.begin(self.path, self.headers)
        try:
            self._answer(reply)
        except OSError:
            self.close_connection = True
        finally:
            web.end()

    def _answer(self, reply: Reply) -> None:
        stopped = self.server.web.stopped
        if reply.pause_s:
            stopped.wait(reply.pause_s)
        self.server.web.wait_for_hits(reply.until_hits)
        if reply.drop or reply.raw is not None:
            self.close_connection = True
            self.wfile.write(reply.raw or b"")
            return
        self.send_response(reply.status)
        length = len(reply.body) if reply.length is None else reply.length
        if length >= 0 and not reply.endless:
            self.send_header("Content-Length", str(length))
        # Where the length is a lie or missing, only the end of the line ends the body.
        self.close_connection = reply.endless or length != len(reply.body)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._send_body(reply, stopped)

    def _send_body(self, reply: Reply, stopped: threading.Event) -> None:
        if reply.drip_s:
            for byte in reply.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if stopped.wait(reply.drip_s):
                    return
        else:
            self.wfile.write(reply.body)
        if reply.after:
            self.wfile.flush()
            self.wfile.write(reply.after)
        while reply.endless and not stopped.is_set():
            self.wfile.write(_ENDLESS)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `hits`."""
