"""The index run: tars, tokenizer, one record a tar, manifest, in this order.

Owns which tars a folder has, resuming, and the files of the finished dataset. Does not
own what lies beside a tar (`pipeline.index_tar`) or the schema (`pipeline.manifest`).
After `kill -9` at any moment the folder holds whole files and nothing to clean by hand:
a tar is done when its record below `.palimpsest/indexed/` says so.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tokenizers
from tqdm import tqdm

from pipeline.archive import Archive
from pipeline.captions import CaptionCleaner
from pipeline.config import differences
from pipeline.filters import Filtered
from pipeline.images import ImageError, codec_versions
from pipeline.index_tar import IndexWork, TarIndexer, TarRecord, mapped
from pipeline.indexed import (
    INDEX_PLAN,
    RECORDS,
    STATE,
    finish,
    place,
    stored_tokenizer,
    trained_vocabulary,
    transform_digest,
)
from pipeline.lease import Lease
from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    SCHEMA_VERSION,
    TOKENIZER,
    TOKENIZER_JSON,
    Accounting,
    Manifest,
    canonical_json,
)
from pipeline.manifest_checks import check_fields, read_json, understood
from pipeline.pictures import CHECKS
from pipeline.processes import cpus, map_processes
from pipeline.storage import STAGING, Storage, open_storage
from pipeline.tar_samples import SampleReader
from pipeline.terminal import printable
from pipeline.tokenizer import (
    StoredTokenizer,
    load_tokenizer,
    train_tokenizer,
)

if TYPE_CHECKING:
    from pipeline.index import IndexConfig

_SPLITS = {"valid": "val", "validation": "val", "dev": "val"}
_DEFAULT_TOKENIZER = "train:8000"
# Samples that a tokenizer is trained on at most; more change it little.
_TRAINING_SAMPLES = 2_000_000


def index(config: IndexConfig) -> Manifest:
    """Index the tars of a folder, or what is left of them, and return the manifest.

    Raises:
        ValueError: no tars, a dataset of another command, another configuration than
            last time, or nothing that could be indexed.
    """
    if config.check not in CHECKS:
        raise ValueError(f"--check {config.check!r} is not one of: {', '.join(CHECKS)}")
    storage = open_storage(config.dataset)
    _refuse_other_datasets(storage)
    tars = _tars(storage, config.split)
    with Lease(storage) as lease:
        # What processes left that were killed while they wrote.
        storage.remove_tree(STAGING)
        plan = _stored_plan(storage)
        tokenizer = _tokenizer(config, storage, plan, tars)
        transform = _transform(config, tokenizer)
        _begin(config, storage, plan, transform, tokenizer)
        records = _index_tars(config, storage, tars, transform, tokenizer, lease.check)
        lease.check()
        return finish(storage, records, transform, tokenizer)


def summary(manifest: Manifest, where: str) -> str:
    """What was indexed, for people."""
    counts = manifest.accounting
    lines = [f"{where}: {counts.inputs} samples, {counts.written} in the index"]
    for title, reasons in (("filtered", counts.filtered), ("failed", counts.failed)):
        lines += [f"  {title:<9} {count} {name}" for name, count in reasons.items()]
    for split, row in manifest.totals().items():
        lines.append(
            f"  {split}: {row['samples']} samples, {row['captions']} captions, "
            f"{row['tokens']} tokens in {row['shards']} tars, {row['bytes'] / 1e6:.1f} "
            "MB"
        )
    return "\n".join(map(printable, lines))


def _refuse_other_datasets(storage: Storage) -> None:
    whose = "the same `python -m pipeline.preprocess` completes it"
    if storage.size(f"{STATE}/plan.json") is None:
        if storage.size(MANIFEST) is None or storage.size(INDEX_PLAN) is not None:
            return
        whose = (
            f"remove {MANIFEST} and {MANIFEST_SHA256} to index its tars all the same"
        )
    raise ValueError(f"{storage.url} is a dataset with an index already; {whose}")


def _tars(storage: Storage, top: str) -> dict[str, str]:
    """Split of every tar of the folder, by name, in order."""
    tars, deeper = {}, 0
    names = [name for name in storage.names() if not name.startswith(f"{STATE}/")]
    for name in names:
        if not name.endswith(".tar"):
            continue
        parts = name.split("/")
        if len(parts) > 2:
            deeper += 1
            continue
        split = parts[0].lower() if len(parts) == 2 else top
        if not re.fullmatch(r"[a-z0-9_]+", split):
            raise ValueError(
                f"folder {parts[0]!r} of {name} is taken for a split, and a split is "
                "lower-case letters, digits and '_': rename it"
            )
        if not name.isprintable() or "\\" in name:
            raise ValueError(f"{name!r} is no name that a manifest can hold: rename it")
        tars[name] = _SPLITS.get(split, split)
    if deeper:
        _say(f"{deeper} tars lie deeper than DIR/SPLIT/ and are left out")
    if not tars:
        packed = any(name.endswith((".tgz", ".tar.gz", ".tar.zst")) for name in names)
        cure = "unpack the compressed ones (gunzip)" if packed else "name their folder"
        raise ValueError(f"no tars in {storage.url} or a folder below it: {cure}")
    return tars


def _stored_plan(storage: Storage) -> Mapping[str, Any] | None:
    if storage.size(INDEX_PLAN) is None:
        return None
    plan = read_json(storage.read(INDEX_PLAN), f"{storage.url}/{INDEX_PLAN}")
    with understood(f"{storage.url}/{INDEX_PLAN}"):
        check_fields({"transform": plan["transform"]})
        if not isinstance(plan["tokenizer"], str | None):
            raise TypeError("tokenizer")
    return plan


def _tokenizer(
    config: IndexConfig,
    storage: Storage,
    plan: Mapping[str, Any] | None,
    tars: Mapping[str, str],
) -> StoredTokenizer:
    """The tokenizer that is named or, unless another is, the one that is there."""
    given = config.tokenizer
    kept = storage.size(f"{TOKENIZER}/{TOKENIZER_JSON}") is not None
    if plan is not None and given == plan["tokenizer"]:
        return stored_tokenizer(storage)
    if given is None and kept:
        return stored_tokenizer(storage)
    given = given or _DEFAULT_TOKENIZER
    if not given.startswith("train:"):
        return load_tokenizer(given)
    vocabulary = trained_vocabulary(given)
    train = [name for name, split in tars.items() if split == "train"] or list(tars)
    return train_tokenizer(_captions(config, storage, train), vocabulary)


def _captions(config: IndexConfig, storage: Storage, tars: list[str]) -> Iterator[str]:
    """Captions to train on: of every tar as many, up to a bound."""
    cleaner = CaptionCleaner(config.text)
    most = -(-_TRAINING_SAMPLES // len(tars))
    for name in tqdm(tars, unit="tar", desc="tokenizer"):
        reader = SampleReader(cleaner, source="", tar=name)
        with mapped(storage, name) as data:
            for sample in islice(Archive(data).samples(), most):
                with contextlib.suppress(ImageError, Filtered):
                    yield from reader.text(sample, data).captions


def _transform(config: IndexConfig, tokenizer: StoredTokenizer) -> dict[str, Any]:
    """Everything that decides bytes beside the tars: no paths, no worker counts."""
    text = asdict(config.text) | {"placeholders": list(config.text.dropped)}
    return {
        "schema": SCHEMA_VERSION,
        "indexed": {"check": config.check, "split": config.split},
        "source": {"name": source_name(config)},
        "text": text,
        "tokenizer": {"sha256": tokenizer.info.sha256},
        "versions": {
            **codec_versions(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def source_name(config: IndexConfig) -> str:
    """Name of the source, given or from the folder."""
    folder = config.dataset.rstrip("/")
    local = "://" not in folder
    name = config.name or (Path(folder).resolve() if local else Path(folder)).name
    if not re.fullmatch(r"[\w.\-]+", name, re.ASCII):
        raise ValueError(
            f"source name {name!r} must be letters, digits, '_', '-' and '.': give one "
            "with --name"
        )
    return name


def _begin(
    config: IndexConfig,
    storage: Storage,
    plan: Mapping[str, Any] | None,
    transform: Mapping[str, Any],
    tokenizer: StoredTokenizer,
) -> None:
    """Write down the tokenizer and, last, what is being made."""
    if plan is not None:
        changed = list(differences(plan["transform"], transform))
        if changed:
            raise ValueError(
                f"{storage.url} was indexed with another configuration "
                f"({'; '.join(changed)}); go back to that, or remove {INDEX_PLAN} in "
                "it to index everything anew"
            )
        return
    for name, data in tokenizer.files.items():
        place(storage, f"{TOKENIZER}/{name}", data)
    plan = {"transform": transform, "tokenizer": config.tokenizer}
    storage.write(INDEX_PLAN, canonical_json(plan).encode())


def _index_tars(
    config: IndexConfig,
    storage: Storage,
    tars: Mapping[str, str],
    transform: Mapping[str, Any],
    tokenizer: StoredTokenizer,
    check: Callable[[], None],
) -> list[TarRecord]:
    """Records of all tars in order, made where there is none that holds."""
    digest = transform_digest(transform)
    present = set(storage.names())
    records: dict[str, TarRecord] = {}
    waiting: dict[str, int] = {}
    for name, split in tars.items():
        size = storage.size(name) or 0
        record = _record(storage, name, digest) if _path(name) in present else None
        sound = record and record.bytes == size and record.split == split
        if record and sound and set(record.files.values()) <= present:
            records[name] = record
        else:
            waiting[name] = size
    if records and waiting:
        _say(f"continuing: {len(records)} of {len(tars)} tars are done")
    work = IndexWork(
        storage=storage,
        source=source_name(config),
        tokenizer=tokenizer,
        text=config.text,
        check=config.check,
    )
    total = sum(waiting.values())
    tasks = [(name, tars[name]) for name in waiting]
    workers = min(config.workers or cpus(), max(len(tasks), 1))
    with tqdm(total=total, unit="B", unit_scale=True, desc="index") as bar:
        for record in map_processes(_indexer, work, tasks, workers=workers):
            check()
            stored = {"transform_sha256": digest, **asdict(record)}
            storage.write(_path(record.name), canonical_json(stored).encode())
            records[record.name] = record
            bar.update(waiting[record.name])
            if not record.ended:
                bar.write(
                    f"{record.name} has no end-of-archive mark: it may be cut short",
                    file=sys.stderr,
                )
    return [records[name] for name in tars]


def _indexer(work: IndexWork) -> Callable[[tuple[str, str]], TarRecord]:
    indexer = TarIndexer(work)
    return lambda task: indexer.index(*task)


def _path(name: str) -> str:
    return f"{RECORDS}/{name}.json"


def _record(storage: Storage, name: str, digest: str) -> TarRecord | None:
    """What an earlier run found; None where that is nothing to go on from."""
    try:
        value = read_json(storage.read(_path(name)), _path(name))
        with understood(_path(name)):
            if value.pop("transform_sha256") != digest:
                return None
            check_fields({"shards": [value], "accounting": value["accounting"]})
            accounting = Accounting(**value["accounting"])
            record = TarRecord(**{**value, "accounting": accounting})
            return record if record.name == name and record.files else None
    except ValueError:
        return None


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
