"""One input range to one staged shard per split: what a Ray task runs.

Owns turning an input into a sample or into a counted reason why not. Does not own
files (`pipeline.shards`), reading (`pipeline.sources`, `pipeline.fetch`), decoding
(`pipeline.decoder`) or what a staged range is compared with (`pipeline.settle`).
Imports no Ray, so that a range can be processed anywhere. Inputs go through in small
chunks: memory is that of a chunk, of the images being fetched, and of the rows of the
shard's table.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import compare
from pipeline.allocation import keep_pages
from pipeline.attempts import read_attempts
from pipeline.captions import BadText, CaptionCleaner
from pipeline.criteria import signature
from pipeline.decoder import (
    CHUNK_BYTES,
    CHUNK_IMAGES,
    Decoder,
    FunctionError,
    Request,
    Result,
)
from pipeline.fetch import Cell, ImageReader
from pipeline.filters import Filtered, check_tokens
from pipeline.grouping import MAX_ROWS, Input
from pipeline.images import EncodedImage, ImageError
from pipeline.manifest import Accounting, sample_key
from pipeline.options import (
    FilterOptions,
    ImageOptions,
)
from pipeline.phash import perceptual_hashes
from pipeline.plan import RangePlan, caption_cells, caption_template
from pipeline.shards import ROW_SCHEMA, Sample, ShardWriter, StagedShard
from pipeline.staging import (
    CANDIDATES,
    COMPARE,
    RUNNING,
    SIGNATURES,
    StagedRange,
    new_directory,
    read_staged,
    write_staged,
)
from pipeline.tokenizer import CaptionEncoder
from pipeline.where import RowFilter
from pipeline.work import Report, Tally, Work

_DETAIL = 200
_ROW_NAMES = tuple(ROW_SCHEMA.names)
_BAD_CELL = (
    "not UTF-8, not what it is elsewhere, or the row has not the fields of the others"
)
_BAD_FILE = (
    "of a file whose name or text is not UTF-8, that is no JSON object, or that is a "
    "link out of the folder"
)


def write_range(work: Work, plan: RangePlan, report: Report) -> StagedRange:
    """Process a range into a staging directory of its own, and record it.

    `report` gets the plain tally after every chunk. The files depend on `work` and
    `plan` alone. A range that an earlier attempt staged is returned as it is.
    """
    staged = read_staged(work.storage, CANDIDATES, plan.number, work.run)
    if staged is None:
        directory = new_directory(CANDIDATES, plan.number)
        with work.storage.stage(directory) as local:
            staged = _RangeWriter(work, plan, local, directory).run(report)
            # Before it is visible, because this process may die with its driver any
            # moment, and after, because the run may end in between.
            _refuse_unwanted(work)
        try:
            _refuse_unwanted(work)
        except RuntimeError:
            work.storage.remove_tree(directory)
            raise
        staged = write_staged(work.storage, CANDIDATES, staged)
        _store_signatures(work, staged)
        return staged
    if not compare.is_stored(work.storage, COMPARE, plan.number):
        _store_signatures(work, staged)
    counts = staged.accounting
    report(
        {
            "done": plan.inputs,
            "failed": counts.failed,
            "filtered": counts.filtered,
            "written": counts.written,
            "written_bytes": sum(shard.bytes for shard in staged.shards),
        }
    )
    return staged


def _refuse_unwanted(work: Work) -> None:
    """Raise RuntimeError where no driver waits any more for what this task stages."""
    if not work.watched:
        return
    try:
        wanted = work.storage.read(RUNNING) == work.run.encode()
    except FileNotFoundError:
        wanted = False
    if not wanted:
        raise RuntimeError("the run that wanted this range is over")


def _store_signatures(work: Work, staged: StagedRange) -> None:
    """Give the comparison the signatures of the attempt that counts: another may have
    read other answers from the web.
    """
    if not work.comparison.needed:
        return
    data = work.storage.read(f"{staged.directory}/{SIGNATURES}")
    signatures = np.load(io.BytesIO(data), allow_pickle=False)
    compare.store(
        work.storage,
        COMPARE,
        staged.number,
        committed=False,
        signatures=signatures,
    )


class Rejected(Exception):
    """An input that makes no sample: `status` is failed or filtered."""

    def __init__(self, status: str, reason: str, detail: str = "") -> None:
        super().__init__(status, reason, detail)
        self.status, self.reason, self.detail = status, reason, detail


@dataclass(kw_only=True)
class _Prepared:
    """An input on its way through a chunk."""

    position: int
    given: Input
    row: dict[str, Any]
    cell: Cell
    columns: Mapping[str, Any]
    captions: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    rejected: Rejected | None = None

    def forget(self) -> None:
        """Let go of the image and the rows."""
        self.given = replace(self.given, rows=[])
        self.cell = Cell(value=None)
        self.columns = {}


# What became of an input's image; None where the input was rejected before.
_Read = tuple[_Prepared, bytes | ImageError | None]


@functools.lru_cache(maxsize=1)
def _decoder(
    image: ImageOptions, filters: FilterOptions, *, hash_pixels: bool
) -> Decoder:
    """The decoder of this process: starting its child once is enough."""
    return Decoder(image, filters, hash_pixels=hash_pixels)


class _RangeWriter:
    """One attempt at one range."""

    def __init__(
        self, work: Work, plan: RangePlan, local: Path, directory: str
    ) -> None:
        self._work, self._plan = work, plan
        self._local, self._directory = local, directory
        self._corpus, self._kept = work.corpora[plan.source], work.kept
        columns = self._corpus.columns
        self._template = caption_template(columns)
        # Nothing else compares pixels, and hashing them takes half as long as encoding.
        self._decoder = _decoder(
            work.image, work.filter, hash_pixels=work.comparison.exact
        )
        self._json_names = (*JSON_KEYS, *self._kept)
        schema = self._corpus.source.schema
        self._where = RowFilter(work.where, schema) if work.where else None
        self._cleaner = CaptionCleaner(work.text)
        self._encoder = CaptionEncoder(work.tokenizer)
        self._writers: dict[str, ShardWriter] = {}
        self._signatures: list[tuple[Any, ...]] = []
        self._tally = Tally()
        self._rows = 0
        self._before: Counter[str] = Counter()

    def run(self, report: Report) -> StagedRange:
        """Process every input, and close the files."""
        keep_pages()
        with ImageReader(
            self._work.fetch,
            base=self._corpus.source.base,
            max_bytes=self._work.image.max_bytes,
            image_list=self._corpus.columns.image_list,
            hashes=self._corpus.columns.sha256,
        ) as reader:
            for chunk in self._chunks(reader):
                self._write(chunk)
                self._tally.retried = Counter(reader.retried)
                report(self._tally.plain())
        staged: dict[str, StagedShard | None] = {
            split: self._writers[split].close() for split in sorted(self._writers)
        }
        self._save_signatures()
        return StagedRange(
            number=self._plan.number,
            run=self._work.run,
            directory=self._directory,
            rows=self._rows,
            accounting=self._accounting(),
            shards=tuple(shard for shard in staged.values() if shard is not None),
            rejected={
                split: self._writers[split].table_sha256
                for split, shard in staged.items()
                if shard is None
            },
            retried=dict(sorted(self._before.items())),
        )

    def _chunks(self, reader: ImageReader) -> Iterator[list[_Read]]:
        """What is read, a few inputs at a time: what is done to the bytes of a chunk
        finds them in the processor's cache.
        """
        chunk: list[_Read] = []
        size = 0
        for prepared, data in self._read(reader):
            if isinstance(data, bytes):
                prepared.row["sha256"] = hashlib.sha256(data).hexdigest()
                size += len(data)
            chunk.append((prepared, data))
            if len(chunk) == CHUNK_IMAGES or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _read(self, reader: ImageReader) -> Iterator[_Read]:
        """Inputs in order, with the bytes of those that are not rejected already. The
        reader looks ahead, so inputs wait here for their bytes.
        """
        waiting: deque[_Prepared] = deque()

        def cells() -> Iterator[Cell]:
            for prepared in self._prepared():
                waiting.append(prepared)
                if prepared.rejected is None:
                    yield prepared.cell
                else:
                    # Many may wait for the next that is kept: not with their images.
                    prepared.forget()

        for data in reader.read(cells()):
            while (prepared := waiting.popleft()).rejected is not None:
                yield prepared, None
            yield prepared, data
        for prepared in waiting:
            yield prepared, None

    def _prepared(self) -> Iterator[_Prepared]:
        position = 0
        for chunk in _batched(self._inputs(), CHUNK_IMAGES):
            prepared = [
                self._prepare(position + place, *given)
                for place, given in enumerate(chunk)
            ]
            position += len(chunk)
            self._tokenize(prepared)
            self._select(prepared)
            yield from prepared

    def _inputs(self) -> Iterator[tuple[Input, str | None]]:
        """Every input, and the key of its failed attempt where it is tried again."""
        if self._plan.retried is None:
            for given in self._of(self._plan):
                yield given, None
            return
        attempts = read_attempts(self._work.storage, self._plan.retried)
        self._before.update(attempts.counts())
        for number, keys in attempts.by_range():
            part = self._of(self._work.plan.range(number))
            for position, given in enumerate(islice(part, max(keys) + 1)):
                if position in keys:
                    yield given, keys[position]

    def _of(self, plan: RangePlan) -> Iterator[Input]:
        corpus = self._corpus
        names = corpus.columns.sample + corpus.grouping.all_columns
        names += self._where.columns if self._where else ()
        rows = corpus.source.rows(tuple(dict.fromkeys(names)), plan.start, plan.stop)
        return corpus.grouping.inputs(rows, plan.first_row, corpus.columns.image)

    def _prepare(self, position: int, given: Input, retry_of: str | None) -> _Prepared:
        """What is known of an input from its rows."""
        self._rows += given.n_rows
        columns, first = self._corpus.columns, given.rows[0]
        kept = dict.fromkeys(self._kept, "")
        kept |= {name: _text(first[name]) for name in columns.keep}
        url = _text(first[columns.url]) if columns.url else ""
        row: dict[str, Any] = dict.fromkeys(_ROW_NAMES)
        row |= {
            "key": sample_key(self._plan.number, position),
            "uid": f"{given.uid:016x}",
            "url": url or given.locator,
            "source": self._corpus.name,
            "split": given.split,
            "retry_of": retry_of,
            **kept,
        }
        sha256 = first[columns.sha256] if columns.sha256 else None
        prepared = _Prepared(
            position=position,
            given=given,
            row=row,
            cell=Cell(value=first[columns.image], sha256=sha256),
            columns={n: first[n] for n in columns.sample if n != columns.image},
        )
        try:
            self._check_rows(given)
            cells = caption_cells(given.rows, columns, self._template)
            prepared.captions, reason = self._cleaner.clean(cells)
            if reason is not None:
                # Whoever reads the table sees what was thought too little.
                raise Rejected("filtered", reason, self._cleaner.first(cells))
        except Rejected as rejected:
            prepared.rejected = rejected
        return prepared

    def _check_rows(self, given: Input) -> None:
        if given.n_rows > MAX_ROWS:
            detail = f"{given.n_rows} rows of one id, at most {MAX_ROWS} are read"
            raise Rejected("failed", "too_many_rows", detail)
        columns = self._corpus.columns
        for name in columns.sample:
            if any(isinstance(cells[name], BadText) for cells in given.rows):
                what = _BAD_FILE if self._corpus.source.kind == "folder" else _BAD_CELL
                raise Rejected("failed", "bad_text", f"column {name!r} is {what}")
        if given.images_differ:
            raise Rejected("failed", "images_differ", "rows of one id differ in image")
        if not given.has_split:
            raise Rejected("failed", "missing_split", "the split column is empty")

    def _tokenize(self, chunk: Sequence[_Prepared]) -> None:
        """Ids of all captions of the chunk at once."""
        alive = [prepared for prepared in chunk if prepared.rejected is None]
        encoded = self._encoder.encode_batch([one.captions for one in alive])
        for prepared, (captions, ids) in zip(alive, encoded, strict=True):
            prepared.captions, prepared.ids = captions, ids
            if not captions:
                prepared.rejected = Rejected("filtered", "empty_caption")
                continue
            prepared.row |= {
                "caption": captions[0],
                "captions": captions,
                "n_captions": len(captions),
                "n_tokens": len(ids),
            }

    def _select(self, chunk: Sequence[_Prepared]) -> None:
        """The filters that need no image."""
        alive = [prepared for prepared in chunk if prepared.rejected is None]
        matched = [True] * len(alive)
        if self._where and alive:
            matched = self._where.matches([one.given.rows[0] for one in alive])
        sep = self._work.tokenizer.info.special_ids["sep"]
        for prepared, matches in zip(alive, matched, strict=True):
            reason = self._work.uids.reason(prepared.given.uid)
            if not matches:
                reason = "where"
            try:
                if reason is not None:
                    raise Filtered(reason, "")
                lengths = [len(prepared.ids) - 1]
                if len(prepared.captions) > 1:
                    ends = np.flatnonzero(prepared.ids == sep)
                    lengths = (np.diff(ends, prepend=-1) - 1).tolist()
                check_tokens(lengths, self._work.filter)
            except Filtered as filtered:
                prepared.rejected = Rejected(
                    "filtered", filtered.reason, filtered.detail
                )

    def _write(self, chunk: Sequence[_Read]) -> None:
        """Decode a chunk, and write its samples and rejections in order."""
        requests = [
            Request(data=data, captions=one.captions, columns=one.columns)
            for one, data in chunk
            if isinstance(data, bytes)
        ]
        try:
            results = self._decoder.encode(requests)
        except FunctionError as error:
            sent = [one for one, data in chunk if isinstance(data, bytes)]
            place = next(n for n, one in enumerate(requests) if one is error.request)
            raise _named(sent[place : place + 1], error) from error
        except Exception as error:
            raise _named([one for one, _ in chunk], error) from error
        images = [one for one in results if isinstance(one, EncodedImage)]
        hashes = iter(perceptual_hashes([image.thumbnail for image in images]))
        outcomes = iter(results)
        for prepared, data in chunk:
            outcome: Result | None = None
            if isinstance(data, bytes):
                self._tally.read_bytes += len(data)
                outcome = next(outcomes)
            elif isinstance(data, ImageError):
                outcome = data
            if isinstance(outcome, EncodedImage):
                prepared.row["phash"] = next(hashes)
            self._count(prepared, outcome)

    def _count(self, prepared: _Prepared, outcome: Result | None) -> None:
        rejected = prepared.rejected
        if isinstance(outcome, ImageError):
            rejected = Rejected("failed", outcome.reason, outcome.detail)
        elif isinstance(outcome, Filtered):
            rejected = Rejected("filtered", outcome.reason, outcome.detail)
        split = prepared.given.split
        if split not in self._writers:
            form = self._work.image.format
            self._writers[split] = ShardWriter(self._local, split, self._kept, form)
        self._tally.done += 1
        if isinstance(outcome, EncodedImage):
            self._add(prepared, outcome, self._writers[split])
            return
        assert rejected is not None
        if rejected.status == "failed":
            self._tally.failed[rejected.reason] += 1
        else:
            self._tally.filtered[rejected.reason] += 1
        self._writers[split].reject(
            prepared.row
            | {
                "status": rejected.status,
                "reason": rejected.reason,
                "detail": rejected.detail[:_DETAIL] or None,
            }
        )

    def _add(
        self, prepared: _Prepared, image: EncodedImage, writer: ShardWriter
    ) -> None:
        row = prepared.row
        row |= {
            "status": "success",
            "width": image.width,
            "height": image.height,
            "original_width": image.original_width,
            "original_height": image.original_height,
            "jpg_bytes": len(image.data),
            "pixels_sha256": image.pixels_sha256,
            "exif": image.exif,
        }
        self._tally.written_bytes += writer.add(
            Sample(
                key=row["key"],
                uid=prepared.given.uid,
                ids=prepared.ids,
                image=image.data,
                width=image.width,
                height=image.height,
                captions=prepared.captions,
                json={name: row[name] for name in self._json_names},
            ),
            row,
        )
        self._tally.written += 1
        place = self._work.split_names.index(prepared.given.split)
        self._signatures.append(signature(prepared.position, place, row))

    def _accounting(self) -> Accounting:
        counts = self._tally
        return Accounting(
            inputs=counts.done,
            written=counts.written,
            filtered=dict(sorted(counts.filtered.items())),
            failed=dict(sorted(counts.failed.items())),
        )

    def _save_signatures(self) -> None:
        array = np.array(self._signatures, dtype=compare.SIGNATURE_DTYPE)
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        (self._local / SIGNATURES).write_bytes(file.getvalue())


# img2dataset's names where it has them, in its order, then ours.
JSON_KEYS = (
    *("key", "url", "caption", "status", "width", "height"),
    *("original_width", "original_height", "exif", "sha256"),
    *("captions", "source", "uid"),
)


def _named(inputs: Sequence[_Prepared], error: Exception) -> Exception:
    """An exception that nobody foresaw, with the inputs that it may be about."""
    first, last = inputs[0], inputs[-1]
    which = f"input {first.row['key']} ({first.given.locator})"
    if first is not last:
        which = (
            f"inputs {first.row['key']} to {last.row['key']} "
            f"({first.given.locator} ...)"
        )
    told = isinstance(error, (OSError, ValueError, RuntimeError))
    kind = OSError if isinstance(error, OSError) else RuntimeError
    return kind(f"{which}: {error if told else repr(error)}")


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _text(value: Any) -> str:
    """A passthrough cell as text: readers need one type per key, never null."""
    if value is None or isinstance(value, BadText):
        return ""
    if isinstance(value, (bool, int, float, list, tuple, dict)):
        return json.dumps(value, default=str)
    # Text, or what JSON has no words for: dates, decimals.
    return str(value)
