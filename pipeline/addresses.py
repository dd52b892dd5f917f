"""Which places an untrusted corpus may name: folders, URL prefixes, hosts.

Owns containment of paths and URLs in the input's own folder and `fetch.allow`, and
which IP addresses may be connected to. Does not own reading (`pipeline.fetch`) or
connecting (`pipeline.download`), which ask here first.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.images import ImageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
# A URL that is itself the image: `data:image/png;base64,...`.
_INLINE = re.compile(r"data:([a-z]+/[\w.+-]+)?(;[\w.+-]+(=[^;,]*)?)*,", re.IGNORECASE)
_LOCAL_SCHEMES = ("file", "local")
# RFC 8089 allows a file URL to have no host.
_SHORT_FILE_URL = re.compile(r"^file:/(?!/)", re.IGNORECASE)
WEB_SCHEMES = ("http", "https")
# Dots, slashes and backslashes that are percent-encoded, however many times over.
_ENCODED = re.compile(r"%(?:25)*(2e|2f|5c)", re.IGNORECASE)
# The longest key of an S3 object; local paths are checked by the file system.
_MAX_KEY_BYTES = 1024
_KNOWN_FOLDERS = 10_000

# Everything that IANA lists as not globally reachable, and what reaches into the
# machine or its cloud by other ways. A table of our own: Python's changes with its
# patch versions, and would change which inputs fail.
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8"),
        *("169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/3"),
        # Azure's agent and name server: a public address that only its hosts reach.
        "168.63.129.16/32",
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
# Protocol assignments with Teredo, documentation, 6to4.
_REFUSED_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
# Networks without IPv4 reach all of it through this prefix, so what counts is the
# address inside.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address, as resolved, is one of the public internet's.

    IPv4 addresses inside of IPv6 ones (mapped, 6to4, Teredo) never are: no host needs
    them, and they are a way round.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in network for network in _REFUSED_V4)
    if found.scope_id is not None:
        return False
    if found in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)))
    return found in _GLOBAL_V6 and not any(found in each for each in _REFUSED_V6)


class AddressRefused(OSError):
    """A host that must not be connected to."""


def system_addresses(host: str, port: int) -> list[str]:
    """IP addresses of a host as the system resolves it; blocks. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # also UnicodeError: labels that are too long
        raise socket.gaierror(socket.EAI_NONAME, "no name of a host") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which hosts may be connected to, by the addresses that they resolve to."""

    allow_private: bool = False
    resolve: Callable[[str, int], list[str]] = system_addresses
    """IP addresses of (host, port)."""
    public: Callable[[str], bool] = is_public
    """Whether an IP address may be connected to."""

    def addresses(self, host: str, port: int) -> list[str]:
        """Addresses of a host, all of them allowed; blocks.

        Raises:
            AddressRefused: one of them is not: such a host is never an image's.
            OSError: it does not resolve.
        """
        found = self.resolve(host, port)
        for address in found:
            self.check(address)
        return found

    def check(self, address: str) -> None:
        """Raises AddressRefused unless this address may be connected to."""
        if not self.allow_private and not self.public(address):
            raise AddressRefused("not a public address (--fetch.allow_private)")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an image lies. One of the three is given."""

    path: str | None = None
    """Local file, links resolved."""
    url: str | None = None
    """URL of a file that fsspec reads."""
    web: str | None = None
    """http or https URL, not yet looked at."""


