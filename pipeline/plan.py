"""From rows to ranges: how a corpus is cut, before the first image is read.

Owns the table of ranges and the captions that a tokenizer is trained on. Does not own
which rows make an input (`pipeline.grouping`), reading (`pipeline.sources`) or
processing (`pipeline.ranges`). The plan depends on the corpus and the config alone, so
any driver makes the same one. Memory is O(ranges): a scan keeps nothing of the inputs
but where each range begins, and tasks group their own rows again by the same rule.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.attempts import RetriedRange
from pipeline.captions import CaptionCleaner
from pipeline.columns import Columns
from pipeline.filters import Template
from pipeline.grouping import MAX_ROWS, TRAIN, VAL, Grouping, split_order
from pipeline.sources import NeedsSpool, Source

# Ranges have six digits in a sample's key.
MAX_RANGES = 1_000_000
# A split is one byte where inputs are compared.
MAX_SPLITS = 255
# Enough to fix a vocabulary; more only costs the driver time.
_TOKENIZER_INPUTS = 2_000_000

RANGE_DTYPE = np.dtype(
    [
        ("source", "<u4"),
        ("start", "<i8"),
        ("stop", "<i8"),
        ("first_row", "<i8"),
        ("inputs", "<i8"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """An opened source, and what its columns are for."""

    name: str
    weight: float
    given: Source | NeedsSpool
    columns: Columns
    grouping: Grouping

    @property
    def source(self) -> Source:
        """The source, which can be read once it is sorted where that is needed."""
        assert not isinstance(self.given, NeedsSpool)
        return self.given


@dataclass(frozen=True, kw_only=True)
class RangePlan:
    """One range, as sent to the task that processes it: where it lies, not its rows."""

    number: int
    source: int
    """Place of its corpus in the run."""
    start: int
    """Cursor of its first row."""
    stop: int
    """Cursor past its last row."""
    first_row: int
    inputs: int
    retried: RetriedRange | None = None
    """Instead of rows, for a range of a retry: where its inputs are listed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every range of a run, in order."""

    table: np.ndarray
    """Records (ranges,) of `RANGE_DTYPE`."""
    split_names: tuple[str, ...]
    """Held-out splits first: where one image lies in two, the earlier keeps it."""

    @property
    def n_ranges(self) -> int:
        """Ranges of the corpus, retries not counted."""
        return len(self.table)

    @property
    def n_inputs(self) -> int:
        """Inputs of the corpus."""
        return int(self.table["inputs"].sum())

    def range(self, number: int) -> RangePlan:
        """Range `number`."""
        row = self.table[number]
        return RangePlan(
            number=number,
            source=int(row["source"]),
            start=int(row["start"]),
            stop=int(row["stop"]),
            first_row=int(row["first_row"]),
            inputs=int(row["inputs"]),
        )

    def table_bytes(self) -> bytes:
        """The table as an npy file, to be stored."""
        file = io.BytesIO()
        np.save(file, self.table, allow_pickle=False)
        return file.getvalue()


def read_table(data: bytes) -> np.ndarray:
    """The table of `Plan.table_bytes`. Raises ValueError where it is damaged."""
    table = np.load(io.BytesIO(data), allow_pickle=False)
    if table.dtype != RANGE_DTYPE:
        raise ValueError(f"the stored plan holds {table.dtype}, not ranges")
    return table


def make_plan(
    corpora: Sequence[Corpus],
    *,
    samples: int,
    limit: int | None,
    on_scan: Callable[[int, int], None] = lambda corpus, cursor: None,
) -> Plan:
    """Cut the corpora into ranges of `samples` inputs, at most `limit` in all.
    `on_scan` gets the place of the corpus being scanned, and the cursor reached.

    Raises:
        ValueError: unusable names of splits, too many ranges, or nothing to do.
    """
    names, left = {TRAIN}, limit
    tables: list[np.ndarray] = []
    for place, corpus in enumerate(corpora):
        room = MAX_RANGES - sum(len(table) for table in tables)
        scan = _Scan(corpus, samples, left, room, names)
        for cursor in scan.run():
            on_scan(place, cursor)
        tables.append(scan.table(place))
        if left is not None:
            left -= scan.inputs
            if left <= 0:
                break
    return Plan(table=np.concatenate(tables), split_names=split_order(names))


def training_captions(
    plan: Plan, corpora: Sequence[Corpus], cleaner: CaptionCleaner
) -> Iterator[str]:
    """Cleaned captions of inputs that are not held out: of every range, or of evenly
    spaced ones that hold about two million inputs.
    """
    stride = max(1, -(-plan.n_inputs // _TOKENIZER_INPUTS))
    for number in range(0, plan.n_ranges, stride):
        part = plan.range(number)
        corpus = corpora[part.source]
        names = corpus.grouping.all_columns + corpus.columns.captions
        rows = corpus.source.rows(tuple(dict.fromkeys(names)), part.start, part.stop)
        template = caption_template(corpus.columns)
        for given in corpus.grouping.inputs(rows, part.first_row):
            if given.split == TRAIN and given.n_rows <= MAX_ROWS:
                cells = caption_cells(given.rows, corpus.columns, template)
                yield from cleaner.clean(cells)[0]


def caption_template(columns: Columns) -> Template | None:
    """The template of a corpus, where its captions are made of columns."""
    return Template(columns.template, columns.captions) if columns.template else None


def caption_cells(
    rows: Sequence[Mapping[str, Any]], columns: Columns, template: Template | None
) -> list[Any]:
    """What the captions of an input are cleaned from, in order."""
    if template is not None:
        return [template.render(row) for row in rows]
    return [row[name] for row in rows for name in columns.captions]


class _Scan:
    """One pass over the columns of a corpus that tell inputs apart."""

    def __init__(
        self,
        corpus: Corpus,
        samples: int,
        limit: int | None,
        room: int,
        split_names: set[str],
    ) -> None:
        """`room` is how many ranges there may be; splits found join `split_names`."""
        self._corpus, self._samples, self._limit = corpus, samples, limit
        self._room, self._split_names = room, split_names
        self.inputs = 0
        self._begins: list[tuple[int, int]] = []
        self._end: int | None = None

    def run(self) -> Iterator[int]:
        """Scan to the end or the limit, yielding how far it is now and then."""
        source, grouping = self._corpus.source, self._corpus.grouping
        row, last = 0, None
        if not grouping.split and grouping.val:
            self._split_names.add(VAL)
        for batch, cursors in source.scan(grouping.columns):
            if not batch.num_rows and not len(cursors):
                continue
            self._name_splits(batch)
            starts = np.flatnonzero(self._starts(batch, last, len(cursors), row))
            self._count(starts, cursors, row)
            row += len(cursors)
            last = batch.slice(batch.num_rows - 1) if batch.num_rows else None
            yield int(cursors[-1])
            if self._end is not None:
                return

    def table(self, place: int) -> np.ndarray:
        """Records (ranges,) of `RANGE_DTYPE`."""
        end = self._corpus.source.end if self._end is None else self._end
        table = np.zeros(len(self._begins), RANGE_DTYPE)
        table["source"] = place
        if not len(table):
            return table
        cursors, rows = zip(*self._begins, strict=True)
        table["start"], table["first_row"] = cursors, rows
        table["stop"] = (*cursors[1:], end)
        table["inputs"] = self._samples
        table["inputs"][-1] = self.inputs - (len(table) - 1) * self._samples
        return table

    def _starts(
        self,
        batch: pa.RecordBatch,
        last: pa.RecordBatch | None,
        n_rows: int,
        first_row: int,
    ) -> np.ndarray:
        grouping = self._corpus.grouping
        if grouping.key is None and grouping.split is None:
            # Without columns a batch has no length of its own.
            starts = np.ones(n_rows, bool)
        else:
            starts = grouping.starts(batch, last)
        if grouping.sample is None:
            return starts
        rows = np.flatnonzero(starts)
        uids = grouping.uids(batch, rows, first_row)
        starts[rows] = [grouping.taken(uid) for uid in uids]
        return starts

    def _name_splits(self, batch: pa.RecordBatch) -> None:
        grouping = self._corpus.grouping
        self._split_names |= grouping.split_names(batch)
        if len(self._split_names) > MAX_SPLITS:
            some = ", ".join(sorted(self._split_names)[:3])
            raise ValueError(
                f"--split.column {grouping.split}: it names more than {MAX_SPLITS} "
                f"splits ({some}, ...); name the column that says train, val or test"
            )

    def _count(self, starts: np.ndarray, cursors: np.ndarray, row: int) -> None:
        if self._limit is not None and self.inputs + len(starts) > self._limit:
            kept = self._limit - self.inputs
            self._end = int(cursors[starts[kept]])
            starts = starts[:kept]
        first = -self.inputs % self._samples
        for place in starts[first :: self._samples]:
            self._begins.append((int(cursors[place]), row + int(place)))
        self.inputs += len(starts)
        if len(self._begins) > self._room:
            raise ValueError(
                f"--shard.samples {self._samples} cuts the corpus into more than "
                f"{MAX_RANGES} ranges, which is all that keys can number; give more"
            )
