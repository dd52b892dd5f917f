"""What a run has frozen, in its folder from the moment that it is frozen.

Owns `frozen.json`: the data state as it will be before the first step whose epochs are
not all frozen, and the keys that steps are counted by. Does not own the state
(`trainer.data_state`) or when an epoch is frozen (`trainer.growth`).

A checkpoint knows what was frozen before its step. A run that is killed takes the steps
after it again, and they have the samples that they had: the file is written before any
step that follows from it. It is replaced whole, so a kill tears nothing, and as small
as the state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.contract import FROZEN
from trainer.data_state import (
    DataState,
    at_same_places,
    difference,
    same_places,
)
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.files import write_text
from trainer.loader import Loader
from trainer.options import PretrainConfig
from trainer.order import Source
from trainer.run_copy import RunCopy


def keep(loader: Loader, world: World, copy: RunCopy | None) -> None:
    """Have the run's folder hold what is frozen by now. A collective: no rank goes on
    before that is durable.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    world.together(lambda: _write(loader, copy) if world.first else None)


def _write(loader: Loader, copy: RunCopy | None) -> None:
    config, order = loader.config, loader.order
    state = DataState.of(loader.dataset, order, step=order.undecided)
    text = json.dumps(_counted_by(config) | state.to_plain()) + "\n"
    write_text(config.run / FROZEN, text)
    checkpoint.fsync(config.run)
    if copy:
        copy.bring(FROZEN)


def read(
    run: Path, config: PretrainConfig, copy: RunCopy | None = None
) -> DataState | None:
    """What the run with this configuration has frozen, if that is known: the state
    before the first step that is not. None for what a run with other keys has left.

    Args:
        run: its folder, which is not looked into where there is a `copy`.

    Raises:
        ValueError: the file is not one of ours.
        OSError: storage failed.
    """
    file = run / FROZEN
    text = copy.read(FROZEN) if copy else file.read_bytes() if file.exists() else None
    if text is None:
        return None
    try:
        found = json.loads(text)
        wanted = _counted_by(config) | {"seed": config.seed}
        if {name: found[name] for name in wanted} != wanted:
            return None
        return DataState.from_plain(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{FROZEN} of {config.output} is damaged ({error!r}): delete it; steps "
            "since the newest checkpoint may then take in other shards than before"
        ) from error


def _counted_by(config: PretrainConfig) -> dict[str, Any]:
    """Keys that turns of an epoch are counted by."""
    return {"lanes": config.lanes, "global_batch": config.global_batch}


def restored(
    state: DataState,
    known: DataState | None,
    dataset: Dataset,
    sources: Sequence[Source],
) -> DataState:
    """The state of a checkpoint, with what was frozen since. Nothing is taken from a
    file that is of other data than `dataset`, or older than the checkpoint.
    """
    if known is None or known.began != state.began or known.step < state.step:
        return state
    if not same_places(state, known):
        return state
    found = replace(
        state,
        manifest_hash=known.manifest_hash,
        frozen=known.frozen,
        decided=known.step,
    )
    pairs = zip(state.frozen, known.frozen, strict=True)
    same = all(own == later[: len(own)] for own, later in pairs)
    if same or difference(state, dataset, sources):
        return found
    # --changed_data continue came to no checkpoint, and this is the dataset of before.
    return at_same_places(found, dataset, sources) or state


def not_taken(loader: Loader, state: DataState, known: DataState | None) -> str | None:
    """What to say of a run that goes on from `state` and not with what was frozen."""
    if known is None or state.decided:
        return None
    found = difference(known, loader.dataset, loader.order.sources)
    if known.began != state.began:
        if state.step:
            # That is what was asked for.
            return None
        found = f"begun after step {known.began.step}"
    return (
        f"{FROZEN} in {loader.config.output} is of other data than this ({found}): "
        "epochs are frozen anew"
    )


def begun(
    state: DataState,
    known: DataState | None,
    dataset: Dataset,
    sources: Sequence[Source],
) -> DataState:
    """A state in which the order begins to count, with what was frozen when it did so
    before and `dataset` still has.
    """
    if known is None or known.began != state.began:
        return state
    found = replace(state, frozen=known.frozen, decided=known.step)
    return state if difference(found, dataset, sources) else found
