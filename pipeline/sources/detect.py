"""Which format a corpus has, by its content, and which files of a folder belong to it.

Owns the magic numbers, the choice between several kinds of files in one folder, what
images are called, and what cannot be read with its cure. Does not own opening
(`pipeline.sources`).
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Mapping, Set

from pipeline.sources.fields import parse_object
from pipeline.sources.files import find, refuse_links_out
from pipeline.storage import open_file
from pipeline.storage_local import local_path

SUFFIXES = {
    "parquet": "parquet",
    "arrow": "arrow",
    "tar": "webdataset",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "tsv": "tsv",
    "csv": "csv",
}
# What images are called; nothing else in a folder or a tar is read as one.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_KINDS = ("webdataset", "parquet", "arrow", "jsonl", "tsv", "csv")
_HEAD = 1 << 16
_NULS_PER = 10
_USTAR = slice(257, 262)
_REFUSED = {
    b"\x1f\x8b": "it is compressed; unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "it is compressed; unpack it first (unzstd)",
    b"BZh": "it is compressed; unpack it first (bunzip2)",
    b"\xfd7zXZ": "it is compressed; unpack it first (unxz)",
    b"PK\x03\x04": "it is a zip archive; unpack it and give the folder",
    b"PARE": "its footer is encrypted; write it without encryption",
    b"\xff\xfe": "it is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "it is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xff\xd8\xff": "it is a single image; give the folder that it lies in",
    b"\x89PNG": "it is a single image; give the folder that it lies in",
}
_COCO_KEYS = (b'"images"', b'"annotations"', b'"info"', b'"licenses"')


def choose(path: str, kind: str | None) -> tuple[str, list[str]]:
    """The format of the corpus at a path, URL or glob, and its files; for a folder of
    images no files, because there may be too many to hold.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: nothing that can be read, several kinds of files, or a link out of
            the folder.
    """
    found = find(path)
    first = next(found, None)
    if first is None:
        local = local_path(path)
        if local is not None and local.is_dir():
            raise ValueError("it is a folder without files")
        if local is not None and local.exists():
            raise ValueError("it is no regular file; save it as one")
        raise FileNotFoundError(path)
    if _is_folder(path, first):
        kind, urls = _of_folder(kind, itertools.chain([first], found))
        refuse_links_out(path, urls)
        return kind, urls
    urls = [first, *found]
    refuse_links_out(path, urls)
    return kind or content_kind(urls[0], suffix(urls[0])), urls


def image_members(names: Iterable[str]) -> list[str]:
    """Which members of a tar's sample are images, by what follows the key in their
    names: `jpg` of `0001.jpg`, and `photo.jpg` of `0001.photo.jpg` only where there is
    no plain one.
    """
    names = list(names)
    plain = [ending for ending in IMAGE_SUFFIXES if ending in names]
    return plain or [n for n in names if n.rpartition(".")[2] in IMAGE_SUFFIXES]


def suffix(url: str) -> str:
    """What follows the last dot of a file's name, in lower case."""
    return posixpath.splitext(url)[1][1:].lower()


def _is_folder(path: str, first: str) -> bool:
    """Whether `first` was found below `path` rather than at it or matching it."""
    local = local_path(path)
    if local is not None:
        return local.is_dir()
    if any(character in path for character in "*?["):
        return False
    return first.rpartition("://")[2] != path.rpartition("://")[2]


def _is_regular(url: str) -> bool:
    """Whether reading comes to an end: a pipe or a device may have none."""
    local = local_path(url)
    return local is None or local.is_file()


