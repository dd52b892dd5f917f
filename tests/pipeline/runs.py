"""A run of a small corpus in this process, without Ray, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import compare
from pipeline.dataset import DatasetWriter
from pipeline.describe import description_of, open_corpora, transform_of, work_of
from pipeline.options import PreprocessConfig
from pipeline.phases import spooled
from pipeline.plan import Plan, make_plan
from pipeline.ranges import write_range
from pipeline.records import RangeRecord, shards_of
from pipeline.settle import place_range, settle_range
from pipeline.staging import COMPARE, StagedRange
from pipeline.storage import open_storage
from pipeline.tokenizer import train_tokenizer
from pipeline.work import Work

Row = tuple[bytes, str, str]
TOKENIZER = train_tokenizer(["a bird", "a kite"], 64)


def write_rows(path: Path, rows: list[Row]) -> Path:
    """A Parquet table of (image bytes, split, caption) rows."""
    images, splits, captions = zip(*rows, strict=True)
    table = {"image": images, "split": splits, "caption": captions}
    pq.write_table(pa.table(table), path)
    return path


def silent(tally: Mapping[str, object]) -> None:
    """A report that goes nowhere."""


class LocalRun:
    """What the command does, in the order in which it does it."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.storage = open_storage(config.output)
        self.writer = DatasetWriter(self.storage)
        corpora = open_corpora(config)
        self.corpora = spooled(corpora, self.writer)
        self.plan: Plan = make_plan(
            self.corpora, samples=config.shard.samples, limit=config.limit
        )
        transform = transform_of(config, self.corpora, TOKENIZER)
        self.described = description_of(self.plan, self.corpora, transform)
        run = self.described["transform_sha256"]
        self.work: Work = work_of(
            config, self.corpora, self.plan, self.storage, TOKENIZER, run=run
        )

    def open(self) -> DatasetWriter:
        """Begin or continue."""
        self.writer = DatasetWriter(self.storage)
        if self.writer.stored_plan() is not None:
            assert self.writer.stored_tokenizer() == TOKENIZER
        self.writer.begin(self.described, self.plan, TOKENIZER)
        return self.writer

    def settled(self) -> list[StagedRange]:
        """Stage, compare and settle every range."""
        numbers = range(self.plan.n_ranges)
        for number in numbers:
            write_range(self.work, self.plan.range(number), silent)
        comparison = self.work.comparison
        if comparison.needed:
            for group in range(comparison.groups):
                compare.scatter(self.storage, COMPARE, comparison, group)
            for bucket in range(comparison.buckets):
                compare.match(self.storage, COMPARE, comparison, bucket)
            for group in range(comparison.groups):
                compare.collect(self.storage, COMPARE, comparison, group)
        return [settle_range(self.work, number, silent) for number in numbers]

    def commit(self, staged: StagedRange) -> RangeRecord:
        """Place and commit the next range."""
        placement = self.writer.names_for(staged, self.writer.taken())
        place_range(self.work, placement, silent)
        source = self.plan.range(staged.number).source
        shards = shards_of(placement, self.corpora[source].name)
        return self.writer.commit(staged, shards, staged.verdicts)

    def committed(self) -> DatasetWriter:
        """All of it, but for the manifest."""
        writer = self.open()
        for staged in self.settled()[len(writer.records) :]:
            self.commit(staged)
        return writer
