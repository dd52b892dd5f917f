"""The preprocess run: checks, plan, tokenizer, ranges, manifest, in this order.

Owns the order of things, and that nothing is written before every cheap check has
passed. Each thing itself is owned by the module it is imported from.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from pipeline.columns import Columns, resolve_columns
from pipeline.dataset import DatasetWriter
from pipeline.images import codec_versions
from pipeline.lease import Lease
from pipeline.manifest import (
    SCHEMA_VERSION,
    SPECIAL_TOKENS,
    Accounting,
    Manifest,
    canonical_json,
)
from pipeline.options import PreprocessConfig
from pipeline.plan import Plan, RangeInputs, across_splits, make_plan
from pipeline.progress import Progress, progress_path
from pipeline.ranges import Work, range_digests, write_range
from pipeline.ray_session import map_ranges, refuse_relative_in_job, session
from pipeline.sources import Source, open_source
from pipeline.tokenizer import StoredTokenizer, load_tokenizer, train_tokenizer

_MANIFEST_SECONDS = 10.0


def preprocess(config: PreprocessConfig) -> Manifest:
    """Make, continue or recognise the dataset of `config` and return its manifest.

    Raises:
        ValueError: the corpus, tokenizer or output cannot be used; nothing was written,
            or nothing could be kept and all of it was removed.
    """
    refuse_relative_in_job(config.output)
    _refuse_inside_input(config)
    writer = DatasetWriter(Path(config.output).absolute())
    stored = writer.stored_plan()
    made = writer.finished() if stored is not None else None
    if made is None:
        writer.refuse_unwritable()
    source = open_source(config.input)
    columns = resolve_columns(source.schema, config.columns, config.split)
    tokenizer = _known_tokenizer(config, writer, resuming=stored is not None)
    if stored is not None and tokenizer is not None:
        writer.refuse_other(_transform(config, source, columns, tokenizer), stored)
    if made is not None and _is_whole(config, writer, made):
        return made
    lease = Lease(writer.lease_path)
    lease.refuse_if_held()
    writer.refuse_unwritable()
    plan = make_plan(config, source, columns)
    _report_plan(config, plan)
    tokenizer = tokenizer or _trained(config, plan)
    transform = _transform(config, source, columns, tokenizer)
    with session(config.workers):
        writer.create()
        with lease:
            described = _description(config, plan, transform)
            _process(config, plan, writer, lease, described, tokenizer)
            accounting = writer.accounting()
            if accounting.written:
                return writer.finish(described, tokenizer)
            writer.abandon()
        writer.remove_emptied()
    with contextlib.suppress(OSError):
        progress_path(writer.root).unlink()
    raise ValueError(
        f"nothing could be kept of {plan.n_inputs} inputs: {_reasons(accounting)}; "
        f"{config.output} was removed again"
    )


def _refuse_inside_input(config: PreprocessConfig) -> None:
    given, output = Path(config.input), Path(config.output)
    if given.is_dir() and output.resolve().is_relative_to(given.resolve()):
        raise ValueError(
            f"--output {config.output} lies in the folder --input {config.input}, all "
            "Parquet files of which are the corpus, the dataset's own included; choose "
            "an --output outside of it"
        )


def _is_whole(
    config: PreprocessConfig, writer: DatasetWriter, manifest: Manifest
) -> bool:
    """Is there nothing left to do? What a killed driver left is removed then."""
    if name := writer.missing_file(manifest):
        _say(f"{config.output} lacks {name}, or it is cut short: it is made again")
        return False
    if writer.left_behind():
        # Another driver may be at its end, and a dataset may lie where nobody writes.
        with contextlib.suppress(ValueError, OSError), Lease(writer.lease_path):
            writer.tidy()
    _say(f"{config.output} is already complete")
    return True


def _description(
    config: PreprocessConfig, plan: Plan, transform: Mapping[str, Any]
) -> dict[str, Any]:
    """What `plan.json` says, so that a later driver can tell whether it is its own."""
    text = canonical_json(transform)
    return {
        "inputs": plan.n_inputs,
        "ranges": plan.n_ranges,
        "rows": plan.n_rows,
        "source": config.source_name,
        "splits": list(plan.split_names),
        "transform": transform,
        "transform_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _process(
    config: PreprocessConfig,
    plan: Plan,
    writer: DatasetWriter,
    lease: Lease,
    described: Mapping[str, Any],
    tokenizer: StoredTokenizer,
) -> None:
    """Bring every range into the dataset."""
    writer.begin(described, tokenizer)
    work = Work(
        staging=writer.staging,
        folder=plan.source.folder,
        columns=plan.columns,
        source_name=config.source_name,
        image=config.image,
        tokenizer=tokenizer,
    )
    plan = _without_leaks(config, plan, work, writer)
    _restore(config, plan, work, writer, lease)
    _write_ranges(config, plan, work, writer, lease, described)
    _refuse_unaccounted(writer, plan)


def _known_tokenizer(
    config: PreprocessConfig, writer: DatasetWriter, *, resuming: bool
) -> StoredTokenizer | None:
    """The tokenizer, unless it is still to be trained on this corpus."""
    if config.trained_vocabulary is None:
        return load_tokenizer(config.tokenizer)
    return writer.stored_tokenizer() if resuming else None


def _trained(config: PreprocessConfig, plan: Plan) -> StoredTokenizer:
    vocabulary = config.trained_vocabulary
    assert vocabulary is not None
    start = time.monotonic()
    tokenizer = train_tokenizer(plan.tokenizer_captions(), vocabulary)
    size = tokenizer.info.vocab_size
    if size == len(SPECIAL_TOKENS):
        raise ValueError(
            "no caption outside the held-out splits to train a tokenizer on; check "
            "--columns.caption, or give --tokenizer a directory"
        )
    _say(f"tokenizer: {size} entries, trained in {time.monotonic() - start:.1f} s")
    return tokenizer


def _transform(
    config: PreprocessConfig,
    source: Source,
    columns: Columns,
    tokenizer: StoredTokenizer,
) -> dict[str, Any]:
    """Everything that decides bytes: no paths, no times, no worker counts."""
    trained = config.trained_vocabulary is not None
    return {
        "schema": SCHEMA_VERSION,
        "input": {file.pop("file"): file for file in source.fingerprint()},
        "limit": config.limit,
        "source": {"name": config.source_name},
        "columns": {
            **asdict(columns),
            "captions": list(columns.captions),
            "keep": list(columns.keep),
        },
        "image": asdict(config.image),
        "shard": asdict(config.shard),
        "split": {"val": config.split.val},
        "tokenizer": {
            "made": config.tokenizer if trained else "loaded",
            "sha256": tokenizer.info.sha256,
        },
        "versions": {
            **codec_versions(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _without_leaks(
    config: PreprocessConfig, plan: Plan, work: Work, writer: DatasetWriter
) -> Plan:
    """The plan without images that a held-out split has too."""
    if len(plan.split_names) == 1:
        return plan
    duplicate = writer.stored_duplicates()
    if duplicate is None:
        digests: list[np.ndarray] = []
        with Progress(
            name="compare splits", total=plan.n_inputs, done=0, path=None
        ) as bar:
            results = map_ranges(
                range_digests,
                work,
                _ranges(plan, 0),
                workers=config.workers,
                poll=lambda counts: bar.running(counts, len(digests)),
            )
            for part in results:
                digests.append(part)
                bar.commit(len(part), 0)
        duplicate = across_splits(np.concatenate(digests), plan.splits)
        writer.store_duplicates(duplicate)
    return plan.without(duplicate)


def _restore(
    config: PreprocessConfig,
    plan: Plan,
    work: Work,
    writer: DatasetWriter,
    lease: Lease,
) -> None:
    """Make ranges again whose files somebody removed: the same bytes, by law 4."""
    damaged = writer.damaged_ranges()
    if not damaged:
        return
    total = sum(len(plan.range(number).locators) for number in damaged)
    with Progress(name="restore", total=total, done=0, path=None) as bar:
        results = map_ranges(
            write_range,
            work,
            (plan.range(number) for number in damaged),
            workers=config.workers,
            poll=lambda counts: None,
        )
        for staged in results:
            lease.check()
            writer.restore(staged)
            bar.commit(staged.accounting.inputs, 0)


def _write_ranges(
    config: PreprocessConfig,
    plan: Plan,
    work: Work,
    writer: DatasetWriter,
    lease: Lease,
    described: Mapping[str, Any],
) -> None:
    done = writer.accounting()
    if writer.records:
        _say(f"continuing: {len(writer.records)} of {plan.n_ranges} ranges are done")
    last_manifest = time.monotonic()
    path = progress_path(writer.root)
    with Progress(
        name="preprocess", total=plan.n_inputs, done=done.inputs, path=path
    ) as bar:
        results = map_ranges(
            write_range,
            work,
            _ranges(plan, len(writer.records)),
            workers=config.workers,
            poll=lambda counts: bar.running(counts, len(writer.records)),
        )
        for staged in results:
            lease.check()
            writer.commit(staged, config.source_name)
            counts = staged.accounting
            bar.commit(counts.inputs, sum(counts.failed.values()))
            if time.monotonic() - last_manifest > _MANIFEST_SECONDS:
                writer.write_manifest(described, work.tokenizer, complete=False)
                last_manifest = time.monotonic()


def _refuse_unaccounted(writer: DatasetWriter, plan: Plan) -> None:
    inputs = writer.accounting().inputs
    if inputs != plan.n_inputs:
        raise ValueError(
            f"{inputs} of {plan.n_inputs} inputs are accounted for; run the same "
            "command again"
        )


def _ranges(plan: Plan, start: int) -> Iterator[RangeInputs]:
    return (plan.range(number) for number in range(start, plan.n_ranges))


def _report_plan(config: PreprocessConfig, plan: Plan) -> None:
    held_out = {
        name: int((plan.splits == place).sum())
        for place, name in enumerate(plan.split_names)
    }
    splits = ", ".join(f"{count} {name}" for name, count in held_out.items())
    _say(
        f"{config.source_name}: {plan.n_rows} rows, {plan.n_inputs} inputs ({splits}), "
        f"{plan.n_ranges} ranges"
    )
    if repeats := int(plan.duplicate.sum()):
        _say(
            f"{repeats} inputs have an identity that another row apart from them has, "
            "and count as duplicates; if their captions matter, sort the corpus by "
            "image"
        )


def _reasons(counts: Accounting) -> str:
    reasons = {**counts.filtered, **counts.failed, "duplicate": counts.duplicates}
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
