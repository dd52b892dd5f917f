"""What a run would read and write, from a few of its inputs: `--dry_run`.

Owns the sample and the figures that are drawn from it, and picking `shard.samples` for
`--shard.bytes`. Nothing is written but in a temporary folder that is gone afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import compare
from pipeline.attempts import (
    ATTEMPT_DTYPE,
    PER_RANGE,
    Attempts,
    list_name,
    write_attempts,
)
from pipeline.captions import CaptionCleaner
from pipeline.describe import check_function, load_uid_lists, open_corpora, work_of
from pipeline.manifest import Accounting
from pipeline.options import PreprocessConfig
from pipeline.plan import (
    Corpus,
    Plan,
    RangePlan,
    make_plan,
    training_captions,
)
from pipeline.progress import duration, reasons
from pipeline.ranges import write_range
from pipeline.sources import NeedsSpool
from pipeline.staging import StagedRange
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer import StoredTokenizer, load_tokenizer, train_tokenizer
from pipeline.work import Work

# Inputs of the sample come from this many places, evenly spaced.
_PLACES = 8
_INPUTS_PER_PLACE = 16
_PILOT_INPUTS = 256
_SMALL_VOCABULARY = 1000
_MAX_SAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a sample of the inputs gave to one split."""

    samples: int = 0
    captions: int = 0
    tokens: int = 0
    """With the separator that ends each caption."""
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would do."""

    plan: Plan
    corpora: tuple[Corpus, ...]
    sampled: Accounting
    bytes_per_input: float
    """Written bytes, over all inputs of the sample."""
    seconds_per_input: float
    """Of one core."""
    splits: Mapping[str, Split]
    """What the sample gave to each split that it gave anything to."""
    vocab_size: int
    """Of the run's tokenizer; the sample's may be smaller where one is trained."""

    def as_json(self, config: PreprocessConfig, cores: int) -> dict[str, Any]:
        """The estimate for programs: counts, bytes and seconds of the whole run, and
        those of the sample that they were drawn from.
        """
        n = self.plan.n_inputs
        return {
            "output": config.output,
            "inputs": n,
            "sources": [self._source(place) for place in range(len(self.corpora))],
            "splits": list(reversed(self.plan.split_names)),
            "ranges": self.plan.n_ranges,
            "samples_per_range": config.shard.samples,
            "bytes": n * self.bytes_per_input,
            "seconds_of_one_core": n * self.seconds_per_input,
            "cores": cores,
            "seconds": n * self.seconds_per_input / cores,
            "vocab_size": self.vocab_size,
            "sample": {
                "inputs": self.sampled.inputs,
                "written": self.sampled.written,
                "filtered": dict(self.sampled.filtered),
                "failed": dict(self.sampled.failed),
                "splits": {
                    name: dataclasses.asdict(split)
                    for name, split in self.splits.items()
                },
            },
        }

    def _source(self, place: int) -> dict[str, Any]:
        corpus = self.corpora[place]
        rows = self.plan.table[self.plan.table["source"] == place]
        columns = corpus.columns
        return {
            "name": corpus.name,
            "kind": corpus.source.kind,
            "weight": corpus.weight,
            "inputs": int(rows["inputs"].sum()),
            "image": columns.image,
            "captions": columns.template or ", ".join(columns.captions),
            "identity": corpus.grouping.key or "the row number",
        }

    def text(self, config: PreprocessConfig, cores: int) -> str:
        """The estimate for people."""
        lines = ["dry run: nothing was written", ""]
        for place in range(len(self.corpora)):
            source = self._source(place)
            lines.append(
                f"source {source['name']} ({source['kind']}, "
                f"weight {source['weight']:g})"
            )
            lines.append(f"  inputs    {source['inputs']}")
            lines.append(f"  image     column {source['image']!r}")
            lines.append(f"  captions  {source['captions']!r}")
            lines.append(f"  identity  {source['identity']!r}")
        n = self.plan.n_inputs
        size = n * self.bytes_per_input
        seconds = n * self.seconds_per_input / cores
        lines += [
            f"output {config.output}",
            f"  splits    {', '.join(reversed(self.plan.split_names))}",
            f"  shards    up to {self.plan.n_ranges} ranges of {config.shard.samples} "
            "inputs, a shard for each split of a range",
            f"  size      about {_size(size)}",
            f"  time      about {duration(seconds)} on {cores} cores "
            f"({1 / self.seconds_per_input:.0f} inputs/s per core; starting Ray and "
            "comparisons not counted)",
            f"sample of {self.sampled.inputs} inputs",
            f"  written   {self.sampled.written}",
        ]
        for title, counts in (
            ("filtered", self.sampled.filtered),
            ("failed", self.sampled.failed),
        ):
            if counts:
                lines.append(f"  {title:<9} {reasons(counts, 10)}")
        return "\n".join(lines)


def estimate(config: PreprocessConfig) -> Estimate:
    """Plan the whole run, and process a sample of it here.

    Raises:
        ValueError: as the run itself would before its first shard.
    """
    check_function(config)
    load_uid_lists(config)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder))
        corpora = _spooled(open_corpora(config), storage)
        if config.shard.bytes is not None:
            samples = samples_for(config, corpora)
            shard = dataclasses.replace(config.shard, samples=samples)
            config = dataclasses.replace(config, shard=shard)
        plan = make_plan(corpora, samples=config.shard.samples, limit=config.limit)
        if not plan.n_inputs:
            raise ValueError("no inputs: the corpus is empty, or --sample takes none")
        work = _work(config, corpora, plan, storage)
        parts = list(_sample(plan, storage))
        # Starts the decoder, and reads what is read once.
        _process(work, parts[0])
        start = time.monotonic()
        staged = [_process(work, part) for part in parts]
        took = time.monotonic() - start
    counts = sum((one.accounting for one in staged), Accounting())
    splits = _splits(staged)
    size = sum(split.bytes for split in splits.values())
    return Estimate(
        plan=plan,
        corpora=corpora,
        sampled=counts,
        bytes_per_input=size / counts.inputs,
        seconds_per_input=took / counts.inputs,
        splits=splits,
        vocab_size=config.trained_vocabulary or work.tokenizer.info.vocab_size,
    )


def samples_for(config: PreprocessConfig, corpora: tuple[Corpus, ...]) -> int:
    """Inputs per shard so that a full one has about `shard.bytes`, from the first
    inputs of the corpus: always the same ones.
    """
    assert config.shard.bytes is not None
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder))
        corpora = _spooled(corpora, storage)
        plan = make_plan(corpora, samples=_PILOT_INPUTS, limit=_PILOT_INPUTS)
        work = _work(config, corpora, plan, storage)
        parts = [plan.range(number) for number in range(plan.n_ranges)]
        staged = [_process(work, part) for part in parts]
    counts = sum((one.accounting for one in staged), Accounting())
    size = sum(shard.bytes for one in staged for shard in one.shards)
    if not size:
        raise ValueError(
            f"--shard.bytes: none of the first {counts.inputs} inputs makes a sample, "
            "so there is nothing to measure; give --shard.samples"
        )
    return max(1, min(_MAX_SAMPLES, config.shard.bytes * counts.inputs // size))


def _splits(staged: Sequence[StagedRange]) -> dict[str, Split]:
    found: dict[str, Split] = {}
    for shard in (shard for one in staged for shard in one.shards):
        before = found.get(shard.split, Split())
        found[shard.split] = Split(
            samples=before.samples + shard.samples,
            captions=before.captions + shard.captions,
            tokens=before.tokens + shard.tokens,
            bytes=before.bytes + shard.bytes,
        )
    return found


def cores_of(config: PreprocessConfig) -> int:
    """Cores that a run would have: of the cluster only what `--workers` says."""
    return config.workers or os.cpu_count() or 1


def _sample(plan: Plan, storage: Storage) -> Iterator[RangePlan]:
    places = min(_PLACES, plan.n_ranges)
    for number in range(places):
        part = plan.range(number * plan.n_ranges // places)
        count = min(part.inputs, _INPUTS_PER_PLACE * _PLACES // places)
        # A task takes a choice of inputs as a list of those to try again.
        rows = np.zeros(count, ATTEMPT_DTYPE)
        rows["place"] = part.number * PER_RANGE + np.arange(count)
        name, chosen = list_name(0, number), Attempts(rows=rows, reasons=("",))
        yield RangePlan(
            number=number,
            source=part.source,
            start=0,
            stop=0,
            first_row=0,
            inputs=count,
            retried=write_attempts(storage, name, part.source, chosen),
        )


def _process(work: Work, part: RangePlan) -> StagedRange:
    try:
        staged = write_range(work, part, _no_report)
    except RuntimeError as error:
        # The user's filter function, mostly: told as a run tells it.
        raise OSError(str(error)) from error
    # The next look at this range must process it anew.
    work.storage.remove_tree(".palimpsest/candidates")
    return staged


def _no_report(tally: Mapping[str, object]) -> None:
    del tally


def _work(
    config: PreprocessConfig,
    corpora: tuple[Corpus, ...],
    plan: Plan,
    storage: Storage,
) -> Work:
    # Nothing is compared, but pixels are hashed where that run will hash them.
    nothing = compare.Comparison(
        identity=False,
        exact=config.dedup.exact,
        inputs=plan.n_inputs,
        ranges=plan.n_ranges,
        memory=1,
    )
    tokenizer = _tokenizer(config, corpora)
    work = work_of(config, corpora, plan, storage, tokenizer, run="")
    return dataclasses.replace(work, comparison=nothing, watched=False)


def _tokenizer(
    config: PreprocessConfig, corpora: tuple[Corpus, ...]
) -> StoredTokenizer:
    """The tokenizer, or one trained on the pilot alone where it is to be trained."""
    if config.trained_vocabulary is None:
        return load_tokenizer(config.tokenizer)
    pilot = make_plan(corpora, samples=_PILOT_INPUTS, limit=_PILOT_INPUTS)
    captions = training_captions(pilot, corpora, CaptionCleaner(config.text))
    return train_tokenizer(captions, min(_SMALL_VOCABULARY, config.trained_vocabulary))


def _spooled(corpora: tuple[Corpus, ...], storage: Storage) -> tuple[Corpus, ...]:
    return tuple(
        dataclasses.replace(one, given=one.given.spooled(storage, one.name))
        if isinstance(one.given, NeedsSpool)
        else one
        for one in corpora
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit holds anything")
