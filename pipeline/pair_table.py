"""What is known of the samples of a split, for pairing them: a number for each value.

Owns reading the tables beside the shards. Does not own what is drawn of them
(`pipeline.pair_draws`). Images and captions are not read: some 50 bytes of memory a
sample.

Shapes: N samples.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import nearest
from pipeline.manifest import Manifest, Shard
from pipeline.shards import ROW_SCHEMA, WRITTEN
from pipeline.storage import Storage

NO_VALUE = np.uint64(0)
"""What stands for an empty cell."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """N samples of a split, in stored order."""

    uids: np.ndarray
    """(N,) uint64."""
    values: np.ndarray
    """(N,) uint64, equal where the column is; `NO_VALUE` where it is empty."""
    hard: np.ndarray
    """(N,) uint64, equal where all hard columns are; `NO_VALUE` where one is empty, or
    without any."""
    images: np.ndarray
    """(N,) uint64, equal where image files are."""
    n_captions: np.ndarray
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.uids)


def read_table(
    storage: Storage, shards: Sequence[Shard], column: str, hard: Sequence[str]
) -> Table:
    """The samples of some shards.

    Raises:
        ValueError: the samples have no such column, or a table does not fit its shard.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Table.__annotations__}
    for shard in shards:
        rows = written_rows(storage, shard, [column, *hard, "sha256"])
        index = np.load(io.BytesIO(storage.read(shard.index)), allow_pickle=False)
        if len(index) != rows.num_rows:
            raise ValueError(
                f"{storage.url}/{shard.sidecar('.parquet')} has {rows.num_rows} "
                f"samples and the index {len(index)}: `python -m pipeline.validate "
                f"{storage.url}` names every damage"
            )
        parts["uids"].append(index["uid"].astype(np.uint64))
        parts["values"].append(_codes(rows[column]))
        parts["hard"].append(
            _together([_codes(rows[name]) for name in hard], len(index))
        )
        parts["images"].append(_codes(rows["sha256"]))
        parts["n_captions"].append(index["n_captions"].astype(np.int64))
    return Table(**{name: np.concatenate(found) for name, found in parts.items()})


def written_rows(storage: Storage, shard: Shard, columns: Sequence[str]) -> pa.Table:
    """Columns of the samples of a shard, in stored order."""
    with storage.fetch(shard.sidecar(".parquet")) as path:
        names = list(dict.fromkeys([*columns, "status"]))
        rows = pq.read_table(path, columns=names)
    return rows.filter(pc.equal(rows["status"], WRITTEN))


def check_columns(storage: Storage, manifest: Manifest, columns: Sequence[str]) -> None:
    """Raise ValueError, with the nearest one, for a column that was not kept."""
    shard = manifest.shards[0]
    with storage.fetch(shard.sidecar(".parquet")) as path:
        there = pq.read_schema(path).names
    kept = [name for name in there if name not in ROW_SCHEMA.names]
    for name in columns:
        if name not in kept:
            raise ValueError(
                f"no column {name!r} was kept.{nearest(name, kept)} Kept are: "
                f"{', '.join(kept) or 'none'}. Preprocess with --columns.keep {name}"
            )


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) a number for each value that depends on nothing but the value: the first
    bytes of its hash.
    """
    coded = pc.dictionary_encode(pc.fill_null(column.cast(pa.string()), ""))
    found = [
        _hashes(chunk.dictionary)[chunk.indices.to_numpy(zero_copy_only=False)]
        for chunk in coded.chunks
    ]
    return np.concatenate([*found, np.empty(0, np.uint64)])


def _hashes(values: pa.Array) -> np.ndarray:
    return np.fromiter(_each(values.to_pylist()), dtype=np.uint64, count=len(values))


def _each(values: Sequence[str]) -> Iterator[int]:
    for value in values:
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        # 0 is the empty one.
        yield max(int.from_bytes(digest, "little"), 1) if value else int(NO_VALUE)


def _together(codes: Sequence[np.ndarray], count: int) -> np.ndarray:
    """One number (N,) of several."""
    whole = np.zeros(count, dtype=np.uint64)
    filled = np.full(count, bool(codes))
    for code in codes:
        whole = mixed(whole ^ code)
        filled &= code != NO_VALUE
    return np.where(filled, np.maximum(whole, np.uint64(1)), NO_VALUE)


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 values spread evenly over 64 bits (splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
