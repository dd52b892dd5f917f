"""What a checkpoint says about data, and whether a dataset is still the one it was.

Owns the data state of law 1: `{manifest_hash, seed, epoch, step}`, the table of frozen
epochs and where the order began to count, all under 1 KB beside the quarantine list.
Does not own the order that is made of it (`trainer.order`).

Shards appended behind those that a run knows are not a change. Any other difference is
one, and the user says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from trainer.dataset import Dataset
from trainer.epochs import Frozen
from trainer.order import Began, SampleOrder, Source

ChangedData = Literal["refuse", "continue", "new_epoch"]
# Keeps the state under 1 KB: an entry takes about 40 bytes.
MOST_FROZEN = 14
_COUNTS_DIGITS = 8
_BYTES_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class DataState:
    """After `step` steps of a run."""

    manifest_hash: str
    tokenizer_sha256: str
    seed: int
    epoch: int
    """Of the last step taken."""
    last_epoch: int
    """The highest that any source has had."""
    step: int
    began: Began
    frozen: tuple[tuple[Frozen, ...], ...]
    """Of each source: (first step, or first draw of a lane in a mixture; number of
    shards; hash of their records) wherever its epochs begin to cover more shards.
    Counted from where the order began."""
    decided: int = 0
    """Steps whose epochs are frozen, where that is known of more than were taken. No
    part of a checkpoint, which need not know."""

    @classmethod
    def fresh(
        cls, dataset: Dataset, sources: Sequence[Source], *, seed: int
    ) -> DataState:
        """Of a run that has taken no step."""
        return cls(
            manifest_hash=dataset.manifest_hash,
            tokenizer_sha256=dataset.tokenizer.sha256,
            seed=seed,
            epoch=0,
            last_epoch=0,
            step=0,
            began=Began(),
            frozen=_whole(dataset, sources),
        )

    @classmethod
    def of(cls, dataset: Dataset, order: SampleOrder, *, step: int) -> DataState:
        """After `step` steps, at least one."""
        return cls(
            manifest_hash=dataset.manifest_hash,
            tokenizer_sha256=dataset.tokenizer.sha256,
            seed=order.seed,
            epoch=order.epoch_of(step - 1),
            last_epoch=order.last_epoch(step),
            step=step,
            began=order.began,
            frozen=tuple(table.frozen for table in order.epochs),
        )

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        frozen = [
            [[one.first, one.shards, one.records] for one in source]
            for source in self.frozen
        ]
        return {
            "manifest_hash": self.manifest_hash,
            "tokenizer_sha256": self.tokenizer_sha256,
            "seed": self.seed,
            "epoch": self.epoch,
            "last_epoch": self.last_epoch,
            "step": self.step,
            "began": [self.began.step, self.began.epoch],
            "frozen": frozen,
        }

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> DataState:
        """The state of `to_plain`; other keys of a marker are not its own."""
        names = ("manifest_hash", "tokenizer_sha256", "seed", "epoch", "last_epoch")
        began_step, began_epoch = value["began"]
        return cls(
            **{name: value[name] for name in names},
            step=int(value["step"]),
            began=Began(step=began_step, epoch=began_epoch),
            frozen=tuple(
                tuple(
                    Frozen(first=first, shards=shards, records=records)
                    for first, shards, records in source
                )
                for source in value["frozen"]
            ),
        )

    def size(self) -> int:
        """Bytes that it takes in a checkpoint's marker."""
        return len(json.dumps(self.to_plain()))


def records_hash(dataset: Dataset, source: Source, shards: int) -> str:
    """Hash of what the manifest says of the first `shards` shards of a source: 8 hex
    digits of their counts, then 12 of all that samples and their order follow from.
    """
    digest = sha256(f"{dataset.tokenizer.sha256} {source.weight}".encode())
    for number in source.shards[:shards].tolist():
        entry = dataset.shard(number)
        row = [entry.name, entry.source, entry.samples, sorted(entry.sha256.items())]
        digest.update(json.dumps(row).encode())
    return _counts_hash(source, shards) + digest.hexdigest()[:_BYTES_DIGITS]


def _counts_hash(source: Source, shards: int) -> str:
    counts = source.counts[:shards].astype("<i8")
    return sha256(counts.tobytes()).hexdigest()[:_COUNTS_DIGITS]


