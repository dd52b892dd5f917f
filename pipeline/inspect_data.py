"""What an inspection shows of a dataset: read, counted, and chosen here.

Owns which tables and samples are looked at (all of a small dataset, evenly spaced ones
of a large one, the same every time) and the figures made of them. Does not own how they
are shown (`pipeline.inspect_text`, `pipeline.inspect_page`) or whether the bytes are
sound (`pipeline.audit`). Memory: the numbers of `rows` inputs, and some thousand texts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.audit import stored_tokenizer
from pipeline.audit_files import read_manifest
from pipeline.fetch import Cell, ImageReader
from pipeline.inspect_tokens import Tokens, Vocabulary
from pipeline.manifest import Manifest, Shard, token_ids
from pipeline.options import FetchOptions
from pipeline.shards import WRITTEN
from pipeline.storage import Storage

NUMBERS = (
    *("width", "height", "original_width", "original_height"),
    *("jpg_bytes", "n_captions", "n_tokens"),
)
_TEXTS = ("key", "url", "source", "split", "status", "reason", "detail", "caption")
_MORE = ("phash", "duplicate_of", "retry_of", "captions", "sha256")
# Captions that words and tokens are counted in, and hashes that are compared.
_MOST_CAPTIONS, _MOST_HASHES = 50_000, 20_000
_EXAMPLES, _CANDIDATES = 4, 64
_MOST_BYTES = 64 << 20
_SHOWN_DUPLICATES = 12
_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample to show."""

    key: str
    split: str
    source: str
    url: str
    image: bytes
    captions: Sequence[str]
    ids: Sequence[np.ndarray]
    """Stored tokens of each caption, separators included."""
    columns: Mapping[str, str]
    """Passthrough columns."""


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Two inputs of which one repeats the other, or may."""

    images: tuple[bytes | None, bytes | None]
    """None where an input was not kept, and its image is not to be had."""
    bits: int | None
    """Bits in which their perceptual hashes differ."""
    rows: tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(kw_only=True)
class View:
    """A dataset, as far as it was looked at."""

    url: str
    manifest: Manifest
    tables: int = 0
    """Tables read, of `all_tables`."""
    all_tables: int = 0
    rows: int = 0
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns (samples,) of the samples in those tables."""
    captions: list[str] = field(default_factory=list)
    examples: dict[tuple[str, str], list[Mapping[str, Any]]] = field(
        default_factory=dict
    )
    """Rows of inputs that are no samples, by status and reason."""
    duplicates: list[Alike] = field(default_factory=list)
    alike: list[Alike] = field(default_factory=list)
    compared: int = 0
    """Samples whose perceptual hashes were compared for `alike`."""
    pairs: list[Pair] = field(default_factory=list)
    tokens: Tokens | None = None
    vocabulary: Vocabulary | None = None

    @property
    def whole(self) -> bool:
        """Was every table read?"""
        return self.tables == self.all_tables

    @property
    def name(self) -> str:
        """The sources, for a title."""
        return ", ".join(self.manifest.sources)


def read_view(
    storage: Storage,
    *,
    rows: int,
    samples: int,
    images: str | None = None,
    alike_bits: int = 2,
) -> View:
    """Look at a dataset.

    Args:
        rows: inputs to read at most; of larger datasets evenly spaced tables.
        samples: sample pairs to read with their images.
        images: folder or URL prefix of the corpus, to show images that were dropped.
        alike_bits: most bits in which look-alikes differ.

    Raises:
        ValueError: it is no finished dataset, or a file it needs is damaged.
    """
    manifest, _ = read_manifest(storage)
    reader = _Reader(storage, manifest)
    view = View(url=storage.url, manifest=manifest)
    reader.read_tables(view, rows)
    view.tokens = Tokens(stored_tokenizer(storage, manifest))
    view.vocabulary = view.tokens.count(view.captions)
    view.pairs = [reader.pair(*place) for place in reader.places(samples)]
    view.duplicates = reader.duplicates(images)
    view.alike = reader.alike(view, alike_bits)
    return view


