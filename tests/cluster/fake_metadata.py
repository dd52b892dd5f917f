"""The metadata services of AWS and Google Cloud on loopback, as their documents say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ACTION = '{"action": "terminate", "time": "2035-01-02T03:04:05Z"}'
ACTION_MS = 2051319845000


class Metadata(ThreadingHTTPServer):
    """`noticed`: the machine will be taken. The first `broken` answers are errors."""

    daemon_threads = True

    def __init__(self, *, noticed: bool, broken: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.noticed = noticed
        self.broken = broken
        self.tokens = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        if self.server.broken > 0:
            self.server.broken -= 1
            return self._answer(503, "")
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        if self.path != "/latest/api/token":
            return self._answer(404, "")
        if not lifetime:
            return self._answer(400, "")
        self.server.tokens += 1
        return self._answer(200, f"token-{self.server.tokens}")

    def do_GET(self) -> None:
        if self.path == "/computeMetadata/v1/instance/preempted":
            if self.headers.get("Metadata-Flavor") != "Google":
                return self._answer(403, "")
            return self._answer(200, "TRUE" if self.server.noticed else "FALSE")
        if self.path != "/latest/meta-data/spot/instance-action":
            return self._answer(404, "")
        token = self.headers.get("X-aws-ec2-metadata-token")
        if not self.server.tokens or token != f"token-{self.server.tokens}":
            return self._answer(401, "")
        return self._answer(*((200, ACTION) if self.server.noticed else (404, "")))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests look at what was answered."""


@contextlib.contextmanager
def metadata(*, noticed: bool, broken: int = 0) -> Iterator[Metadata]:
    """A running service, ended with the block."""
    server = Metadata(noticed=noticed, broken=broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