def difference(
    state: DataState, dataset: Dataset, sources: Sequence[Source]
) -> str | None:
    """What has changed since `state` in the shards that it knows; None if nothing."""
    if dataset.tokenizer.sha256 != state.tokenizer_sha256:
        return (
            f"its tokens were made with tokenizer {dataset.tokenizer.sha256}, before "
            f"with {state.tokenizer_sha256}"
        )
    if len(sources) != len(state.frozen):
        return f"it has {len(sources)} sources to draw from, before {len(state.frozen)}"
    for source, frozen in zip(sources, state.frozen, strict=True):
        known = frozen[-1].shards
        if len(source.shards) < known:
            return f"source {source.name!r} has {len(source.shards)} shards of {known}"
        if records_hash(dataset, source, known) != frozen[-1].records:
            return (
                f"the first {known} shards of source {source.name!r} or its weight are "
                "not those of before"
            )
    return None


def resumed(
    state: DataState,
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    changed: ChangedData,
    run: str,
) -> DataState:
    """The state to go on from with `dataset`: `state` itself where nothing of it has
    changed.

    Raises:
        ValueError: something has, and the user did not say what to do or what they said
            is impossible.
    """
    what = difference(state, dataset, sources)
    if what is None:
        return state
    if dataset.tokenizer.sha256 != state.tokenizer_sha256:
        raise ValueError(
            f"{dataset.name} is not the dataset that {run} was trained on: {what}, and "
            "the model's words are numbered by that one. Give the old dataset as "
            "--data, or another --output to start anew"
        )
    if changed == "refuse":
        raise ValueError(
            f"{dataset.name} is not the dataset that {run} was trained on (manifest "
            f"hash {dataset.manifest_hash}, before {state.manifest_hash}): {what}. "
            "Give the old dataset as --data; or say --changed_data new_epoch to begin "
            "an epoch of this one after the steps taken, or --changed_data continue to "
            "go on at the same place, where every shard has as many samples as before; "
            "or another --output to start anew"
        )
    if changed == "new_epoch":
        began = Began(step=state.step, epoch=state.last_epoch + 1)
        whole = _whole(dataset, sources)
        return replace(state, began=began, frozen=whole, decided=0)
    found = at_same_places(state, dataset, sources)
    if found is None:
        raise ValueError(
            "--changed_data continue needs a dataset whose shards have as many samples "
            f"as those that {run} has known, and in {dataset.name} {what}, with other "
            "counts: say --changed_data new_epoch"
        )
    return found


def at_same_places(
    state: DataState, dataset: Dataset, sources: Sequence[Source]
) -> DataState | None:
    """The state with `dataset` in place of the one before; None unless each shard that
    it knows has as many samples as it had.
    """
    if not _same_counts(state, sources):
        return None
    frozen = tuple(
        tuple(
            _frozen(dataset, source, first=entry.first, shards=entry.shards)
            for entry in entries
        )
        for source, entries in zip(sources, state.frozen, strict=True)
    )
    return replace(state, frozen=frozen)


def same_places(state: DataState, later: DataState) -> bool:
    """Are the epochs of `state` those that `later` begins with, over shards with as
    many samples?
    """
    if len(state.frozen) != len(later.frozen):
        return False
    return all(
        list(map(_place, known)) == list(map(_place, found[: len(known)]))
        for known, found in zip(state.frozen, later.frozen, strict=True)
    )


def _place(entry: Frozen) -> tuple[int, int, str]:
    return entry.first, entry.shards, entry.records[:_COUNTS_DIGITS]


def _same_counts(state: DataState, sources: Sequence[Source]) -> bool:
    """Do the shards that `state` knows have as many samples as they had?"""
    if len(sources) != len(state.frozen):
        return False
    for source, frozen in zip(sources, state.frozen, strict=True):
        counts = _counts_hash(source, frozen[-1].shards)
        if not frozen[-1].records.startswith(counts):
            return False
    return True


def _whole(
    dataset: Dataset, sources: Sequence[Source]
) -> tuple[tuple[Frozen, ...], ...]:
    """Epochs over every shard that there is."""
    return tuple(
        (_frozen(dataset, source, first=0, shards=len(source.shards)),)
        for source in sources
    )


def _frozen(dataset: Dataset, source: Source, *, first: int, shards: int) -> Frozen:
    records = records_hash(dataset, source, shards)
    return Frozen(first=first, shards=shards, records=records)
