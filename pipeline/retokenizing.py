"""The retokenize run: checks, tokenizer, ranges, manifest, in this order.

Owns what a dataset needs to be written again, and the order of things. Does not own a
range (`pipeline.retokenize_range`) or the new dataset's files (`pipeline.dataset`).

What comes out is what preprocess writes with the new tokenizer, byte for byte, as long
as the stored captions are all that it would have seen: captions without a single token
were not stored, nor those of inputs that failed before their captions were read
(bad_text, images_differ), and an input that was dropped as a repeat of one that loses
its last caption now does not come back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import tokenizers
from tqdm import tqdm

from pipeline.attempts import RETRIES
from pipeline.dataset import DatasetWriter, refuse_inside_dataset
from pipeline.grouping import TRAIN
from pipeline.indexed import trained_vocabulary, transform_digest
from pipeline.lease import Lease
from pipeline.manifest import MANIFEST, Accounting, Manifest, Shard
from pipeline.manifest_checks import check_fields, read_json, understood
from pipeline.plan import Plan
from pipeline.processes import cpus, map_processes
from pipeline.records import RangeRecord, shards_of
from pipeline.retokenize_indexed import retokenize_indexed
from pipeline.retokenize_range import RangeRetokenizer, RetokenizeWork
from pipeline.settle import rejected_name, verdict_name
from pipeline.shards import REJECTED, SUFFIXES
from pipeline.staging import STATE, StagedRange
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer import StoredTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from pipeline.retokenize import RetokenizeConfig

_RANGES = f"{STATE}/ranges"
# As preprocess: enough to fix a vocabulary.
_TRAINING_INPUTS = 2_000_000


def retokenize(config: RetokenizeConfig) -> Manifest:
    """Write, continue or recognise the dataset with other tokens.

    Raises:
        ValueError: no complete dataset, one whose state does not fit it, one whose
            inputs were chosen by their tokens, a tokenizer or output that cannot be
            used.
    """
    if _is_indexed(config.dataset):
        return retokenize_indexed(config)
    refuse_inside_dataset(config.output)
    old = _Dataset(config.dataset)
    writer = DatasetWriter(open_storage(config.output))
    stored = writer.stored_plan()
    tokenizer = _tokenizer(config, old, writer, stored)
    described = _described(config, old, tokenizer)
    if stored is not None:
        writer.refuse_other(described["transform"], stored)
        made = writer.finished()
        if made is not None and not writer.missing_file(made):
            return made
    writer.refuse_unwritable()
    with Lease(writer.storage) as lease:
        writer.begin(described, old.plan, tokenizer)
        if writer.damaged_ranges():
            raise ValueError(
                f"{config.output} has lost files of ranges that were done: remove it "
                "and run the same command again"
            )
        for name in old.kept_state():
            writer.storage.write(name, old.storage.read(name))
        _write(config, old, writer, tokenizer, lease.check)
        lease.check()
        if not writer.accounting().written:
            writer.abandon()
            raise ValueError(
                f"no caption has a token with --tokenizer {config.tokenizer}: nothing "
                "would be left; choose another"
            )
        return writer.finish(described, tokenizer)


def _is_indexed(url: str) -> bool:
    manifest = DatasetWriter(open_storage(url)).finished()
    return manifest is not None and manifest.indexed


class _Dataset:
    """The dataset that is there."""

    def __init__(self, url: str) -> None:
        self.storage = open_storage(url)
        writer = DatasetWriter(self.storage)
        manifest = writer.finished()
        if manifest is None or writer.missing_file(manifest):
            raise ValueError(
                f"{url} is no complete dataset: finish it with the command that began "
                "it, and find damage with `python -m pipeline.validate`"
            )
        self.manifest = manifest
        try:
            self.described = _described_in(self.storage)
        except FileNotFoundError:
            raise ValueError(
                f"{url} lacks {STATE}/plan.json: it was copied without hidden files. "
                "`python -m pipeline.index` gives its tars new tokens where they lie, "
                "once its manifest is removed"
            ) from None
        plan = writer.read_plan(self.described)
        if plan is None:
            raise ValueError(
                f"{url} has lost {STATE}/plan.npy: preprocess completes it"
            )
        self.plan: Plan = plan
        self.records = [
            _record(self.storage, name) for name in self.storage.names(_RANGES)
        ]
        self._check_records(url)
        with understood(f"{url}/{MANIFEST}"):
            self._refuse_chosen_by_tokens(url)

    def kept_state(self) -> list[str]:
        """State files that other tokens do not change."""
        verdicts = [
            verdict_name(record.range) for record in self.records if record.verdicts
        ]
        return verdicts + self.storage.names(RETRIES)

    def captions(self) -> Iterator[str]:
        """Captions that preprocess trains a tokenizer on."""
        stride = max(1, -(-self.plan.n_inputs // _TRAINING_INPUTS))
        chosen = range(0, self.plan.n_ranges, stride)
        for record in tqdm(self.records, unit="range", desc="tokenizer"):
            if record.range in chosen:
                yield from self._captions(record)

    def _captions(self, record: RangeRecord) -> Iterator[str]:
        tables = [shard.sidecar(".parquet") for shard in record.shards]
        for name in (*tables, *record.rejected):
            with self.storage.fetch(name) as path:
                table = pq.read_table(path, columns=["captions", "split"])
            for row in table.to_pylist():
                if row["split"] == TRAIN:
                    yield from row["captions"] or ()

    def _check_records(self, url: str) -> None:
        """Names in the records become those of files that are written: they are of
        shards that the sealed manifest has, and of tables in their place.
        """
        shards = [shard for record in self.records for shard in record.shards]
        known = {shard.name: shard for shard in self.manifest.shards}
        numbers = [record.range for record in self.records]
        sound = numbers == list(range(len(numbers)))
        sound &= len(shards) == len(known)
        sound &= all(known.get(shard.name) == shard for shard in shards)
        for record in self.records:
            pattern = re.escape(rejected_name("*", record.range))
            pattern = pattern.replace(r"\*", "[a-z0-9_]+")
            sound &= all(re.fullmatch(pattern, name) for name in record.rejected)
        if not sound:
            raise ValueError(
                f"the records in {url}/{_RANGES} are not those of its manifest: "
                "`python -m pipeline.validate --deep` names every damage"
            )

    def _refuse_chosen_by_tokens(self, url: str) -> None:
        chosen = self.manifest.transform["filter"]
        for key in ("min_tokens", "max_tokens"):
            if chosen[key]:
                raise ValueError(
                    f"{url} was made with --filter.{key} {chosen[key]}, so tokens "
                    "decided which images it has: preprocess the corpus again"
                )


def _tokenizer(
    config: RetokenizeConfig,
    old: _Dataset,
    writer: DatasetWriter,
    stored: Mapping[str, Any] | None,
) -> StoredTokenizer:
    if not config.tokenizer.startswith("train:"):
        return load_tokenizer(config.tokenizer)
    vocabulary = trained_vocabulary(config.tokenizer)
    if stored and stored["transform"]["tokenizer"]["made"] == config.tokenizer:
        return writer.stored_tokenizer()
    return train_tokenizer(old.captions(), vocabulary)


def _described(
    config: RetokenizeConfig, old: _Dataset, tokenizer: StoredTokenizer
) -> dict[str, Any]:
    """The plan of the new dataset: the old one, but for the tokenizer."""
    was = old.described["transform"]
    trained = config.tokenizer.startswith("train:")
    transform = {
        **was,
        "tokenizer": {
            "made": config.tokenizer if trained else "loaded",
            "sha256": tokenizer.info.sha256,
        },
        "versions": {**was["versions"], "tokenizers": tokenizers.__version__},
    }
    digest = transform_digest(transform)
    return {**old.described, "transform": transform, "transform_sha256": digest}


def _write(
    config: RetokenizeConfig,
    old: _Dataset,
    writer: DatasetWriter,
    tokenizer: StoredTokenizer,
    check: Callable[[], None],
) -> None:
    """Bring every range into the new dataset, in order."""
    todo = old.records[len(writer.records) :]
    if not todo:
        return
    work = RetokenizeWork(
        source=old.storage,
        target=writer.storage,
        tokenizer=tokenizer,
        image_format=old.manifest.transform["image"]["format"],
        retries=any(record.retried for record in old.records),
    )
    workers = min(config.workers or cpus(), len(todo))
    taken, waiting = writer.taken(), dict[int, StagedRange]()
    with tqdm(total=len(todo), unit="range", desc="retokenize") as bar:
        for staged in map_processes(RangeRetokenizer, work, todo, workers=workers):
            waiting[staged.number] = staged
            while (ready := waiting.pop(len(writer.records), None)) is not None:
                check()
                _commit(writer, old, ready, taken)
                bar.update()


def _commit(
    writer: DatasetWriter, old: _Dataset, staged: StagedRange, taken: dict[str, int]
) -> None:
    """Give the files of a range their names and, last, write its record."""
    storage, number = writer.storage, staged.number
    placement = writer.names_for(staged, taken)
    for split, name in placement.names.items():
        for suffix in SUFFIXES:
            target = name.removesuffix(".tar") + suffix
            storage.copy(f"{staged.directory}/{split}{suffix}", target)
    for split in staged.rejected:
        target = rejected_name(split, number)
        storage.copy(f"{staged.directory}/{split}{REJECTED}", target)
    # Ranges keep their source: where a range has no shard now, none is asked for.
    source = next((shard.source for shard in old.records[number].shards), "")
    shards = shards_of(placement, source)
    writer.commit(staged, shards, staged.verdicts)
    storage.remove_tree(staged.directory)


def _described_in(storage: Storage) -> dict[str, Any]:
    """What the plan of a dataset says, as far as it is used here."""
    name = f"{STATE}/plan.json"
    described = read_json(storage.read(name), f"{storage.url}/{name}")
    with understood(f"{storage.url}/{name}"):
        check_fields({"transform": described["transform"]})
        dict(described["transform"]["versions"])
        if not all(re.fullmatch("[a-z0-9_]+", one) for one in described["splits"]):
            raise KeyError("splits")
    return described


def _record(storage: Storage, name: str) -> RangeRecord:
    value = read_json(storage.read(name), f"{storage.url}/{name}")
    check_fields(value)
    with understood(f"{storage.url}/{name}"):
        shards = tuple(Shard(**shard) for shard in value["shards"])
        accounting = Accounting(**value["accounting"])
        for key in ("rejected", "retried"):
            dict(value[key])
        return RangeRecord(**{**value, "shards": shards, "accounting": accounting})
