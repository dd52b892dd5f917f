"""The phases of a run, under its lease: from a plan to a manifest.

Owns which tasks run in which order, and what the driver does with their results. Does
not own the checks before (`pipeline.run`), the tasks (`pipeline.ranges`,
`pipeline.compare`, `pipeline.settle`) or the order of commits (`pipeline.commits`).
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import compare
from pipeline.captions import CaptionCleaner
from pipeline.commits import Commits
from pipeline.dataset import DatasetWriter
from pipeline.describe import (
    description_of,
    transform_of,
    work_of,
)
from pipeline.lease import Lease
from pipeline.manifest import (
    SPECIAL_TOKENS,
    Accounting,
    Manifest,
)
from pipeline.options import PreprocessConfig
from pipeline.plan import Corpus, Plan, RangePlan, make_plan, training_captions
from pipeline.progress import Progress, ProgressFile, duration, reasons, say
from pipeline.ranges import write_range
from pipeline.ray_metrics import Metrics
from pipeline.ray_session import (
    map_tasks,
    refuse_unshared,
    session,
)
from pipeline.retries import retried
from pipeline.retry import (
    FailedRows,
    announce_retry,
    begin_retry,
    failed_rows,
    pending_ranges,
    retry_announced,
    without_attempts,
)
from pipeline.settle import (
    Placement,
    place_range,
    settle_range,
    store_committed,
    verdict_name,
)
from pipeline.sources import NeedsSpool
from pipeline.staging import COMPARE, StagedRange
from pipeline.tokenizer import StoredTokenizer, train_tokenizer
from pipeline.work import Report, Work


class Run:
    """One driver's way from a plan to a manifest, under its lease."""

    def __init__(
        self,
        config: PreprocessConfig,
        writer: DatasetWriter,
        lease: Lease,
        file: ProgressFile,
        corpora: tuple[Corpus, ...],
    ) -> None:
        self._config, self._writer, self._lease = config, writer, lease
        self._file, self._corpora = file, corpora
        self._metrics: Metrics | None = None
        self._retried: Counter[str] = Counter()
        self.accounting = Accounting()

    def finish(
        self, stored: Mapping[str, Any] | None, tokenizer: StoredTokenizer | None
    ) -> Manifest | None:
        """Go through all phases. None where no input could be kept: then everything
        that was written is gone again.
        """
        self._corpora = spooled(self._corpora, self._writer)
        config = _with_samples(self._config, self._corpora, stored)
        plan = self._writer.read_plan(stored) if stored is not None else None
        if plan is None:
            plan = self._plan(config)
        _report_plan(self._corpora, plan)
        tokenizer = tokenizer or self._trained(config, plan)
        transform = transform_of(config, self._corpora, tokenizer)
        if stored is not None:
            # A tokenizer that was trained again may be another one.
            self._writer.refuse_other(transform, stored)
        described = description_of(plan, self._corpora, transform)
        with session(config.workers):
            refuse_unshared(self._writer.storage)
            self._metrics = Metrics(Path(config.output).name)
            self._writer.begin(described, plan, tokenizer)
            run = described["transform_sha256"]
            work = work_of(
                config, self._corpora, plan, self._writer.storage, tokenizer, run=run
            )
            self._process(config, plan, work, described)
            self.accounting = self._writer.accounting()
            if not self.accounting.written:
                self._lease.check()
                self._writer.abandon()
                return None
            _refuse_unaccounted(self.accounting, plan)
            self._lease.check()
            manifest = self._writer.finish(described, tokenizer)
            again = dict(sorted((self._retried + Counter(retried())).items()))
            if again:
                say(f"tried again in all: {reasons(again, len(again))}")
            self._file.write(completed(manifest, again), final=True)
            return manifest

    def _plan(self, config: PreprocessConfig) -> Plan:
        ends = [corpus.source.end for corpus in self._corpora]
        with Progress(
            phase="plan", total=sum(ends), file=self._file, unit="rows or bytes"
        ) as bar:
            return make_plan(
                self._corpora,
                samples=config.shard.samples,
                limit=config.limit,
                on_scan=lambda place, cursor: bar.reach(sum(ends[:place]) + cursor),
            )

    def _trained(self, config: PreprocessConfig, plan: Plan) -> StoredTokenizer:
        vocabulary = config.trained_vocabulary
        assert vocabulary is not None
        start = time.monotonic()
        cleaner = CaptionCleaner(config.text)
        captions = training_captions(plan, self._corpora, cleaner)
        tokenizer = train_tokenizer(captions, vocabulary)
        size = tokenizer.info.vocab_size
        if size == len(SPECIAL_TOKENS):
            raise ValueError(
                "no caption outside the held-out splits to train a tokenizer on; check "
                "--columns.caption, or give --tokenizer a directory"
            )
        took = duration(time.monotonic() - start)
        say(f"tokenizer: {size} entries, trained in {took}")
        return tokenizer

    def _process(
        self,
        config: PreprocessConfig,
        plan: Plan,
        work: Work,
        described: Mapping[str, Any],
    ) -> None:
        """Bring every range into the dataset."""
        self._restore(plan, work)
        if config.retry_failed:
            self._begin_retry(config, plan, work)
        retries = pending_ranges(self._writer, plan)
        done = len(self._writer.records)
        work = _with_retries(work, retries)
        todo = [plan.range(number) for number in range(done, plan.n_ranges)]
        todo += retries[max(0, done - plan.n_ranges) :]
        if done and todo:
            total = plan.n_ranges + len(retries)
            say(f"continuing: {done} of {total} ranges are committed")
        commits = self._commits(plan, work, described, retries)
        if not work.comparison.needed:
            self._grow(plan, work, todo, commits)
            return
        self._write(plan, work, todo)
        self._compare(work, done, todo)
        self._place(work, self._settle(work, todo), commits)

    def _commits(
        self,
        plan: Plan,
        work: Work,
        described: Mapping[str, Any],
        retries: Sequence[RangePlan],
    ) -> Commits:
        def source_of(number: int) -> str:
            return self._corpora[_part(plan, retries, number).source].name

        def write_manifest() -> None:
            self._writer.write_manifest(described, work.tokenizer, complete=False)

        return Commits(
            self._writer,
            source_of=source_of,
            check=self._lease.check,
            # While inputs are tried again, the manifest of before is the truth.
            write_manifest=None if retries else write_manifest,
        )

    def _grow(
        self, plan: Plan, work: Work, todo: Sequence[RangePlan], commits: Commits
    ) -> None:
        """Write ranges and commit each as soon as it and all before it are written:
        nothing in it depends on any other.
        """
        total = len(self._writer.records) + len(todo)
        with self._writing(plan, todo) as bar:
            bar.ranges(len(self._writer.records), total)
            items = _as_they_come(todo, commits)
            for result in self._map(_write_or_place, work, items, bar, watched=True):
                if isinstance(result, StagedRange):
                    self._lease.check()
                    bar.finish(result.accounting, _line(result))
                    commits.add(result)
                else:
                    commits.placed(result)
                    bar.ranges(len(self._writer.records), total)

    def _write(self, plan: Plan, work: Work, todo: Sequence[RangePlan]) -> None:
        with self._writing(plan, todo) as bar:
            items = ((part.number, part) for part in todo)
            for staged in self._map(write_range, work, items, bar, watched=True):
                self._lease.check()
                bar.finish(staged.accounting, _line(staged))

    def _writing(self, plan: Plan, todo: Sequence[RangePlan]) -> Progress:
        counts = self._writer.accounting()
        before = without_attempts(counts, self._writer.storage, todo)
        return self._progress("preprocess", plan.n_inputs, before=before)

    def _compare(self, work: Work, done: int, todo: Sequence[RangePlan]) -> None:
        """Find what is there twice. Steps that are done do nothing."""
        if not todo:
            return
        if todo[0].retried is not None:
            self._store_committed(work, done)
        groups, buckets = work.comparison.groups, work.comparison.buckets
        steps = ((_scatter, groups), (_match, buckets), (_collect, groups))
        total = 2 * groups + buckets
        with self._progress("compare", total, unit="steps") as bar:
            for function, count in steps:
                items = ((number, number) for number in range(count))
                for _ in self._map(function, work, items, bar):
                    self._lease.check()
                    bar.step()

    def _store_committed(self, work: Work, done: int) -> None:
        records = self._writer.records[:done]
        items = [(record.range, (record.range, record.shards)) for record in records]
        with self._progress("read committed", len(items), unit="ranges") as bar:
            for _ in self._map(store_committed, work, items, bar):
                bar.step()

    def _settle(self, work: Work, todo: Sequence[RangePlan]) -> list[StagedRange]:
        """Drop from every range what is there twice."""
        items = ((part.number, part.number) for part in todo)
        settled = []
        with self._progress("settle", len(todo), unit="ranges") as bar:
            for staged in self._map(settle_range, work, items, bar):
                settled.append(staged)
                bar.step()
        return sorted(settled, key=lambda staged: staged.number)

    def _place(
        self, work: Work, settled: Sequence[StagedRange], commits: Commits
    ) -> None:
        """Give the shards their names, and commit range by range."""
        for staged in settled:
            commits.add(staged)
        items = ((placement.number, placement) for placement in commits.ready())
        with self._progress("commit", len(settled), unit="ranges") as bar:
            for number in self._map(place_range, work, items, bar, ordered=True):
                commits.placed(number)
                bar.step()

    def _restore(self, plan: Plan, work: Work) -> None:
        """Make ranges again whose files somebody removed: the same bytes, by law 4."""
        damaged = self._writer.damaged_ranges()
        if not damaged:
            return
        if work.comparison.needed:
            self._refuse_without_verdicts(damaged)
        say(f"{len(damaged)} committed ranges lack files: they are made again")
        retries = pending_ranges(self._writer, plan)
        parts = [_part(plan, retries, number) for number in damaged]
        total = sum(part.inputs for part in parts)
        with self._progress("restore", total) as bar:
            items = ((part.number, part) for part in parts)
            for staged in self._map(write_range, work, items, bar, watched=True):
                bar.finish(staged.accounting)
        settled = self._settle(work, parts)
        with self._progress("restore files", len(settled), unit="ranges") as bar:
            for staged in settled:
                self._lease.check()
                place = [(staged.number, self._writer.restored(staged))]
                for _ in self._map(place_range, work, place, bar):
                    self._writer.storage.remove_tree(staged.directory)
                    bar.step()

    def _refuse_without_verdicts(self, damaged: Sequence[int]) -> None:
        """What a range was compared with is gone when a run is over."""
        storage = self._writer.storage
        for name in map(verdict_name, damaged):
            if storage.size(name) is None:
                raise ValueError(
                    f"{storage.url} lacks files, and {name}, which says what of them "
                    "was dropped as a duplicate: put it back from a copy, or make the "
                    "dataset anew with a new --output"
                )

    def _begin_retry(self, config: PreprocessConfig, plan: Plan, work: Work) -> None:
        """Find what failed, unless a retry that was begun is still to be finished."""
        retries = pending_ranges(self._writer, plan)
        unfinished = plan.n_ranges + len(retries) > len(self._writer.records)
        if unfinished or retry_announced(self._writer):
            return
        announce_retry(self._writer)
        total = len(self._writer.records)
        with self._progress("find failed", total, unit="ranges") as bar:
            found = self._failed_rows(work, bar)
            count = begin_retry(self._writer, plan, found, config.shard.samples)
        say(f"{count} failed inputs to try again" if count else "nothing failed")

    def _failed_rows(self, work: Work, bar: Progress) -> Iterator[FailedRows]:
        """What the tables of each committed range say, as it is found."""
        items = ((record.range, record) for record in self._writer.records)
        for rows in self._map(failed_rows, work, items, bar):
            self._lease.check()
            yield rows
            bar.step()

    def _progress(
        self,
        phase: str,
        total: int,
        *,
        before: Accounting | None = None,
        unit: str = "inputs",
    ) -> Progress:
        watch = self._metrics.update if self._metrics else None
        return Progress(
            phase=phase,
            total=total,
            file=self._file,
            before=before,
            watch=watch,
            unit=unit,
        )

    def _map(
        self,
        function: Any,
        work: Work,
        items: Any,
        bar: Progress,
        *,
        watched: bool = False,
        ordered: bool = False,
    ) -> Iterator[Any]:
        """Results of tasks as they end, or in order; where they are `watched`, with a
        look at those under way.
        """
        poll = bar.running if watched else None
        workers = self._config.workers
        results = map_tasks(
            function,
            work,
            items,
            workers=workers,
            poll=poll,
            ordered=ordered,
            resources=self._config.task_resources or {},
        )
        for done in results:
            bar.ended(done.number, done.tally)
            self._retried.update(done.tally["retried"])
            yield done.result