class _Reader:
    """Reads tables and samples of one dataset."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._manifest = storage, manifest
        self._places: dict[str, tuple[Shard, int]] = {}
        self._hashes: list[tuple[int, Mapping[str, Any]]] = []
        self._repeats: list[Mapping[str, Any]] = []
        self._superseded: set[str] = set()
        self._cached: tuple[str, list[dict[str, Any]]] = ("", [])

    def read_tables(self, view: View, rows: int) -> None:
        """Fill in everything that tables tell."""
        shards = {shard.sidecar(".parquet"): shard for shard in self._manifest.shards}
        names = sorted(
            [*shards, *(n for n in self._manifest.files if n.endswith(".parquet"))]
        )
        inputs = max(self._manifest.accounting.inputs, 1)
        wanted = min(len(names), max(1, len(names) * rows // inputs))
        chosen = [names[place] for place in _spaced(len(names), wanted)]
        view.tables, view.all_tables = len(chosen), len(names)
        numbers: dict[str, list[np.ndarray]] = {name: [] for name in NUMBERS}
        room = max(1, _MOST_CAPTIONS // max(len(chosen), 1))
        for name in chosen:
            taken = 0
            for batch in self._batches(name):
                view.rows += batch.num_rows
                written = batch.filter(pc.equal(batch["status"], WRITTEN))
                for column, values in numbers.items():
                    if column in written.schema.names:
                        values.append(_column(written, column))
                taken += self._take_texts(
                    view, batch.to_pylist(), shards.get(name), room - taken
                )
        for column, values in numbers.items():
            view.numbers[column] = np.concatenate([*values, np.empty(0)])
        self._drop_superseded(view)

    def _drop_superseded(self, view: View) -> None:
        """An input that was tried again counts by its last attempt."""
        view.rows -= len(self._superseded)
        for reason, rows in list(view.examples.items()):
            last = [row for row in rows if row["key"] not in self._superseded]
            view.examples[reason] = last[:_EXAMPLES]
            if not last:
                del view.examples[reason]

    def _batches(self, name: str) -> Iterator[pa.RecordBatch]:
        try:
            with self._storage.fetch(name) as path, pq.ParquetFile(path) as table:
                there = table.schema_arrow.names
                columns = [c for c in (*_TEXTS, *_MORE, *NUMBERS) if c in there]
                yield from table.iter_batches(_BATCH_ROWS, columns=columns)
        except (pa.ArrowException, FileNotFoundError) as error:
            raise ValueError(
                f"{self._storage.url}/{name} cannot be read: find what else is damaged "
                f"with `python -m pipeline.validate {self._storage.url}`"
            ) from error

    def _take_texts(
        self,
        view: View,
        rows: Iterable[dict[str, Any]],
        shard: Shard | None,
        room: int,
    ) -> int:
        """Captions, examples and hashes of a batch; returns the captions taken."""
        taken = 0
        for row in rows:
            if row.get("retry_of"):
                self._superseded.add(row["retry_of"])
            if row["status"] == WRITTEN:
                if shard is not None:
                    place = self._places.setdefault(f"/{shard.name}", (shard, 0))[1]
                    self._places[f"/{shard.name}"] = (shard, place + 1)
                    self._places[row["key"]] = (shard, place)
                if taken < room:
                    captions = row.get("captions") or [row["caption"]]
                    view.captions += captions
                    taken += len(captions)
                if row.get("phash") and len(self._hashes) < _MOST_HASHES:
                    self._hashes.append((int(row["phash"], 16), row))
                continue
            reason = row["reason"] or ""
            examples = view.examples.setdefault((row["status"], reason), [])
            if len(examples) < _CANDIDATES:
                examples.append(row)
            if row.get("duplicate_of") and len(self._repeats) < 4 * _SHOWN_DUPLICATES:
                self._repeats.append(row)
        return taken

    def places(self, count: int) -> list[tuple[Shard, int]]:
        """`count` samples, evenly spaced over the shards."""
        shards = self._manifest.shards
        ends = np.cumsum([shard.samples for shard in shards])
        places = []
        for place in _spaced(int(ends[-1]), min(count, int(ends[-1]))):
            which = int(np.searchsorted(ends, place, side="right"))
            before = int(ends[which - 1]) if which else 0
            places.append((shards[which], place - before))
        return places

    def pair(self, shard: Shard, number: int) -> Pair:
        """A sample with its image and tokens, by its place in its shard."""
        index = np.load(io.BytesIO(self._storage.read(shard.index)), allow_pickle=False)
        record = index[number]
        row = self._rows(shard)[number]
        info = self._manifest.tokenizer
        ids = token_ids(
            self._part(shard.ids or shard.name, record, "ids"),
            int(record["n_tokens"]),
            info.dtype,
        )
        ends = np.flatnonzero(ids == info.special_ids["sep"]) + 1
        known = {*_TEXTS, *_MORE, *NUMBERS, "uid", "pixels_sha256", "exif"}
        return Pair(
            key=row["key"],
            split=shard.split,
            source=shard.source,
            url=row["url"] or "",
            image=self._part(shard.name, record, "jpg"),
            captions=row.get("captions") or [row["caption"]],
            ids=np.split(ids, ends)[: len(ends)],
            columns={k: str(v) for k, v in row.items() if k not in known and v},
        )

    def _part(self, name: str, record: np.void, part: str) -> bytes:
        offset, size = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
        return self._storage.read_range(name, offset, size)

    def _rows(self, shard: Shard) -> list[dict[str, Any]]:
        """Rows of the samples of a shard; the last shard's are kept."""
        name = shard.sidecar(".parquet")
        if self._cached[0] != name:
            with self._storage.fetch(name) as path:
                rows = pq.read_table(path).to_pylist()
            written = [row for row in rows if row["status"] == WRITTEN]
            self._cached = (name, written)
        return self._cached[1]

    def duplicates(self, images: str | None) -> list[Alike]:
        """Dropped inputs and what they repeat, as far as that is a sample."""
        rows = [r for r in self._repeats if r["duplicate_of"] in self._places]
        rows = rows[:_SHOWN_DUPLICATES]
        found = []
        for row, dropped in zip(rows, _dropped(rows, images), strict=True):
            shard, place = self._places[row["duplicate_of"]]
            other = self._rows(shard)[place]
            kept = self.pair(shard, place).image
            bits = _bits(row, other)
            found.append(Alike(images=(kept, dropped), bits=bits, rows=(other, row)))
        return found

    def alike(self, view: View, most_bits: int) -> list[Alike]:
        """Samples whose perceptual hashes are all but equal, the closest first."""
        view.compared = len(self._hashes)
        pairs = _close(np.array([h for h, _ in self._hashes], np.uint64), most_bits)
        found = []
        for bits, a, b in pairs[:_SHOWN_DUPLICATES]:
            rows = (self._hashes[a][1], self._hashes[b][1])
            first, second = (self.pair(*self._places[row["key"]]) for row in rows)
            images = (first.image, second.image)
            found.append(Alike(images=images, bits=bits, rows=rows))
        return found


