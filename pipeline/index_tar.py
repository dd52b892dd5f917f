"""One existing tar to the files beside it: what a process of `pipeline.index` runs.

Owns index, parquet, stats, Energon's offsets and the token sidecar of a tar that stays
as it is. Does not own the walk (`pipeline.archive`), what a sample says
(`pipeline.tar_samples`), which tars there are or the manifest (`pipeline.indexing`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archive import Archive, TarSample
from pipeline.captions import CaptionCleaner
from pipeline.filters import Filtered
from pipeline.images import ImageError
from pipeline.manifest import (
    IDS_FILES,
    INDEX_DTYPE,
    SHARD_FILES,
    Accounting,
    sample_uid,
)
from pipeline.options import TextOptions
from pipeline.pictures import Picture, PictureCheck
from pipeline.shards import ROW_SCHEMA, WRITTEN, StagedShard, shard_stats, table_schema
from pipeline.storage import Storage
from pipeline.tar_samples import (
    SampleReader,
    SampleText,
    image_of,
    printable_key,
    text_field,
)
from pipeline.tokenizer import CaptionEncoder, StoredTokenizer

# Where files of others lie afterwards whose names the sidecars need.
SET_ASIDE = ".palimpsest/set-aside"
# Says in a parquet's metadata and in a stats file who wrote it.
_MADE_BY = "pipeline.index"
# Images decoded at a time.
_BATCH = 32
_DETAIL = 200


@dataclass(frozen=True, kw_only=True)
class IndexWork:
    """What is the same for every tar of a run."""

    storage: Storage
    source: str
    tokenizer: StoredTokenizer
    text: TextOptions
    check: str


@dataclass(frozen=True, kw_only=True)
class TarRecord:
    """What the manifest needs to know about an indexed tar."""

    name: str
    split: str
    source: str
    samples: int
    captions: int
    tokens: int
    bytes: int
    sha256: Mapping[str, str]
    accounting: Accounting
    physical: int
    """Samples in the tar, the unusable ones too: what Energon counts."""
    images: Sequence[str]
    """What follows the key in the names of its image members."""
    caption_fields: Sequence[str]
    """Where captions stand, in the words of Energon's field maps."""
    ended: bool
    """Whether it has an end-of-archive mark."""

    @property
    def files(self) -> Mapping[str, str]:
        """Paths of the tar and what lies beside it, by the name of their digest."""
        stem, suffixes = self.name.removesuffix(".tar"), {**SHARD_FILES, **IDS_FILES}
        return {name: stem + suffixes[name] for name in self.sha256}


@dataclass(kw_only=True)
class _Entry:
    """One sample on its way into the index."""

    sample: TarSample
    row: dict[str, Any]
    text: SampleText | None = None
    extension: str = ""
    image: bytes = b""
    ids: np.ndarray = field(default_factory=lambda: np.empty(0))
    picture: Picture | None = None


@contextlib.contextmanager
def mapped(storage: Storage, name: str) -> Iterator[memoryview]:
    """The bytes of a file, memory-mapped."""
    with storage.fetch(name) as path:
        # An empty file cannot be mapped.
        empty = not path.stat().st_size
        yield memoryview(b"") if empty else np.memmap(path, mode="r").data


