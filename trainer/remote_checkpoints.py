"""Checkpoints behind a URL, for nodes that share no disk.

Owns their names there, what a node keeps of them on its disk, and bringing one there.
Does not own when one is taken (`trainer.saving`), what lies in it
(`trainer.checkpoint`) or the rest of a run's files (`trainer.run_copy`).

Each part is uploaded under a name of its attempt's own, then a record of it; the marker
comes last and names the attempt, so one PUT makes the checkpoint. What no marker names
does not exist and goes when the next trainer starts. A node keeps the parts of its own
ranks on its disk until two newer ones are there: a restart on the same nodes fetches
only what others wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.contract import (
    CHECKPOINTS,
    COMPLETE,
    checkpoint_name,
    complete_steps,
)
from trainer.files import write_with
from trainer.placing import RECORD, Draft
from trainer.store import Store

_LOCK = ".checkpoints.lock"


class RemoteCheckpoints:
    """As `trainer.placing.Place`: the checkpoints of a run in `store`.

    Args:
        store: the run's folder.
        run: this node's working copy of it.
        below: folder in both, with a slash at its end; empty for the run's own.
        before_marker: called before a checkpoint is completed; may raise.
    """

    poll_s = 0.5

    def __init__(
        self,
        store: Store,
        run: Path,
        before_marker: Callable[[], None],
        below: str = "",
    ) -> None:
        self._store, self._run = store, run / below
        self._remote = f"{below}{CHECKPOINTS}"
        self._folder = self._run / CHECKPOINTS
        self._before_marker = before_marker
        self._latest = 0

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Where the newest complete checkpoint lies once it is brought here, and its
        marker, if there is one.
        """
        for step, marker in self._complete():
            return self._folder / checkpoint_name(step), marker
        return None

    def tidy(self, *, clear: bool) -> list[int]:
        """Give this node the markers of all complete checkpoints, and delete what it
        has that belongs to none; with `clear` behind the URL too. Call before any rank
        saves. Steps of the complete ones.
        """
        with self._locked():
            markers = dict(reversed(list(self._complete())))
            known = {checkpoint_name(step): of for step, of in markers.items()}
            if clear:
                self._clear(markers)
            for path in self._folder.iterdir():
                if path.name not in known:
                    shutil.rmtree(path, ignore_errors=True)
                    continue
                for file in path.iterdir():
                    if file.name not in _names(known[path.name]):
                        file.unlink()
            for step, marker in markers.items():
                folder = self._folder / checkpoint_name(step)
                folder.mkdir(exist_ok=True)
                checkpoint.write_json(folder / COMPLETE, marker)
            return list(markers)

    def bring(self, path: Path) -> int:
        """Have all of the complete checkpoint that lies at `path`, or will; bytes that
        had to be fetched. Of the ranks of a node one fetches, and the others wait.
        """
        name, fetched = f"{self._remote}/{path.name}", 0
        with self._locked():
            path.mkdir(exist_ok=True)
            self._store.download(f"{name}/{COMPLETE}", path / COMPLETE)
            marker = checkpoint.read_marker(path)
            for rank in range(int(marker["world_size"])):
                part = checkpoint.part_name(rank, marker.get("attempt"))
                if not (path / part).exists():
                    fetched += self._store.download(f"{name}/{part}", path / part)
        return fetched

    def hand_in(self, draft: Draft, rank: int, write: Callable[[Path], None]) -> None:
        self._drop_older()
        self._latest = draft.step
        folder = self._folder / checkpoint_name(draft.step)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / checkpoint.part_name(rank, draft.attempt)
        write_with(part, lambda temporary: write(Path(temporary)))
        name = f"{self._name(draft)}/{part.name}"
        self._store.upload(name, part)
        self._store.write(name + RECORD, b"")

    def is_whole(self, draft: Draft) -> bool:
        folder = self._name(draft)
        there = self._store.sizes(folder)
        return all(
            f"{folder}/{checkpoint.part_name(rank, draft.attempt)}{RECORD}" in there
            for rank in range(draft.world_size)
        )

    def complete(self, draft: Draft, marker: dict[str, Any]) -> None:
        self._before_marker()
        marker = {**marker, "attempt": draft.attempt}
        data = json.dumps(marker, indent=1) + "\n"
        self._store.write(f"{self._name(draft)}/{COMPLETE}", data.encode())
        folder = self._folder / checkpoint_name(draft.step)
        checkpoint.write_json(folder / COMPLETE, marker)

    def delete(self, path: Path) -> None:
        name = f"{self._remote}/{path.name}"
        self._store.remove([f"{name}/{COMPLETE}"])
        self._store.remove(list(self._store.sizes(name)))
        shutil.rmtree(path, ignore_errors=True)

    def _complete(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Steps and markers, newest first, of checkpoints whose parts are there. A
        trainer that is cut off at its marker may write it after the next has cleared
        its parts away.
        """
        names = self._store.sizes(self._remote)
        start = self._remote.removesuffix(CHECKPOINTS)
        for step in reversed(
            complete_steps(name.removeprefix(start) for name in names)
        ):
            marker, folder = self._marker(step), checkpoint_name(step)
            if all(
                f"{self._remote}/{folder}/{part}" in names for part in _parts(marker)
            ):
                yield step, marker

    def _marker(self, step: int) -> dict[str, Any]:
        name = f"{self._remote}/{checkpoint_name(step)}/{COMPLETE}"
        marker: dict[str, Any] = json.loads(self._store.read(name))
        return marker

    def _clear(self, markers: dict[int, dict[str, Any]]) -> None:
        """Remove what attempts that died left behind the URL."""
        self._store.abort_uploads(self._remote)
        kept = {
            f"{self._remote}/{checkpoint_name(step)}/{name}"
            for step, marker in markers.items()
            for name in _names(marker)
        }
        self._store.remove(self._store.sizes(self._remote).keys() - kept)

    def _drop_older(self) -> None:
        """Keep no parts on this disk of checkpoints before the latest, which every rank
        has handed in.
        """
        latest = checkpoint_name(self._latest)
        for part in self._folder.glob("step-*/rank-*"):
            if part.parent.name < latest:
                part.unlink(missing_ok=True)

    def _name(self, draft: Draft) -> str:
        return f"{self._remote}/{checkpoint_name(draft.step)}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process of this node at a time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._run / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _names(marker: dict[str, Any]) -> Iterator[str]:
    """Files of a complete checkpoint; of one that was copied from a disk too."""
    yield COMPLETE
    for part in _parts(marker):
        yield part
        yield part + RECORD


def _parts(marker: dict[str, Any]) -> Iterator[str]:
    for rank in range(int(marker["world_size"])):
        yield checkpoint.part_name(rank, marker.get("attempt"))
