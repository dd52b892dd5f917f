"""Opening corpora and reading them in every way, for the tests of this folder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.captions import BadText
from pipeline.options import InputOptions
from pipeline.sources import NeedsSpool, Source, open_source, with_captions
from pipeline.storage import open_storage

BAD = "<bad>"


def opened(path: Path | str, *, spool: Path | str = "", **options: Any) -> Source:
    """The corpus at `path`; spooled at `spool` where it must be."""
    group_by = options.pop("group_by", None)
    captions = options.pop("captions", ())
    given = InputOptions(path=str(path), **options)
    source = with_captions(open_source(given, group_by=group_by), captions)
    if isinstance(source, NeedsSpool):
        assert spool, "this corpus needs a spool"
        return source.spooled(open_storage(spool), "corpus")
    return source


def rows(
    source: Source,
    columns: Sequence[str] = (),
    start: int = 0,
    stop: int | None = None,
) -> list[dict[str, Any]]:
    """Rows with `BAD` for what cannot be used; of all columns by default."""
    stop = source.end if stop is None else stop
    found = source.rows(columns or source.schema.names, start, stop)
    return [_plain(row) for row in found]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: BAD if isinstance(cell, BadText) else cell for name, cell in row.items()
    }


def column(source: Source, name: str) -> list[Any]:
    """One column of all rows."""
    return [row[name] for row in rows(source, [name])]


def cursors(source: Source, columns: Sequence[str] = ()) -> list[int]:
    """Cursors of all rows, as a scan of these columns gives them."""
    parts = [part for _, part in source.scan(columns)]
    return np.concatenate(parts).tolist() if parts else []


def scanned(source: Source, name: str, start: int = 0) -> list[Any]:
    """One column as a scan yields it."""
    return [
        cell for batch, _ in source.scan([name], start) for cell in batch[0].to_pylist()
    ]


def check_every_range(source: Source) -> None:
    """Rows read from any row to any other are those of the whole, and a scan from any
    row goes on as the whole does.
    """
    places = [*cursors(source), source.end]
    whole = rows(source)
    assert len(whole) == len(places) - 1 > 0
    name = source.schema.names[0]
    flat = scanned(source, name)
    for low in range(len(whole)):
        for high in range(low, len(whole) + 1):
            assert rows(source, (), places[low], places[high]) == whole[low:high]
        assert scanned(source, name, places[low]) == flat[low:]


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], *, kind: int = tarfile.GNU_FORMAT
) -> Path:
    """A tar of files."""
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
