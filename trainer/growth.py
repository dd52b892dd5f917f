"""Freezing epochs, on all ranks alike, while a dataset may still be growing.

Owns when an epoch is frozen and over what: the shards that rank 0 sees committed a few
steps before the epoch begins. Does not own the table (`trainer.epochs`), what its
entries are checked by (`trainer.data_state`) or how it outlives a kill
(`trainer.freezes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from trainer.contract import FROZEN
from trainer.data_state import MOST_FROZEN, DataState, records_hash
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.loader import Loader
from trainer.order import SampleOrder, Source
from trainer.sources import grown


class _Tells(Protocol):
    def note(self, text: str) -> None: ...


def agreed_state(dataset: Dataset, state: DataState, world: World) -> DataState:
    """Rank 0's data state on every rank, and `dataset` with the shards that it sees: a
    dataset that is being written may look longer to one rank than to another.
    """
    counts = world.gather([len(folder.shards) for folder in dataset.folders])
    fewest = [min(of_folder) for of_folder in zip(*counts, strict=True)]
    beyond = [
        folder.shards[known:]
        for folder, known in zip(dataset.folders, fewest, strict=True)
    ]
    state, beyond = world.broadcast((state, beyond))
    for folder, known, more in zip(dataset.folders, fewest, beyond, strict=True):
        folder.shards[known:] = more
    return state


def freeze_until(
    step: int,
    *,
    loader: Loader,
    world: World,
    tell: _Tells | None,
    keep: Callable[[], None] | None = None,
) -> None:
    """Freeze every epoch that a step up to `step` may need. A collective: every rank
    calls it for the same steps. What there is to say goes to `tell`; `keep` is called
    on every rank where anything was frozen.
    """
    dataset, order = loader.dataset, loader.order
    if order.undecided > step:
        return
    appended, problems, complete = world.broadcast(
        (*dataset.appended(), dataset.complete) if world.first else None
    )
    if any(appended):
        dataset.append(appended)
        loader.quarantine.resize(len(dataset))
    entries = sum(len(table.frozen) for table in order.epochs)
    # The last entry is kept for the finished dataset: the data state stays small.
    full = entries >= MOST_FROZEN and not complete
    found = {} if full else _grown(dataset, order)
    notes = [f"no new shards are taken in: {problem}" for problem in problems]
    if full and any(appended):
        notes.append(
            f"{sum(map(len, appended)):,} more shards have been committed; they are "
            "taken in once the dataset is finished: it has grown into "
            f"{MOST_FROZEN} epochs, as many as a checkpoint's data state lists"
        )
    # Short epochs of a small source may all begin within these steps.
    while order.undecided <= step:
        notes += [_larger(order, number) for number in order.decide(found)]
    if keep:
        keep()
    if tell:
        for note in notes:
            tell.note(note)


def fewer_than_there_are(loader: Loader) -> str | None:
    """What to say of a run that takes its first step with fewer shards than there are,
    because it took it with these before.
    """
    order = loader.order
    tables = zip(order.epochs, order.sources, strict=True)
    if all(table.shards(0) == len(source.shards) for table, source in tables):
        return None
    return (
        "the first epoch has the shards that it had when this run was started before: "
        f"delete {FROZEN} in {loader.config.output} to begin with all that there are"
    )


def _larger(order: SampleOrder, number: int) -> str:
    source, epoch = order.sources[number], order.decided(number)
    whose = f" of source {source.name}" if order.mixture else ""
    pairs = int(source.counts.sum())
    return (
        f"epoch {epoch + order.began.epoch}{whose} will take in what has been "
        f"committed by now: {len(source.shards):,} shards, {pairs:,} pairs"
    )


def _grown(dataset: Dataset, order: SampleOrder) -> dict[int, tuple[Source, str]]:
    """The sources that have more shards than their epochs cover so far."""
    found = {}
    sources = grown(dataset, order.sources)
    for number, (table, source) in enumerate(zip(order.epochs, sources, strict=True)):
        if len(source.shards) > table.frozen[-1].shards:
            found[number] = source, records_hash(dataset, source, len(source.shards))
    return found
