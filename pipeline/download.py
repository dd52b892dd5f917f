"""Images from the web: one http or https URL in, the bytes of its answer out.

Owns requests: limits of time, size and number, retries, redirects, opt-out headers,
and the reason of every failure. Does not own which addresses may be connected to
(`pipeline.addresses`), the order of results (`pipeline.lookahead`) or other places that
images come from (`pipeline.fetch`, which imports this module late: aiohttp is heavy).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import aiohttp
import aiohttp.abc
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from pipeline.addresses import WEB_SCHEMES, AddressRefused, Network
from pipeline.answers import Inflater, asks_again, next_hop, opted_out, pause_asked_for
from pipeline.images import ImageError
from pipeline.lookahead import NoRoom, Share, bare
from pipeline.options import FetchOptions

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_GOOD = (200, 203)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0
_KEEP_ALIVE_S = 5.0
_NO_SUCH_HOST = (socket.EAI_NONAME, socket.EAI_NODATA)
# Errors of this machine, which would be counted against every image.
_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# What exceptions mean, the first that fits: reason, detail, whether it may pass.
_MEANINGS: tuple[tuple[Any, str, str, bool], ...] = (
    (aiohttp.InvalidURL, "address_refused", "an unusual way to write one", False),
    (TimeoutError, "timeout", "no answer within the time limit", True),
    (aiohttp.ClientConnectorDNSError, "dns", "the host does not resolve", True),
    (aiohttp.ClientSSLError, "tls", "no sound certificate or no TLS", False),
    (aiohttp.ClientPayloadError, "truncated", "the body ends early", True),
    # Bytes that the answer before should not have had may stand before it, too.
    (aiohttp.ClientResponseError, "bad_answer", "it does not keep to HTTP", True),
    ((aiohttp.ClientError, OSError), "connection", "refused, reset or dropped", True),
    (ValueError, "bad_url", "no request can be made of it", False),
    (Exception, "bad_answer", "it does not keep to HTTP", False),
)


class _Again(Exception):
    """A failure that may pass by itself."""

    def __init__(self, error: ImageError, pause_s: float = 0.0) -> None:
        super().__init__(error.reason)
        self.error = error
        self.pause_s = pause_s


class _Clock:
    """Seconds that one image has left. Waiting for its turn takes none of them, or
    what can be fetched would depend on how many others there are.
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(max(self.left, 0.0)):
                yield
        finally:
            self.left -= loop.time() - began