def _of_folder(kind: str | None, urls: Iterable[str]) -> tuple[str, list[str]]:
    by_kind: dict[str, list[str]] = {}
    folders: set[str] = set()
    for url in urls:
        ending = suffix(url)
        if ending in SUFFIXES and _is_regular(url):
            by_kind.setdefault(SUFFIXES[ending], []).append(url)
        if ending in IMAGE_SUFFIXES:
            folders.add(posixpath.dirname(url))
    if kind == "coco":
        raise ValueError(
            "it is a folder; give the annotations' JSON file, and the "
            "folder of the images as --images"
        )
    kind = kind or _best(by_kind, folders)
    if kind == "folder":
        if folders:
            return kind, []
        raise ValueError("it is a folder without images")
    if kind not in by_kind:
        endings = [f"*.{each}" for each, its in SUFFIXES.items() if its == kind]
        raise ValueError(
            f"it is a folder without {' or '.join(endings)} files; name "
            "the files with a glob, or give another --format"
        )
    return kind, by_kind[kind]


def _best(by_kind: Mapping[str, list[str]], folders: Set[str]) -> str:
    """What the folder is, some of whose `folders` hold images. Images may stand beside
    tables, which name them, and img2dataset's tables beside what they tell of; any
    other mixture would leave a part of the corpus out unsaid.
    """
    kinds = [kind for kind in _KINDS if kind in by_kind]
    tables = {posixpath.splitext(url)[0] for url in by_kind.get("parquet", [])}
    tars = {posixpath.splitext(url)[0] for url in by_kind.get("webdataset", [])}
    if tables & tars:
        kinds.remove("parquet")
    elif tables & folders:
        # `00000/` beside `00000.parquet`: what img2dataset writes as `files`.
        kinds[kinds.index("parquet")] = "folder"
    if len(kinds) > 1:
        raise ValueError(_ambiguous(*kinds))
    if kinds:
        return kinds[0]
    if folders:
        return "folder"
    raise ValueError(
        "it is a folder without tables (*.parquet, *.arrow, *.tsv, *.csv, "
        "*.jsonl), *.tar files or images"
    )


def _ambiguous(*kinds: str) -> str:
    return (
        f"it has files of several formats; say which are the corpus with "
        f"--format {' or '.join(kinds)}, or name the files"
    )


def content_kind(url: str, ending: str) -> str:
    """The format of a file, by its first bytes; its suffix decides what they leave
    open.

    Raises:
        ValueError: none of the formats, with the cure.
    """
    with open_file(url) as file:
        head = file.read(_HEAD)
    for magic, reason in _REFUSED.items():
        if head.startswith(magic):
            raise ValueError(reason)
    if head.startswith(b"PAR1") or ending == "parquet":
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or ending == "arrow":
        return "arrow"
    if head[_USTAR] == b"ustar" or ending == "tar":
        return "webdataset"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return _json_kind(text, ending)
    if text.startswith(b"[") and ending in ("json", "jsonl", "ndjson"):
        raise ValueError(
            "it is one JSON array; write an object a line instead (jq -c '.[]')"
        )
    if ending in ("jsonl", "ndjson"):
        return "jsonl"
    # A table may have one in a cell; other files, UTF-16 among them, have many.
    separated = ending in ("tsv", "csv")
    if head.count(b"\0") > (len(head) // _NULS_PER if separated else 0):
        raise ValueError("it is none of the formats that can be read; see --format")
    return _separated_kind(text, ending)


def _json_kind(text: bytes, ending: str) -> str:
    line, end, _ = text.partition(b"\n")
    row = parse_object(line)
    if row is not None:
        return "coco" if row.keys() >= {"images", "annotations"} else "jsonl"
    # Longer than what was read, torn, or a document over several lines.
    known = any(key in text for key in _COCO_KEYS)
    whole = not end or not line.strip(b"{ \t\r")
    if ending in ("jsonl", "ndjson") or not (known or whole or ending == "json"):
        return "jsonl"
    return "coco"


def _separated_kind(text: bytes, ending: str) -> str:
    header = text.partition(b"\n")[0]
    tabs, commas = header.count(b"\t"), header.count(b",")
    if ending in ("tsv", "csv") and (bool(tabs) == bool(commas)):
        return ending
    if tabs or commas:
        return "tsv" if tabs >= commas else "csv"
    raise ValueError(
        "its first line has neither tabs nor commas between column names; give "
        "--format (tsv, csv, jsonl, ...)"
    )
