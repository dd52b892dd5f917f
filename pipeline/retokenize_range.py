"""One range of a dataset again with other tokens: what a process of the command runs.

Owns the new rows and samples of a range. Does not own the bytes of a shard
(`pipeline.shards`) or the run (`pipeline.retokenizing`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archive import Archive, TarSample
from pipeline.index_tar import mapped
from pipeline.manifest import Accounting, Shard
from pipeline.records import RangeRecord
from pipeline.shards import ROW_SCHEMA, WRITTEN, Sample, ShardWriter
from pipeline.staging import CANDIDATES, StagedRange, new_directory
from pipeline.storage import Storage
from pipeline.tokenizer import CaptionEncoder, StoredTokenizer

# What is known of an input before its captions are.
_IDENTITY = ("key", "uid", "url", "source", "split", "retry_of")
_EMPTY = "empty_caption"
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class RetokenizeWork:
    """What is the same for every range of a run."""

    source: Storage
    target: Storage
    tokenizer: StoredTokenizer
    image_format: str
    retries: bool
    """Whether failed inputs were tried again: then what they failed of is counted in
    two places, and stays.
    """


class RangeRetokenizer:
    """Makes ranges again, one after another."""

    def __init__(self, work: RetokenizeWork) -> None:
        self._work = work
        self._encoder = CaptionEncoder(work.tokenizer)

    def __call__(self, record: RangeRecord) -> StagedRange:
        """Stage a committed range of the source below the target."""
        directory = new_directory(CANDIDATES, record.range)
        tables: dict[str, tuple[str, Shard | None]] = {
            shard.split: (shard.sidecar(".parquet"), shard) for shard in record.shards
        }
        for name in record.rejected:
            tables[_split_of(name, record.range)] = (name, None)
        counts = Accounting()
        with self._work.target.stage(directory) as local:
            staged = {}
            for split, (table, shard) in sorted(tables.items()):
                writer, found = self._write(local, split, table, shard)
                counts += found
                staged[split] = writer.close(), writer
            return StagedRange(
                number=record.range,
                # Nothing goes on from what it stages.
                run="",
                directory=directory,
                rows=record.rows,
                accounting=counts,
                shards=tuple(shard for shard, _ in staged.values() if shard),
                rejected={
                    split: writer.table_sha256
                    for split, (shard, writer) in staged.items()
                    if shard is None
                },
                retried=record.retried,
                verdicts=record.verdicts,
            )

    def _write(
        self, local: Path, split: str, name: str, shard: Shard | None
    ) -> tuple[ShardWriter, Accounting]:
        """Write the rows of a table and the samples of its shard."""
        with self._work.source.fetch(name) as path:
            table = pq.read_table(path)
        names = table.schema.names
        keep = [name for name in names if name not in ROW_SCHEMA.names]
        writer = ShardWriter(local, split, keep, self._work.image_format)
        rows = []
        with mapped(self._work.source, shard.name if shard else name) as data:
            samples = Archive(data).samples()
            for had_sample, row, ids in self._rows(table):
                # Samples lie in the tar in the order of their rows.
                old = next(samples, None) if had_sample else None
                if had_sample and (old is None or old.key != row["key"]):
                    raise ValueError(
                        f"{name} names sample {row['key']}, which is not in its place "
                        "in the tar: `python -m pipeline.validate` names every damage"
                    )
                if old is None or row["status"] != WRITTEN:
                    writer.reject(row)
                else:
                    writer.add(self._sample(old, data, row, ids), row)
                rows.append(row)
        return writer, _count(rows)

    def _sample(
        self, old: TarSample, data: memoryview, row: Mapping[str, Any], ids: np.ndarray
    ) -> Sample:
        def member(name: str) -> bytes:
            place = old.members[name]
            return bytes(data[place.data : place.data + place.size])

        told = {"caption": row["caption"], "captions": row["captions"]}
        return Sample(
            key=row["key"],
            uid=int(row["uid"], 16),
            ids=ids,
            image=member(self._work.image_format),
            width=row["width"],
            height=row["height"],
            captions=row["captions"],
            json={**json.loads(member("json")), **told},
        )

    def _rows(
        self, table: pa.Table
    ) -> Iterator[tuple[bool, dict[str, Any], np.ndarray]]:
        """Whether each row had a sample, the row with the new tokens, and its ids."""
        for batch in table.to_batches(_BATCH):
            rows = batch.to_pylist()
            given = [row["captions"] or [] for row in rows]
            encoded = self._encoder.encode_batch(given)
            for row, (captions, ids) in zip(rows, encoded, strict=True):
                yield row["status"] == WRITTEN, self._row(row, captions, len(ids)), ids

    def _row(
        self, row: dict[str, Any], captions: list[str], n_tokens: int
    ) -> dict[str, Any]:
        stays = self._work.retries and row["status"] == "failed"
        if not row["captions"] or (stays and not captions):
            return row
        if not captions:
            known = (
                *_IDENTITY,
                *(name for name in row if name not in ROW_SCHEMA.names),
            )
            plain = {name: row[name] if name in known else None for name in row}
            return plain | {"status": "filtered", "reason": _EMPTY}
        return row | {
            "caption": captions[0],
            "captions": captions,
            "n_captions": len(captions),
            "n_tokens": n_tokens,
        }


def _split_of(rejected: str, number: int) -> str:
    """The split in the name of a table of rejected inputs."""
    return rejected.rpartition(f"-{number:06d}-")[2].removesuffix(".parquet")


def _count(rows: Sequence[Mapping[str, Any]]) -> Accounting:
    counts = Counter((row["status"], row["reason"]) for row in rows)

    def reasons(status: str) -> dict[str, int]:
        found = {reason: n for (kind, reason), n in counts.items() if kind == status}
        return dict(sorted(found.items()))

    return Accounting(
        inputs=len(rows),
        written=sum(n for (kind, _), n in counts.items() if kind == WRITTEN),
        filtered=reasons("filtered"),
        failed=reasons("failed"),
        duplicates=sum(n for (kind, _), n in counts.items() if kind == "duplicate"),
    )