def _part(plan: Plan, retries: Sequence[RangePlan], number: int) -> RangePlan:
    """A range of the corpus, or of what is tried again."""
    if number < plan.n_ranges:
        return plan.range(number)
    return retries[number - plan.n_ranges]


def _as_they_come(
    todo: Sequence[RangePlan], commits: Commits
) -> Iterator[tuple[int, RangePlan | Placement] | None]:
    """Ranges to write, and before the next of them those to place by then."""
    for part in todo:
        yield from _numbered(commits)
        yield part.number, part
    while True:
        yield from _numbered(commits)
        yield None


def _numbered(commits: Commits) -> Iterator[tuple[int, Placement]]:
    # Not the range's number: what its writing last reported would count again.
    return ((-1 - placement.number, placement) for placement in commits.ready())


def _write_or_place(
    work: Work, item: RangePlan | Placement, report: Report
) -> StagedRange | int:
    if isinstance(item, Placement):
        return place_range(work, item, report)
    return write_range(work, item, report)


def _scatter(work: Work, group: int, report: Report) -> None:
    del report
    compare.scatter(work.storage, COMPARE, work.comparison, group)


def _match(work: Work, bucket: int, report: Report) -> None:
    del report
    compare.match(work.storage, COMPARE, work.comparison, bucket)