class TarIndexer:
    """Indexes tars, one after another."""

    def __init__(self, work: IndexWork) -> None:
        self._work = work
        self._cleaner = CaptionCleaner(work.text)
        self._encoder = CaptionEncoder(work.tokenizer)
        self._check = PictureCheck(work.check)

    def index(self, name: str, split: str) -> TarRecord:
        """Write the files beside the tar `name`, each whole or not at all.

        The same tar and work give the same bytes. Files of others that have one of
        the names are moved to `SET_ASIDE` first.
        """
        with mapped(self._work.storage, name) as data:
            archive = Archive(data)
            reader = SampleReader(self._cleaner, source=self._work.source, tar=name)
            samples = archive.samples()
            entries = list(self._entries(samples, reader, data, name, split))
            files, record = self._files(entries, data, name, split, archive.ended)
        for file, content in files.items():
            if file.endswith((".parquet", "_stats.json")):
                _set_aside(self._work.storage, file)
            self._work.storage.write(file, content)
        return record

    def _entries(
        self,
        samples: Iterator[TarSample],
        reader: SampleReader,
        data: memoryview,
        tar: str,
        split: str,
    ) -> Iterator[_Entry]:
        seen: set[str] = set()
        while batch := list(islice(samples, _BATCH)):
            entries = [self._entry(sample, tar, split) for sample in batch]
            for entry in entries:
                self._read(entry, reader, data, seen)
            waiting = [entry for entry in entries if not entry.row["status"]]
            answers = self._check.check([entry.image for entry in waiting])
            for entry, answer in zip(waiting, answers, strict=True):
                entry.image = b""
                if isinstance(answer, ImageError):
                    _reject(entry, "failed", answer)
                else:
                    _accept(entry, answer)
            yield from entries

    def _entry(self, sample: TarSample, tar: str, split: str) -> _Entry:
        key = printable_key(sample.key) or f"@{sample.start}"
        row: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
        row |= {
            "key": f"{tar.removesuffix('.tar')}/{key}",
            "uid": f"{sample_uid(self._work.source, f'{tar}/{key}'):016x}",
            "url": key,
            "source": self._work.source,
            "split": split,
        }
        return _Entry(sample=sample, row=row)

    def _read(
        self, entry: _Entry, reader: SampleReader, data: memoryview, seen: set[str]
    ) -> None:
        """Everything that needs no decoding; rejects the entry where it fails."""
        try:
            text = reader.text(entry.sample, data)
            if entry.sample.key in seen:
                raise ImageError("duplicate_key", "an earlier sample has this key")
            seen.add(entry.sample.key)
            captions, entry.ids = self._encoder.encode(list(text.captions))
            if not captions:
                raise Filtered("empty_caption", "")
            entry.extension, entry.image = image_of(entry.sample, data)
        except ImageError as error:
            _reject(entry, "failed", error)
            return
        except Filtered as error:
            _reject(entry, "filtered", error)
            return
        entry.text = text
        entry.row |= {
            "uid": f"{text.uid:016x}",
            "source": text.source,
            "caption": captions[0],
            "captions": captions,
            "n_captions": len(captions),
            "n_tokens": len(entry.ids),
            "jpg_bytes": len(entry.image),
            "sha256": hashlib.sha256(entry.image).hexdigest(),
            "url": text_field(text.fields, "url") or entry.row["url"],
        }
        if text.own:
            entry.row["key"] = entry.sample.key
            entry.row["sha256"] = text_field(text.fields, "sha256")

    def _files(
        self,
        entries: Sequence[_Entry],
        data: memoryview,
        name: str,
        split: str,
        ended: bool,
    ) -> tuple[dict[str, bytes], TarRecord]:
        """The files beside the tar by name, and its record."""
        kept = [entry for entry in entries if entry.picture is not None]
        beside = not all(_holds_ids(entry, data) for entry in kept)
        index, ids = _index(kept, data, beside)
        starts = [entry.sample.start for entry in entries if entry.sample.members]
        end = max((e.sample.end for e in entries if e.sample.members), default=0)
        table = pa.Table.from_pylist([entry.row for entry in entries], _SCHEMA)
        shard = StagedShard(
            split=split,
            samples=len(kept),
            captions=int(index["n_captions"].sum()),
            tokens=int(index["n_tokens"].sum()),
            bytes=len(data),
            sha256={"tar": hashlib.sha256(data).hexdigest()},
        )
        stats = {**shard_stats(shard, table), "end_of_archive": ended}
        contents = {"parquet": _parquet(table)}
        if kept:
            contents |= {
                "index": _npy(index),
                "stats": _stats(stats),
                "idx": np.array([*starts, end], "<u8").tobytes(),
            }
            contents |= {"ids": ids} if beside else {}
        digests = {key: hashlib.sha256(c).hexdigest() for key, c in contents.items()}
        sources = {entry.row["source"] for entry in kept}
        record = TarRecord(
            name=name,
            split=split,
            source=sources.pop() if len(sources) == 1 else self._work.source,
            samples=shard.samples,
            captions=shard.captions,
            tokens=shard.tokens,
            bytes=shard.bytes,
            sha256={**shard.sha256, **digests},
            accounting=_accounting(entries),
            physical=len(starts),
            images=sorted({entry.extension for entry in kept}),
            caption_fields=sorted({e.text.caption_field for e in kept if e.text}),
            ended=ended,
        )
        return {record.files[key]: text for key, text in contents.items()}, record


