"""What a run is, told from its configuration and its corpora: nothing is written here.

Owns opening the corpora with their columns, and the transform: everything that decides
bytes, which a dataset carries and a resuming driver compares. Does not own the keys
(`pipeline.options`) or the order of a run (`pipeline.run`).
"""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import orjson
import pyarrow as pa
import tokenizers

from pipeline.addresses import Places
from pipeline.columns import Columns, holds_paths, resolve_columns
from pipeline.compare import Comparison
from pipeline.filters import UidLists, load_function, load_uids
from pipeline.grouping import Grouping
from pipeline.images import codec_versions
from pipeline.manifest import SCHEMA_VERSION, canonical_json
from pipeline.options import InputOptions, PreprocessConfig
from pipeline.plan import Corpus, Plan
from pipeline.sources import NeedsSpool, Source, open_source, with_captions
from pipeline.storage import Storage, open_file
from pipeline.tokenizer import StoredTokenizer
from pipeline.where import RowFilter
from pipeline.work import Work

# What of the configuration decides no byte, and may change while a run goes on. How
# patiently URLs are fetched does not belong to a dataset; what may be fetched does.
_FREE = {
    "image": (),
    "dedup": ("bucket_mb",),
    "fetch": ("concurrency", "per_host", "timeout_s", "total_timeout_s", "retries"),
}


def open_corpora(config: PreprocessConfig) -> tuple[Corpus, ...]:
    """Open every input and find its columns.

    Raises:
        ValueError: an input, a column, or the condition of `--where` is not usable.
    """
    return tuple(_open(config, given) for given in config.inputs)


def load_uid_lists(config: PreprocessConfig) -> UidLists:
    """The uids of `--allow_uids` and `--deny_uids`.

    Raises:
        ValueError: a list cannot be read, or a line is no uid.
    """
    lists: dict[str, np.ndarray | None] = {"allow": None, "deny": None}
    for name, url in (("allow", config.allow_uids), ("deny", config.deny_uids)):
        try:
            lists[name] = load_uids(url) if url else None
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"--{name}_uids {url} cannot be read: {reason}") from error
        except ValueError as error:
            raise ValueError(f"--{name}_uids: {error}") from error
    return UidLists(**lists)


def check_function(config: PreprocessConfig) -> None:
    """Raise ValueError where `--filter.function` cannot be loaded: decoders would only
    say so once the corpus is sorted and a tokenizer trained.
    """
    if config.filter.function is not None:
        load_function(config.filter.function)


def transform_of(
    config: PreprocessConfig,
    corpora: Sequence[Corpus],
    tokenizer: StoredTokenizer | None,
) -> dict[str, Any]:
    """Everything that decides bytes: no folders, no times, no worker counts. The sha256
    of a tokenizer that is still to be trained is None.
    """
    trained = config.trained_vocabulary is not None
    transform: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "sources": {corpus.name: _source(corpus) for corpus in corpora},
        "uids": {
            "allow": _digest(config.allow_uids),
            "deny": _digest(config.deny_uids),
        },
        "filter": asdict(config.filter) | {"source": _function_digest(config)},
        "shard": asdict(config.shard),
        "tokenizer": {
            "made": config.tokenizer if trained else "loaded",
            "sha256": tokenizer.info.sha256 if tokenizer else None,
        },
        "versions": {
            **codec_versions(),
            "numpy": np.__version__,
            "orjson": orjson.__version__,
            "pyarrow": pa.__version__,
            "tokenizers": tokenizers.__version__,
            "unicode": unicodedata.unidata_version,
            **({"duckdb": duckdb.__version__} if config.where else {}),
        },
    }
    return _plain(transform) | chosen_by(config)


def chosen_by(config: PreprocessConfig) -> dict[str, Any]:
    """The part of a transform that the configuration alone decides."""
    chosen: dict[str, Any] = {
        "limit": config.limit,
        "sample": config.sample,
        "where": config.where,
        "group": config.group,
        "text": asdict(config.text),
        "split": {"val": config.split.val},
    }
    for group, free in _FREE.items():
        values = asdict(getattr(config, group))
        chosen[group] = {key: value for key, value in values.items() if key not in free}
    return _plain(chosen)


