"""A run behind a URL: this node's working copy of it, and what is brought there.

Owns which files of a run travel when, who may write them, and bringing a run to a
reader's disk. Does not own checkpoints (`trainer.remote_checkpoints`), the lease
(`trainer.lease`) or requests (`trainer.store`).

Everything is written to a local folder, as for a run on a disk. Rank 0 brings what has
changed to the URL before each checkpoint's marker and at the end, so whatever
checkpoint is resumed, the metrics of its steps are there. What is frozen is brought at
once, before a step follows from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer import roll_back
from trainer.contract import (
    CHECKPOINTS,
    COMPLETE,
    CONFIG,
    FROZEN,
    LOCKED,
    METRICS,
    VALIDATION,
)
from trainer.files import torn
from trainer.lease import Lease
from trainer.options import PretrainConfig, load_config
from trainer.remote import AccessDeniedError
from trainer.remote_checkpoints import RemoteCheckpoints
from trainer.storage import StorageConfig
from trainer.store import Store
from trainer.tracking import WANDB
from trainer.watchdog import FOLDER as WATCHDOG

# What a trainer reads of what was written before.
_CONTINUED = (METRICS, VALIDATION, WANDB)
# What stays on the node, or has ways of its own.
_STAYS = (CHECKPOINTS, roll_back.FOLDER, WATCHDOG, "wandb")
_READS = 3
_WRITES = 3
# For the last files of a run that ends with an error.
_PATIENCE_S = 20.0
# Bytes and time of change of files, by their paths below the run.
States = dict[str, tuple[int, int]]


class RunCopy:
    """The run at a URL, for one rank of its trainer.

    Raises:
        ValueError: unknown scheme, or a package that is missing.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.path = config.run
        self.store = Store(config.output, config.storage)
        self._lease = Lease(self.store, config.storage.writer)
        self._pushed: States = {}
        self._versions: dict[str, str | None] = {}
        self.checkpoints = RemoteCheckpoints(self.store, self.path, self._before_marker)
        self.points = RemoteCheckpoints(
            self.store, self.path, self._lease.check, f"{roll_back.FOLDER}/"
        )

    def require_writable(self, rank: int) -> None:
        """Write and delete a small file, of this rank's own.

        Raises:
            ValueError, OSError: that cannot be done here. The message has the cure.
        """
        name = f".probe-{rank}"
        try:
            self.store.write(name, b"")
            self.store.remove([name])
        except AccessDeniedError as error:
            raise AccessDeniedError(
                f"--output {self.store.shown} cannot be written to: {error}"
            ) from error

    def config(self) -> PretrainConfig:
        """The configuration that the run was last started with."""
        with tempfile.TemporaryDirectory() as folder:
            self.store.download(CONFIG, Path(folder, CONFIG))
            return load_config(Path(folder))

    def begin(self, step: int) -> None:
        """Rank 0: take the lease, clear what dead attempts left, and fetch what a run
        that has taken `step` steps goes on with.

        Raises:
            ValueError: another trainer writes the run, or did a moment ago.
            OSError: storage failed.
        """
        self._lease.take()
        found = self.checkpoints.tidy(clear=True)
        if (found[-1] if found else 0) != step:
            raise ValueError(
                f"{LOCKED} to {self.store.shown}, or was while this one started: the "
                "same command continues"
            )
        self.store.remove([COMPLETE])
        for path in (*map(self.path.joinpath, _files(self.path)), *torn(self.path)):
            path.unlink()
        for name in _CONTINUED:
            with contextlib.suppress(FileNotFoundError):
                self.store.download(name, self.path / name)

    def push(self) -> None:
        """Rank 0: bring all files that have changed to the URL, but those that `bring`
        does: a thread that pushes would put an old one over a newer one.
        """
        names = [name for name in _files(self.path) if name != FROZEN]
        self._pushed |= _upload(self.store, self.path, names, self._pushed)

    def read(self, name: str) -> bytes | None:
        """A small file as it is at the URL, if it is there. `bring` replaces none but
        the version that was read or brought last.
        """
        found = self.store.read_version(name)
        self._versions[name] = found[1] if found else None
        return found[0] if found else None

    def bring(self, name: str) -> None:
        """Rank 0: bring one small file to the URL at once.

        Raises:
            ValueError, OSError: the run is another trainer's by now, or storage failed.
        """
        data = (self.path / name).read_bytes()
        for _ in range(_WRITES):
            self._lease.check()
            # Whoever has taken over meanwhile may have written its own.
            self.store.replace(name, data, self._versions.get(name))
            # Whatever became of the answer, the file says who wrote it.
            if self.read(name) == data:
                return
        raise ValueError(
            f"{LOCKED} to {self.store.shown}: its {name} is not what this one wrote; "
            "the same command continues"
        )

    def mark_complete(self, marker: dict[str, Any]) -> None:
        """Write the run's completion marker, unless there is one."""
        text = json.dumps(marker, indent=1) + "\n"
        self.store.replace(COMPLETE, text.encode(), None)

    def close(self) -> None:
        """Let go of the lease if this rank holds it, after a last look at what has
        changed. Waits for storage that is away no longer than `_PATIENCE_S`.
        """
        if self._lease.held:
            last = threading.Thread(target=self._last, name="last", daemon=True)
            last.start()
            last.join(_PATIENCE_S)

    def _last(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._before_marker()
        self._lease.release()

    def _before_marker(self) -> None:
        self._lease.check()
        self.push()
        self._lease.check()


@contextlib.contextmanager
def brought_run(url: str, *, weights: bool) -> Iterator[Path]:
    """As `trainer.local_run`, of a run behind a URL."""
    config = StorageConfig()
    path = config.working_copy(url)
    store = Store(url, config)
    # A trainer on this machine has its own, and so has each of several readers: one
    # would take what another fetches anew for changes of its own, and bring it back.
    own = _alone(path.with_name(f"{path.name}-read"))
    with contextlib.closing(store), own as path:
        before = _download(store, path)
        checkpoints = RemoteCheckpoints(store, path, lambda: None)
        _bring_checkpoint(checkpoints, weights=weights)
        yield path
        _upload(store, path, _files(path), before)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder that no other process uses: `path`, or one beside it."""
    for number in itertools.count(1):
        found = path if number == 1 else path.with_name(f"{path.name}-{number}")
        found.mkdir(parents=True, exist_ok=True)
        with open(found / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield found
            return


def _bring_checkpoint(checkpoints: RemoteCheckpoints, *, weights: bool) -> None:
    for left in reversed(range(_READS)):
        try:
            checkpoints.tidy(clear=False)
            found = checkpoints.newest() if weights else None
            if found:
                checkpoints.bring(found[0])
            return
        except FileNotFoundError:
            # The trainer may have taken a newer one and deleted this.
            if not left:
                raise


def _download(store: Store, run: Path) -> States:
    """Have the files of a run, and no others, in a local folder; their states. Raises
    ValueError where there is no run.
    """
    there = {name for name in store.sizes() if _travels(Path(name))}
    if not there:
        raise ValueError(f"{store.shown} is no run: nothing is there; train it first")
    for name in _files(run):
        if name not in there:
            (run / name).unlink()
    for name in sorted(there):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            store.download(name, path)
    return {name: _state(run / name) for name in _files(run)}


def _upload(store: Store, run: Path, names: list[str], known: States) -> States:
    """Bring those files whose states are not `known` to the URL; their states."""
    sent: States = {}
    for name in names:
        # Others may delete theirs meanwhile.
        with contextlib.suppress(FileNotFoundError):
            state = _state(run / name)
            if known.get(name) != state:
                store.upload(name, run / name)
                sent[name] = state
    return sent


def _files(run: Path) -> list[str]:
    """Files of a run that travel, by their paths below it."""
    below = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in below if _travels(name))


def _travels(name: Path) -> bool:
    return name.parts[0] not in _STAYS and not name.name.startswith((".", "tmp-"))


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