class Downloader:
    """Fetches URLs in a thread of its own. Close it: it holds sockets and threads.

    Args:
        options: limits, retries, and what servers are told and asked.
        max_bytes: longer answers fail as `too_large`.
        network: hosts that may be connected to.

    Raises:
        ValueError: a user agent that no header can hold.
    """

    def __init__(
        self, options: FetchOptions, *, max_bytes: int, network: Network
    ) -> None:
        _check_agent(options.user_agent)
        self.retried: Counter[str] = Counter()
        self._options = options
        self._max_bytes = max_bytes
        self._network = network
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(options.concurrency)
        self._lookups = ThreadPoolExecutor(options.concurrency, "palimpsest-dns")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="palimpsest-fetch", daemon=True
        )
        self._thread.start()
        self._session = self._wait(self._open())

    def start(self, url: str, share: Share) -> Future[bytes]:
        """Begin to fetch a URL. The future raises ImageError, or NoRoom of `share`."""
        return asyncio.run_coroutine_threadsafe(self._fetch(url, share), self._loop)

    def close(self) -> None:
        """Give up what is under way; no thread or socket is left."""
        if self._loop.is_closed():
            return
        self._wait(self._shut())
        self._lookups.shutdown(cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        connector = _Connector(
            limit=0,
            resolver=_Resolver(self._network, self._lookups, self._options.timeout_s),
            ssl=ssl.create_default_context(),
            socket_factory=self._socket,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        limit = self._options.timeout_s
        return aiohttp.ClientSession(
            connector=connector,
            # Encoded answers are decoded here, within the size limit.
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": self._options.user_agent,
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=limit, sock_read=limit
            ),
        )

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def _socket(self, address: Any) -> socket.socket:
        """A socket for one address. The last place to refuse it: what is checked here
        is what gets connected, and literal addresses come here without a look-up.
        """
        family, kind, protocol, _, where = address
        self._network.check(where[0])
        return socket.socket(family, kind, protocol)

    async def _fetch(self, url: str, share: Share) -> bytes:
        try:
            return await self._tries(url, share)
        except (ImageError, NoRoom) as error:
            share.drop()
            raise bare(error) from None

    async def _tries(self, url: str, share: Share) -> bytes:
        clock = _Clock(self._options.total_timeout_s)
        longest = _FIRST_PAUSE_S
        for left in reversed(range(self._options.retries + 1)):
            try:
                return await self._try(url, clock, share)
            except _Again as again:
                error, asked = bare(again.error), again.pause_s
            share.drop()
            # Full jitter: images that failed together must not come back together.
            pause = max(asked, random.uniform(0, longest))
            if not left or pause >= clock.left:
                raise error
            self.retried[error.reason] += 1
            clock.left -= pause
            await asyncio.sleep(pause)
            longest = min(2 * longest, _LONGEST_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    async def _try(self, url: str, clock: _Clock, share: Share) -> bytes:
        """One try, redirects followed one by one: every hop is looked at anew."""
        hop = _checked_url(url)
        for _ in range(_MAX_REDIRECTS + 1):
            host = hop.host or ""
            slot = self._hosts.setdefault(
                host, asyncio.Semaphore(self._options.per_host)
            )
            # The host first: who waits for a slow host must not keep others waiting.
            async with slot, self._slots:
                try:
                    async with clock.running():
                        answer = await self._exchange(hop, share)
                except (ImageError, NoRoom, _Again, MemoryError):
                    raise
                except Exception as error:  # as many kinds as servers and libraries
                    raise _failure(error) from error
            if isinstance(answer, bytes):
                return answer
            hop = _checked_url(answer)
        raise ImageError("too_many_redirects", f"more than {_MAX_REDIRECTS}")

    async def _exchange(self, url: URL, share: Share) -> bytes | str:
        """The answer's body, or the URL that it redirects to."""
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS and "Location" in answer.headers:
                return next_hop(url, answer.headers["Location"])
            if answer.status not in _GOOD:
                raise _refusal(answer)
            tags = answer.headers.getall("X-Robots-Tag", [])
            agent, refused = self._options.user_agent, self._options.refused_tags
            if tag := opted_out(tags, agent=agent, refused=refused):
                raise ImageError("opted_out", f"X-Robots-Tag: {tag}")
            return await self._body(answer, share)

    async def _body(self, answer: aiohttp.ClientResponse, share: Share) -> bytes:
        inflater = Inflater(answer.headers.get("Content-Encoding", ""))
        if (answer.content_length or 0) > self._max_bytes:
            raise ImageError("too_large", f"more than {self._max_bytes} bytes")
        body = bytearray()
        async for piece in answer.content.iter_any():
            plain = inflater.add(piece, self._max_bytes + 1 - len(body))
            share.take(len(plain))
            body += plain
            if len(body) > self._max_bytes:
                raise ImageError("too_large", f"more than {self._max_bytes} bytes")
        if not inflater.finished:
            raise _Again(ImageError("truncated", "the encoded body ends early"))
        return bytes(body)


class _Connector(aiohttp.TCPConnector):
    """Connections of `_Answers`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # aiohttp offers no other way to choose it.
        answers: Any = functools.partial(_Answers, loop=self._loop)
        self._factory = answers


class _Answers(ResponseHandler):
    """Reads an answer whose body is followed by more than it should be. The parser
    raises for that, and then gives nothing of what came with it: whether the headers
    did is chance, so they are given to it alone.
    """

    _END = b"\r\n\r\n"
    _before = b""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what has come."""
        seen = self._before + data
        place = seen.find(self._END)
        head = max(place + len(self._END) - len(self._before), 0) if place >= 0 else 0
        self._before = seen[-len(self._END) + 1 :]
        if 0 < head < len(data):
            super().data_received(data[:head])
            data = data[head:]
        super().data_received(data)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        """Called when the parser has raised: whoever reads a body that is not all there
        would wait for the rest.
        """
        super().set_exception(exc, *cause)
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(exc, *cause)


class _Resolver(aiohttp.abc.AbstractResolver):
    """Looks hosts up once for each connection, and gives only checked addresses."""

    def __init__(
        self, network: Network, pool: ThreadPoolExecutor, limit_s: float
    ) -> None:
        self._network = network
        self._pool = pool
        self._limit_s = limit_s

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        look_up = asyncio.get_running_loop().run_in_executor(
            self._pool, self._network.addresses, host, port
        )
        addresses = await asyncio.wait_for(look_up, self._limit_s)
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": socket.IPPROTO_TCP,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        """The pool is the downloader's."""


def _check_agent(name: str) -> None:
    if not name.strip() or not name.isascii() or not name.isprintable():
        raise ValueError(
            f"--fetch.user_agent {name!r} must be printable ASCII, such as "
            "'palimpsest (+https://example.com/about)'"
        )


def _checked_url(text: str) -> URL:
    try:
        url = URL(text.strip())
        host, port = url.host, url.port
    except Exception as error:  # the parser raises anything on hostile text
        raise ImageError("bad_url", "it cannot be read as a URL") from error
    if url.scheme not in WEB_SCHEMES or not host or not port:
        raise ImageError("bad_url", "not http:// or https:// and a host")
    if any(character.isspace() for character in host):
        raise ImageError("bad_url", "its host has a space in it")
    if url.user is not None or url.password is not None:
        raise ImageError("bad_url", "it has a user name or password in it")
    return url


def _refusal(answer: aiohttp.ClientResponse) -> ImageError | _Again:
    error = ImageError(f"http_{answer.status}", f"the server answered {answer.status}")
    if asks_again(answer.status):
        return _Again(error, pause_asked_for(answer.headers.get("Retry-After", "")))
    return error


def _failure(error: Exception) -> Exception:
    """What an exception of the network means: an ImageError, `_Again` with one, or
    itself where the fault is this machine's. Details have no addresses, ports or times
    in them, which no two runs share.
    """
    cause = getattr(error, "os_error", error)
    code = cause.errno if isinstance(cause, OSError) else None
    if isinstance(cause, AddressRefused):
        return ImageError("address_refused", str(cause))
    if code in _OWN_FAULTS:
        return _own_fault(cause)
    _, reason, detail, passes = next(
        meaning for meaning in _MEANINGS if isinstance(error, meaning[0])
    )
    found = ImageError(reason, detail)
    return _Again(found) if passes and code not in _NO_SUCH_HOST else found


def _own_fault(error: Exception) -> OSError:
    return OSError(
        f"no connection can be opened ({error}): this is the machine's limit, not the "
        "image's fault; lower --fetch.concurrency or raise `ulimit -n`, and the same "
        "command continues"
    )
