"""The files of a corpus: found below a path, a glob or a URL, and laid end to end.

Owns finding files, none of them by a link out of the folder, and fingerprints of their
content. Does not own which format they
have (`pipeline.sources.detect`), what is in them (the modules of the formats) or how
storage is reached (`pipeline.storage`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.storage import file_size, list_files, open_file
from pipeline.storage_local import local_path

# Larger files than all pieces together are told apart by these.
_PIECES = 64
_READ = 1 << 20
_THREADS = 8

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of a corpus, not yet opened."""

    url: str
    name: str
    """Relative to the folder that all files of the corpus share."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a corpus."""

    url: str
    name: str
    """As `Found.name`."""
    start: int
    """Cursor of what stands first in the file."""
    stop: int
    """Cursor past what stands last in the file."""


def laid_end_to_end(found: Iterable[tuple[Found, int]]) -> tuple[InputFile, ...]:
    """Files and their rows or bytes, each starting where the one before ends."""
    files, start = [], 0
    for file, extent in found:
        stop = start + extent
        files.append(InputFile(url=file.url, name=file.name, start=start, stop=stop))
        start = stop
    return tuple(files)


def overlapping(
    files: Sequence[InputFile], start: int, stop: int
) -> Iterator[InputFile]:
    """The files that have something in [start, stop)."""
    return (file for file in files if file.start < stop and start < file.stop)


def find(path: str) -> Iterator[str]:
    """Files at a path, URL or glob, and at any depth below a folder, in no order.
    Hidden ones are left out below folders, and links to folders are not followed.
    """
    local = local_path(path)
    if local is None or not local.is_dir():
        below = path.rpartition("://")[2].rstrip("/") + "/"
        for url in list_files(path):
            _, inside, name = url.partition(below)
            if not (inside and ("/" + name).count("/.")):
                yield url
        return
    for folder, folders, names in os.walk(local):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            os.path.join(folder, name) for name in names if not name.startswith(".")
        )


def refuse_links_out(path: str, urls: Iterable[str]) -> None:
    """Raise ValueError where a local file, found below the folder `path` or by the glob
    `path`, is really elsewhere: whoever packed a corpus does not choose what is read of
    the machine. A file that the user named himself may be a link.
    """
    local = local_path(path)
    if local is None or (local.exists() and not local.is_dir()):
        return
    while glob.has_magic(str(local)) and not local.is_dir():
        local = local.parent
    root = os.path.realpath(local)
    for url in urls:
        if os.path.commonpath([root, os.path.realpath(url)]) != root:
            raise ValueError(
                f"{url} is a link that leads out of {local}; put a copy in its place, "
                "or give the file itself as an input"
            )


def named(urls: Sequence[str]) -> tuple[str, list[Found]]:
    """The deepest folder that all files lie in, and the files sorted by their name."""
    urls = sorted(urls)
    folders = [posixpath.dirname(url).split("/") for url in (urls[0], urls[-1])]
    shared = 0
    for one, other in zip(*folders, strict=False):
        if one != other:
            break
        shared += 1
    folder = "/".join(folders[0][:shared])
    return folder or "/", [Found(url=url, name=url[len(folder) + 1 :]) for url in urls]


def sizes(found: Sequence[Found]) -> list[int]:
    """Bytes of each file."""
    return in_threads(lambda file: file_size(file.url), found)


def in_threads(
    call: Callable[[Given], Result], arguments: Sequence[Given]
) -> list[Result]:
    """`call` for each argument, in order: remote storage answers several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, arguments))


def content_fingerprint(file: InputFile) -> dict[str, Any]:
    """Name, size and sha256 of a file whose stop minus start are its bytes."""
    with open_file(file.url) as opened:
        digest = hashlib.sha256()
        while data := opened.read(_READ):
            digest.update(data)
    size = file.stop - file.start
    return {"file": file.name, "bytes": size, "sha256": digest.hexdigest()}


def sampled_fingerprint(file: InputFile) -> dict[str, Any]:
    """As `content_fingerprint`, of pieces spread evenly over a large file: reading all
    tars of a large corpus once more would take as long as making shards of it.
    """
    size = file.stop - file.start
    if size <= _PIECES * _READ:
        return content_fingerprint(file)
    digest = hashlib.sha256()
    with open_file(file.url) as opened:
        for piece in range(_PIECES):
            opened.seek(piece * (size - _READ) // (_PIECES - 1))
            digest.update(opened.read(_READ))
    return {"file": file.name, "bytes": size, "sha256_of_pieces": digest.hexdigest()}
