"""How the parts that ranks write become one checkpoint, in a folder that all see.

Owns drafts: the parts, their records and the marker that ends them. Does not own when
one is taken and by which thread (`trainer.saving`), what lies in a checkpoint
(`trainer.checkpoint`), or how this is done behind a URL
(`trainer.remote_checkpoints`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer import checkpoint
from trainer.contract import CHECKPOINTS, COMPLETE, checkpoint_name
from trainer.files import write_text

RECORD = ".written"
"""Suffix of the file that says that a part is there, durable and whole."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A checkpoint after `step` steps that `world_size` ranks are writing."""

    step: int
    attempt: str
    """Its own, so that nothing of another attempt at the same step is taken for it."""
    world_size: int


class Place(Protocol):
    """Where the checkpoints of a run go. Of all ranks, or as it says of rank 0."""

    poll_s: float
    """Seconds between two looks of rank 0."""

    def hand_in(self, draft: Draft, rank: int, write: Callable[[Path], None]) -> None:
        """Have `write` make a rank's part in a local file, put it where it belongs,
        and a record beside it.
        """

    def is_whole(self, draft: Draft) -> bool:
        """Rank 0: is there a record of every part?"""

    def complete(self, draft: Draft, marker: dict[str, Any]) -> None:
        """Rank 0: write the marker; from then on the checkpoint exists."""

    def delete(self, path: Path) -> None:
        """Rank 0: delete a complete checkpoint, its marker first."""


class SharedFolder:
    """As `Place`: below a run directory that every rank sees, by renaming."""

    poll_s = 0.02

    def __init__(self, run: Path) -> None:
        self._folder = run / CHECKPOINTS

    def hand_in(self, draft: Draft, rank: int, write: Callable[[Path], None]) -> None:
        folder = self._draft(draft)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / checkpoint.part_name(rank)
        write(part)
        checkpoint.fsync(part)
        write_text(part.with_suffix(RECORD), "")

    def is_whole(self, draft: Draft) -> bool:
        parts = map(checkpoint.part_name, range(draft.world_size))
        folder = self._draft(draft)
        return all((folder / part).with_suffix(RECORD).exists() for part in parts)

    def complete(self, draft: Draft, marker: dict[str, Any]) -> None:
        folder = self._draft(draft)
        # The marker must not outlive what it marks when a node loses power.
        checkpoint.fsync(folder)
        checkpoint.write_json(folder / COMPLETE, marker)
        checkpoint.fsync(folder)
        target = self._folder / checkpoint_name(draft.step)
        if target.exists():
            checkpoint.delete(target)
        os.replace(folder, target)
        checkpoint.fsync(target.parent)

    def delete(self, path: Path) -> None:
        checkpoint.delete(path)

    def _draft(self, draft: Draft) -> Path:
        return self._folder / f"{checkpoint.TEMPORARY}{draft.attempt}"