def _collect(work: Work, group: int, report: Report) -> None:
    del report
    compare.collect(work.storage, COMPARE, work.comparison, group)


def _with_retries(work: Work, retries: Sequence[RangePlan]) -> Work:
    """The work with a comparison that knows of ranges beyond the corpus's own."""
    again = sum(part.inputs for part in retries)
    comparison = dataclasses.replace(
        work.comparison,
        inputs=work.comparison.inputs + again,
        ranges=work.comparison.ranges + len(retries),
    )
    return dataclasses.replace(work, comparison=comparison)


def spooled(corpora: Sequence[Corpus], writer: DatasetWriter) -> tuple[Corpus, ...]:
    """The corpora with those sorted first that cannot be read in order as they are."""
    ready = []
    for corpus in corpora:
        given = corpus.given
        if isinstance(given, NeedsSpool):
            say(f"{corpus.name}: sorting (once; a later run finds it done)")
            given = given.spooled(writer.storage, corpus.name)
        ready.append(dataclasses.replace(corpus, given=given))
    return tuple(ready)


def _with_samples(
    config: PreprocessConfig,
    corpora: tuple[Corpus, ...],
    stored: Mapping[str, Any] | None,
) -> PreprocessConfig:
    """The configuration with `shard.samples` picked, where `shard.bytes` was given."""
    if config.shard.bytes is None:
        return config
    if stored is not None:
        return as_stored(config, stored)
    from pipeline.estimate import samples_for

    samples = samples_for(config, corpora)
    say(f"--shard.bytes {config.shard.bytes}: {samples} inputs a shard")
    shard = dataclasses.replace(config.shard, samples=samples)
    return dataclasses.replace(config, shard=shard)