def _reject(entry: _Entry, status: str, error: ImageError | Filtered) -> None:
    detail = error.detail[:_DETAIL] or None
    entry.row |= {"status": status, "reason": error.reason, "detail": detail}


def _accept(entry: _Entry, picture: Picture) -> None:
    assert entry.text is not None
    fields = entry.text.fields
    entry.picture = picture
    entry.row |= {
        "status": WRITTEN,
        "width": picture.width,
        "height": picture.height,
        "original_width": _side(fields.get("original_width"), picture.width),
        "original_height": _side(fields.get("original_height"), picture.height),
        "phash": picture.phash,
        "pixels_sha256": picture.pixels_sha256,
        "exif": text_field(fields, "exif") or picture.exif or "{}",
    }


def _side(given: Any, shown: int) -> int:
    sound = type(given) is int and 0 < given < 1 << 31
    return given if sound else shown


def _holds_ids(entry: _Entry, data: memoryview) -> bool:
    """Whether the tar has these token ids in the contract's member."""
    member = entry.sample.members.get("input_ids.npy")
    if member is None or not (entry.text and entry.text.own):
        return False
    return data[member.data : member.data + member.size] == _npy(entry.ids)


def _index(
    entries: Sequence[_Entry], data: memoryview, beside: bool
) -> tuple[np.ndarray, bytes]:
    """Records of the samples, and the sidecar of their ids where those lie `beside`."""
    records, sidecar = [], bytearray()
    for entry in entries:
        sample, row = entry.sample, entry.row
        image = sample.members[entry.extension]
        if beside:
            ids, ids_offset = entry.ids.tobytes(), len(sidecar)
            sidecar += ids
        else:
            member = sample.members["input_ids.npy"]
            ids_offset = member.data
            ids = bytes(data[member.data : member.data + member.size])
        record = {
            "uid": int(row["uid"], 16),
            "span_offset": sample.start,
            "span_size": sample.end - sample.start,
            "span_crc32c": crc32c.crc32c(data[sample.start : sample.end]),
            "jpg_offset": image.data,
            "jpg_size": image.size,
            "jpg_crc32c": crc32c.crc32c(data[image.data : image.data + image.size]),
            "ids_offset": ids_offset,
            "ids_size": len(ids),
            "ids_crc32c": crc32c.crc32c(ids),
            "width": row["width"],
            "height": row["height"],
            "n_captions": row["n_captions"],
            "n_tokens": row["n_tokens"],
        }
        records.append(tuple(record[name] for name in INDEX_DTYPE.names or ()))
    return np.array(records, dtype=INDEX_DTYPE), bytes(sidecar)


def _accounting(entries: Sequence[_Entry]) -> Accounting:
    total = Accounting()
    for entry in entries:
        status, counts = entry.row["status"], {entry.row["reason"]: 1}
        total += Accounting(
            inputs=1,
            written=int(status == WRITTEN),
            filtered=counts if status == "filtered" else {},
            failed=counts if status == "failed" else {},
        )
    return total


def _set_aside(storage: Storage, name: str) -> None:
    """Move a file of somebody else out of the way, once."""
    if storage.size(name) is None or _is_ours(storage, name):
        return
    target = f"{SET_ASIDE}/{name}"
    if storage.size(target) is None:
        storage.move(name, target)


def _is_ours(storage: Storage, name: str) -> bool:
    try:
        if name.endswith(".json"):
            return json.loads(storage.read(name)).get("made_by") == _MADE_BY
        with storage.fetch(name) as path:
            return b"made_by" in (pq.read_schema(path).metadata or {})
    except (ValueError, AttributeError, OSError, pa.ArrowException):
        return False


def _stats(stats: Mapping[str, Any]) -> bytes:
    return (json.dumps({**stats, "made_by": _MADE_BY}, indent=1) + "\n").encode()


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


_SCHEMA = table_schema(()).with_metadata({"made_by": _MADE_BY})