class Places:
    """What the cells of one corpus may name.

    Args:
        base: local folder or URL that relative paths are relative to; always allowed.
        allow: further folders and URL prefixes.

    Raises:
        ValueError: a prefix that is neither an absolute path nor a URL.
    """

    def __init__(self, *, base: str, allow: Sequence[str] = ()) -> None:
        for prefix in allow:
            _check_prefix(prefix)
        self._base = _without_slash(base or ".")
        self._folder = _local_path(self._base)
        self._folders: list[str] = []
        self._roots: list[str] = []
        # Real paths of folders below an allowed one: images of a corpus share theirs.
        self._known: dict[str, str] = {}
        for place in (self._base, *map(_without_slash, allow)):
            if folder := _local_path(place):
                self._folders.append(os.path.realpath(folder))
            else:
                self._roots.append(place)

    def locate(self, cell: str) -> Place:
        """The place that a cell names: a path relative to the base, an absolute path,
        or a URL.

        Raises:
            ImageError: `missing_file` (no such name can be), `path_outside_input`,
                `bad_url` (of the image itself).
        """
        # Names of files may begin and end with spaces, URLs do not.
        if _scheme(bare := _SHORT_FILE_URL.sub("file:///", cell.strip())):
            cell = bare
        scheme = _scheme(cell)
        if scheme in WEB_SCHEMES:
            return Place(web=cell)
        if _INLINE.match(cell):
            raise ImageError("bad_url", "the image stands in it; store it as bytes")
        _check_text(cell)
        if scheme and scheme not in _LOCAL_SCHEMES:
            return self._remote(cell, cell)
        if scheme is None and self._folder is None and not cell.startswith("/"):
            return self._remote(f"{self._base}/{cell}", cell)
        return self._local(cell)

    def _local(self, cell: str) -> Place:
        name = _local_path(cell)
        if name is None:
            raise ImageError("path_outside_input", cell)
        _check_text(name)
        # An absolute path stands for itself; a URL as base has no folder to join.
        path = os.path.join(self._folder or "/", name)
        folder, file = os.path.split(path)
        known = self._known.get(folder)
        if known is not None and file not in ("", ".", ".."):
            direct = f"{known}/{file}"
            if not os.path.islink(direct):
                return Place(path=direct)
        path = os.path.realpath(path)
        if not self._allows(path):
            raise ImageError("path_outside_input", cell)
        if known is None:
            self._learn(folder)
        return Place(path=path)

    def _allows(self, path: str) -> bool:
        return any(os.path.commonpath([root, path]) == root for root in self._folders)

    def _learn(self, folder: str) -> None:
        real = os.path.realpath(folder)
        if not self._allows(real):
            return
        if len(self._known) == _KNOWN_FOLDERS:
            self._known.clear()
        self._known[folder] = real

    def _remote(self, url: str, cell: str) -> Place:
        if not self._contains(url):
            raise ImageError("path_outside_input", cell)
        if _scheme(url) in WEB_SCHEMES:
            return Place(web=url)
        scheme, *parts = _components(url) or [""]
        key = "/".join(parts)
        if len(key.encode()) > _MAX_KEY_BYTES:
            raise ImageError("missing_file", f"{cell[:100]}...: the name is too long")
        return Place(url=f"{scheme}://{key}")

    def _contains(self, url: str) -> bool:
        """Whether a URL lies under an allowed one, as it stands and as servers may read
        it: some decode it, some take several slashes for one.
        """
        # fsspec reads `::` as a chain of file systems, each with a place of its own.
        if "::" in url and _scheme(url) not in WEB_SCHEMES:
            return False
        return any(
            _below(_components(url), _components(root))
            and _below(_components(_read(url)), _components(_read(root)))
            for root in self._roots
        )


def _below(parts: list[str] | None, root: list[str] | None) -> bool:
    return parts is not None and root is not None and parts[: len(root)] == root


def _read(url: str) -> str:
    """A URL as the server that decodes the most would read it."""
    scheme, colon, rest = url.partition("://")
    rest = _ENCODED.sub(lambda found: _plain(found[1]), rest).replace("\\", "/")
    return scheme + colon + re.sub("/+", "/", rest)


def _plain(code: str) -> str:
    return "." if code.lower() == "2e" else "/"


def _scheme(text: str) -> str | None:
    found = _SCHEME.match(text)
    return found[1].lower() if found else None


def _without_slash(place: str) -> str:
    """A prefix without slashes at its end, other than those of its scheme or root."""
    found = _SCHEME.match(place)
    start = found[0] if found else place[:1]
    return start + place[len(start) :].rstrip("/")


def _components(url: str) -> list[str] | None:
    """Scheme, host or bucket, and the parts of the path with `.` and `..` worked out;
    None where `..` leaves the host.
    """
    parts = [_scheme(url) or ""]
    rest = url.partition("://")[2]
    for part in rest.split("/") if rest else []:
        if part == "..":
            if len(parts) <= 2:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return parts


def _local_path(place: str) -> str | None:
    """The path that a path or file URL names; None for any other URL."""
    scheme = _scheme(place)
    if scheme is None:
        return place
    if scheme not in _LOCAL_SCHEMES:
        return None
    host, slash, path = place.partition("://")[2].partition("/")
    # A host would be another machine's.
    if host not in ("", "localhost"):
        return None
    return urllib.parse.unquote(slash + path) or "/"


def _check_text(cell: str) -> None:
    if "\0" in cell:
        raise ImageError("missing_file", "no path has a null character")
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise ImageError("missing_file", "no path has half a character") from None


def _check_prefix(prefix: str) -> None:
    scheme = _scheme(prefix)
    if scheme in WEB_SCHEMES:
        raise ValueError(
            f"--fetch.allow {prefix}: http and https URLs may be named without it; "
            "private addresses need --fetch.allow_private"
        )
    path = _local_path(prefix)
    if path is not None:
        usable = Path(path).is_absolute()
    else:
        usable = scheme not in _LOCAL_SCHEMES and _components(prefix) is not None
    if not usable:
        raise ValueError(
            f"--fetch.allow {prefix} is neither an absolute folder nor a URL prefix, "
            "such as /data/images or s3://bucket/images"
        )
