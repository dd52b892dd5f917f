"""Corpora of every format that can be read, wherever they lie.

Owns opening one: which format it has, and the errors that name it. Does not own the
formats (the modules of this package), which columns are read (`pipeline.columns`), how
rows become inputs (`pipeline.plan`) or images (`pipeline.fetch`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pyarrow as pa

from pipeline.options import InputOptions
from pipeline.sources.arrow import open_arrow
from pipeline.sources.base import NeedsSpool, Source
from pipeline.sources.coco import open_coco
from pipeline.sources.delimited import SEPARATORS, open_delimited
from pipeline.sources.detect import choose
from pipeline.sources.files import Found, named
from pipeline.sources.folder import open_folder
from pipeline.sources.jsonl import JsonlSource, open_jsonl
from pipeline.sources.parquet import first_line, open_parquet
from pipeline.sources.spool import GroupedSource, grouped
from pipeline.sources.tars import open_tars
from pipeline.storage_local import local_path

__all__ = ["NeedsSpool", "Source", "open_source", "with_captions"]


def open_source(
    given: InputOptions, *, group_by: str | None = None
) -> Source | NeedsSpool:
    """Open a corpus; with `group_by`, one in which rows with one value of that column
    stand side by side.

    Raises:
        ValueError: not there, not of a known format, unreadable, or without rows.
    """
    try:
        kind, urls = choose(given.path, given.format)
        source = _opened(given, kind, urls)
        empty = not isinstance(source, NeedsSpool) and not _has_rows(source)
    except FileNotFoundError as error:
        raise ValueError(f"--input {given.path} does not exist") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"--input {given.path} cannot be read: {reason}") from error
    if empty:
        raise ValueError(f"--input {given.path} has no rows: the corpus is empty")
    return source if group_by is None else grouped(source, group_by)


def with_captions(
    source: Source | NeedsSpool, names: Collection[str]
) -> Source | NeedsSpool:
    """The corpus as it is read where these columns are captions. Formats whose columns
    have types of their own are read as they are.
    """
    if isinstance(source, JsonlSource):
        return source.with_captions(names)
    if isinstance(source, GroupedSource):
        given = with_captions(source.given, names)
        return replace(
            source, given=given, schema=given.schema, captions=tuple(sorted(names))
        )
    return source


def _opened(given: InputOptions, kind: str, urls: list[str]) -> Source | NeedsSpool:
    if kind == "folder":
        return open_folder(given.path)
    folder, found = named(urls)
    base = folder if given.images is None else _absolute(given.images)
    if kind in SEPARATORS:
        return open_delimited(kind, found, base)
    openers: dict[str, Callable[[list[Found], str], Source | NeedsSpool]] = {
        "parquet": open_parquet,
        "arrow": open_arrow,
        "jsonl": open_jsonl,
        "coco": _coco,
        "webdataset": open_tars,
    }
    return openers[kind](found, base)


def _coco(found: list[Found], base: str) -> NeedsSpool:
    if len(found) > 1:
        raise ValueError(
            "these are several COCO documents; give each as an input of its own: "
            "[{path: a.json, name: a}, {path: b.json, name: b}]"
        )
    return open_coco(found[0], base)


def _has_rows(source: Source) -> bool:
    return next(source.scan([]), None) is not None


def _absolute(path: str) -> str:
    local = local_path(path)
    return path.rstrip("/") if local is None else str(local)