def description_of(
    plan: Plan, corpora: Sequence[Corpus], transform: Mapping[str, Any]
) -> dict[str, Any]:
    """What `plan.json` says, so that a later driver can tell whether it is its own."""
    text = canonical_json(transform)
    return {
        "inputs": plan.n_inputs,
        "ranges": plan.n_ranges,
        "sources": {corpus.name: corpus.weight for corpus in corpora},
        "splits": list(plan.split_names),
        "transform": transform,
        "transform_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def grouping_of(
    config: PreprocessConfig,
    name: str,
    source: Source | NeedsSpool,
    columns: Columns,
) -> Grouping:
    """The rule by which rows of a source are inputs."""
    key = columns.id or (columns.image if holds_paths(source.schema, columns) else None)
    return Grouping(
        source_name=name,
        key=key,
        split=columns.split,
        group=columns.group,
        val=config.split.val,
        sample=config.sample,
    )


def _open(config: PreprocessConfig, given: InputOptions) -> Corpus:
    columns_given = given.columns or config.columns
    group_by = None
    if config.group:
        group_by = columns_given.id or columns_given.image
        if group_by is None:
            plain = open_source(given)
            columns = resolve_columns(
                plain.schema, columns_given, config.split, plain.default_columns
            )
            group_by = columns.id or columns.image
    source = open_source(given, group_by=group_by)
    columns = resolve_columns(
        source.schema, columns_given, config.split, source.default_columns
    )
    source = with_captions(source, set(columns.captions) - columns.identifying)
    # A prefix that allows nothing is told now, not by the first task.
    Places(base=source.base, allow=config.fetch.allowed)
    if config.where:
        # Named now, before anything is written.
        try:
            RowFilter(config.where, source.schema)
        except ValueError as error:
            raise ValueError(f"input {given.source_name}: {error}") from error
    grouping = grouping_of(config, given.source_name, source, columns)
    if config.group and grouping.key is None:
        raise ValueError(
            "--group brings rows with one id together, and this corpus has none: its "
            "images are bytes; name the column with --columns.id"
        )
    return Corpus(
        name=given.source_name,
        weight=given.weight,
        given=source,
        columns=columns,
        grouping=grouping,
    )


def _source(corpus: Corpus) -> dict[str, Any]:
    files = {}
    for file in corpus.given.fingerprint():
        rest = dict(file)
        files[rest.pop("file")] = rest
    return {
        "format": corpus.given.kind,
        "files": files,
        "columns": asdict(corpus.columns),
        "weight": corpus.weight,
    }


def _function_digest(config: PreprocessConfig) -> str | None:
    """sha256 of the module of the user's own filter: with another one, other inputs
    would be kept.
    """
    if config.filter.function is None:
        return None
    name = config.filter.function.partition(":")[0]
    load_function(config.filter.function)
    origin = getattr(sys.modules[name], "__file__", None)
    if origin is None:
        return None
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest()


def _digest(url: str | None) -> str | None:
    if url is None:
        return None
    digest = hashlib.sha256()
    with open_file(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Tuples as lists: as JSON gives them back, so that stored and new compare."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def work_of(
    config: PreprocessConfig,
    corpora: tuple[Corpus, ...],
    plan: Plan,
    storage: Storage,
    tokenizer: StoredTokenizer,
    *,
    run: str,
) -> Work:
    """What the tasks of a run share; `run` is the sha256 of its transform."""
    comparison = Comparison(
        near=config.dedup.near,
        exact=config.dedup.exact,
        splits=len(plan.split_names) > 1,
        identity=any(corpus.grouping.key is not None for corpus in corpora),
        caption_repeats=config.dedup.caption_repeats,
        inputs=plan.n_inputs,
        ranges=plan.n_ranges,
        memory=config.dedup.bucket_mb * 1_000_000,
    )
    return Work(
        storage=storage,
        corpora=corpora,
        plan=plan,
        split_names=plan.split_names,
        image=config.image,
        text=config.text,
        filter=config.filter,
        fetch=config.fetch,
        where=config.where,
        uids=load_uid_lists(config),
        tokenizer=tokenizer,
        comparison=comparison,
        run=run,
    )