def _line(staged: StagedRange) -> str:
    counts = staged.accounting
    rest = "".join(
        f", {sum(found.values())} {status} ({reasons(found)})"
        for status, found in (
            ("filtered", counts.filtered),
            ("failed", counts.failed),
        )
        if found
    )
    return f"range {staged.number:06d}: {counts.written} of {counts.inputs}{rest}"


def _refuse_unaccounted(counts: Accounting, plan: Plan) -> None:
    if counts.inputs != plan.n_inputs:
        raise ValueError(
            f"{counts.inputs} of {plan.n_inputs} inputs are accounted for; run the "
            "same command again"
        )


def _report_plan(corpora: Sequence[Corpus], plan: Plan) -> None:
    for place, corpus in enumerate(corpora):
        rows = plan.table[plan.table["source"] == place]
        say(
            f"{corpus.name} ({corpus.source.kind}): {int(rows['inputs'].sum())} "
            f"inputs, {len(rows)} ranges"
        )
    if not plan.n_inputs:
        raise ValueError(
            "no inputs: the corpus is empty, or --sample takes none of them"
        )


def as_stored(config: PreprocessConfig, stored: Mapping[str, Any]) -> PreprocessConfig:
    samples = stored["transform"]["shard"]["samples"]
    shard = dataclasses.replace(config.shard, samples=samples)
    return dataclasses.replace(config, shard=shard)


def completed(
    manifest: Manifest, retried: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What progress.json says at the end; `retried` are requests of the whole run that
    were made again, by reason.
    """
    return {
        "phase": "complete",
        "retried": dict(retried or {}),
        "accounting": asdict(manifest.accounting),
        "totals": manifest.totals(),
        "updated": time.time(),
    }