def percentiles(values: np.ndarray) -> list[float]:
    """Minimum, 5, 25, 50, 75, 95 % and maximum; empty for no values."""
    if not len(values):
        return []
    return [float(v) for v in np.percentile(values, [0, 5, 25, 50, 75, 95, 100])]


def aspects(view: View) -> np.ndarray:
    """Width per height (samples,) of the sources."""
    width, height = view.numbers["original_width"], view.numbers["original_height"]
    sound = height > 0
    return width[sound] / height[sound]


def word_counts(captions: Iterable[str]) -> Counter[str]:
    """Words of captions without case, by how many captions have them."""
    counts: Counter[str] = Counter()
    for caption in captions:
        words = (word.strip(".,;:!?\"'()[]{}<>*_-") for word in caption.lower().split())
        counts.update({word for word in words if any(map(str.isalnum, word))})
    return counts


def _spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, evenly spaced and always the same."""
    return [(2 * n + 1) * count // (2 * wanted) for n in range(wanted)]


def _column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch[name].drop_null().to_numpy(zero_copy_only=False).astype(np.float64)


def _dropped(rows: Sequence[Mapping[str, Any]], base: str | None) -> list[bytes | None]:
    """Images of inputs that were dropped, as they were; None where they are not there,
    or are others now.
    """
    if base is None:
        return [None] * len(rows)
    cells = [Cell(value=row["url"], sha256=row.get("sha256")) for row in rows]
    with ImageReader(
        FetchOptions(), base=base, max_bytes=_MOST_BYTES, image_list="first"
    ) as reader:
        return [
            data if isinstance(data, bytes) else None for data in reader.read(cells)
        ]


def _bits(a: Mapping[str, Any], b: Mapping[str, Any]) -> int | None:
    if not (a.get("phash") and b.get("phash")):
        return None
    return (int(a["phash"], 16) ^ int(b["phash"], 16)).bit_count()


def _close(hashes: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(bits, place, place) of hashes within `most` bits. Flat pictures, whose hashes
    say nothing, are left out.
    """
    set_bits = np.bitwise_count(hashes)
    told = np.flatnonzero((set_bits >= 8) & (set_bits <= 56))
    pairs: list[tuple[int, int, int]] = []
    for number, a in enumerate(told.tolist()):
        rest = told[number + 1 :]
        bits = np.bitwise_count(hashes[rest] ^ hashes[a])
        near = np.flatnonzero(bits <= most)
        pairs += [(int(bits[n]), a, int(rest[n])) for n in near[:_SHOWN_DUPLICATES]]
    return sorted(pairs)
