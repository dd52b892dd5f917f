"""Files of records cut into sections, and reading one section of many such files.

Owns their layout: offsets of the sections, counted in records, then the records, all
little-endian. Such a file is one corner of an exchange of everything with everything: a
task writes one file with a section for every reader, and a reader collects its section
of every file. Does not own what records mean or who reads which (`pipeline.compare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.storage import Storage

_OFFSET = np.dtype("<u8")
# Small reads of an object store are nearly all waiting.
_READS_AT_A_TIME = 16


@dataclass(frozen=True, kw_only=True)
class Window:
    """A section of some files, one behind the other."""

    files: range
    """Which of the files, in order."""
    sizes: np.ndarray
    """int64 (files,), records from each."""
    records: np.ndarray
    """The records of all of them."""


def write_sections(
    storage: Storage,
    name: str,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    sections: int,
) -> None:
    """Write the sections of a file, in order, whole or not at all.

    Args:
        storage: where to.
        name: file name.
        parts: records, and how many of them each next section has. Each part is
            written before the next is asked for.
        sections: how many there are in all.
    """
    folder, _, stem = name.rpartition("/")
    with storage.stage(folder) as directory:
        _write(directory / stem, parts, sections)


def _write(
    path: Path, parts: Iterable[tuple[np.ndarray, np.ndarray]], sections: int
) -> None:
    offsets = np.zeros(sections + 1, dtype=_OFFSET)
    done = 0
    with path.open("wb") as file:
        file.write(offsets.tobytes())
        for records, sizes in parts:
            ends = offsets[done] + np.cumsum(sizes).astype(_OFFSET)
            offsets[done + 1 : done + 1 + len(sizes)] = ends
            done += len(sizes)
            file.write(np.ascontiguousarray(records).data)
        file.seek(0)
        file.write(offsets.tobytes())
    if done != sections:
        raise AssertionError(f"{path.name}: {done} sections written of {sections}")


def read_section(
    storage: Storage, name: str, section: int, *, sections: int, dtype: np.dtype
) -> np.ndarray:
    """The records of one section of one file."""
    [window] = SectionReader(
        storage, [name], section, sections=sections, dtype=dtype
    ).windows(1)
    return window.records


class SectionReader:
    """One section of many files with the same number of sections."""

    def __init__(
        self,
        storage: Storage,
        names: Sequence[str],
        section: int,
        *,
        sections: int,
        dtype: np.dtype,
    ) -> None:
        """Read how large the section is in each file.

        Raises:
            FileNotFoundError: a file is missing.
        """
        self._storage = storage
        self._names = names
        self._dtype = dtype
        self._body = (sections + 1) * _OFFSET.itemsize
        with ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
            found = list(pool.map(lambda name: self._ends(name, section), names))
        self._starts = np.array([start for start, _ in found], dtype=np.int64)
        self._sizes = np.array([stop - start for start, stop in found], dtype=np.int64)
        self._whole: Window | None = None

    @property
    def total(self) -> int:
        """Records of the section in all files."""
        return int(self._sizes.sum())

    def windows(self, limit: int, files: range | None = None) -> Iterator[Window]:
        """The section of consecutive files, in order, as many as have at most `limit`
        records together, but at least one. A window of all files is kept for the next
        call.

        Args:
            limit: records.
            files: only these; default: all.
        """
        files = files or range(len(self._names))
        if self._whole is not None and files == self._whole.files:
            yield self._whole
            return
        first = files.start
        while first < files.stop:
            within = np.cumsum(self._sizes[first : files.stop]) <= limit
            count = max(1, int(within.sum()))
            window = self._window(range(first, first + count))
            if count == len(self._names):
                self._whole = window
            yield window
            first += count

    def _window(self, files: range) -> Window:
        sizes = self._sizes[files.start : files.stop]
        with ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
            read = list(pool.map(self._read, files))
        data = np.frombuffer(b"".join(read), dtype=self._dtype)
        return Window(files=files, sizes=sizes, records=data)

    def _ends(self, name: str, section: int) -> tuple[int, int]:
        size = 2 * _OFFSET.itemsize
        read = self._storage.read_range(name, section * _OFFSET.itemsize, size)
        start, stop = np.frombuffer(read, dtype=_OFFSET).tolist()
        return start, stop

    def _read(self, file: int) -> bytes:
        width = self._dtype.itemsize
        size = int(self._sizes[file]) * width
        if not size:
            return b""
        offset = self._body + int(self._starts[file]) * width
        data = self._storage.read_range(self._names[file], offset, size)
        if len(data) != size:
            raise OSError(f"{self._names[file]} is cut short: remove it and run again")
        return data
