"""Everything that can be wrong with a run, before it starts.

Owns the checks, and what they find that the run goes on with. Does not own the run
(`trainer.loop`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import to_yaml
from pipeline.manifest import MANIFEST
from trainer import checkpoint, freezes, roll_back
from trainer.build import require_start
from trainer.contract import (
    CHECKPOINTS,
    CONFIG,
    FINETUNE,
    FROZEN,
    LOCK,
    METRICS,
    PREPROCESSOR,
    check_world_size,
)
from trainer.data_state import DataState, difference, resumed
from trainer.dataset import Dataset
from trainer.engine import chosen_precision, world_from_environment
from trainer.loader import Loader
from trainer.options import PretrainConfig, blocking_changes, load_config
from trainer.quarantine import Quarantined, from_plain
from trainer.run_copy import RunCopy
from trainer.sources import sources_of
from trainer.storage import local_path
from trainer.tracking import check_installed

_OF_OTHERS = {
    FINETUNE: "a fine-tuning",
    PREPROCESSOR: "an exported model",
    MANIFEST: "a dataset",
}


# One of these a run's folder has, whatever its user has deleted of it.
_OWN = (LOCK, CHECKPOINTS, METRICS, roll_back.FOLDER)
_SHOWN = 5
_LOGS = (".log", ".txt", ".out", ".err")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What `check` found: the dataset, and the checkpoint to resume from, if any."""

    dataset: Dataset
    checkpoint: Path | None
    """Of a run behind a URL, where it is once it was brought here."""
    state: DataState
    """Where its data stands."""
    quarantined: tuple[Quarantined, ...] = ()
    """Damaged samples that were found before."""
    safety: dict[str, Any] | None = None
    """What was known of the losses before."""
    copy: RunCopy | None = None
    """Of a run behind a URL."""
    frozen: DataState | None = None
    """What the run had frozen when it was looked at."""

    @property
    def first_step(self) -> int:
        """Steps already taken."""
        return self.state.step


def check(config: PretrainConfig) -> Checked:
    """Everything that can be wrong, before a process group exists or a file is written.

    Raises:
        ValueError: a configuration, dataset, world size or run directory that does not
            fit. The message has the cure.
    """
    run = config.output
    rank, world_size = world_from_environment()
    check_world_size(world_size, lanes=config.lanes)
    check_installed(config.log.wandb)
    copy = RunCopy(config) if local_path(run) is None else None
    if copy:
        copy.require_writable(rank)
    _require_no_other(config, copy)
    found = copy.checkpoints.newest() if copy else checkpoint.newest(config.run)
    if found:
        require_same(config, copy.config() if copy else load_config(config.run))
    # A run that has begun on a dataset goes on with the shards that it knows.
    growing = config.grow or found is not None
    dataset = Dataset(
        config.data,
        config.split,
        tokenizer=config.tokenizer,
        growing=growing,
        storage=config.storage,
    )
    sources = sources_of(dataset, config.mixture)
    quarantined: list[Quarantined] = []
    frozen = freezes.read(config.run, config, copy)
    if found:
        _, marker = found
        marked = DataState.from_plain(marker)
        before = freezes.restored(marked, frozen, dataset, sources)
        changed_data = config.changed_data
        try:
            state = resumed(before, dataset, sources, changed=changed_data, run=run)
        except ValueError as error:
            if difference(marked, dataset, sources):
                raise
            raise ValueError(
                f"{error}; or delete {FROZEN} in {run}: steps after the newest "
                f"checkpoint, of step {marked.step}, are then taken with the shards "
                "that there are, so not with the samples that they had"
            ) from error
        if state.began == before.began:
            # What was damaged of other data says nothing of this.
            quarantined = from_plain(marker["quarantine"])
        else:
            state = freezes.begun(state, frozen, dataset, sources)
    else:
        state = DataState.fresh(dataset, sources, seed=config.seed)
        state = freezes.begun(state, frozen, dataset, sources)
        require_start(config, dataset)
    Loader(dataset, config, rank=0, world_size=world_size, state=state)
    chosen_precision(config)
    return Checked(
        dataset=dataset,
        checkpoint=found[0] if found else None,
        state=state,
        quarantined=tuple(quarantined),
        safety=found[1]["safety"] if found else None,
        copy=copy,
        frozen=frozen,
    )


def _require_no_other(config: PretrainConfig, copy: RunCopy | None) -> None:
    """Raise ValueError where something else than a run lies in the output."""
    output, folder = config.output, config.run

    def has(name: str) -> bool:
        if copy:
            return copy.store.read_version(name) is not None
        return (folder / name).is_file()

    if copy is None and folder.is_file():
        raise ValueError(f"--output {output} is a file: give a folder")
    # A run that has begun beside others' files goes on.
    if has(CONFIG):
        return
    for name, what in _OF_OTHERS.items():
        if has(name):
            raise ValueError(
                f"--output {output} holds {what} ({name}): take another --output for "
                "the run"
            )
    if copy or not folder.is_dir() or any((folder / name).exists() for name in _OWN):
        return
    # A launcher may have made its logs there already.
    others = sorted(path.name for path in folder.iterdir() if _is_foreign(path))
    if others:
        raise ValueError(
            f"--output {output} is no run and holds {', '.join(others[:_SHOWN])}: take "
            "another --output for the run, such as one below it"
        )


def _is_foreign(path: Path) -> bool:
    """Is this a folder of somebody's, with something else than logs in it?"""
    if path.name.startswith(".") or path.name == "lost+found" or not path.is_dir():
        return False
    files = (one for one in path.rglob("*") if one.is_file())
    return any(one.suffix not in _LOGS for one in files)


def require_same(config: PretrainConfig, before: PretrainConfig) -> None:
    """Raise ValueError where a run differs from `before` in what may not change."""
    changed = blocking_changes(
        *(yaml.safe_load(to_yaml(each)) for each in (before, config))
    )
    if changed:
        raise ValueError(
            f"{config.output} was started with another configuration: "
            f"{'; '.join(changed)}. Take the old values to continue it, or another "
            "--output to start anew"
        )
