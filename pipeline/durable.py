"""Making files and folders outlast a crash of the machine.

Owns what has to be synchronised, and in which order. Does not own names or what a file
may be seen as meanwhile (`pipeline.storage_local`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

# Others make and remove the same folder now and then, not every time.
_TRIES = 50


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whose bytes last; its name does after `sync_directory`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder and those above it, names included, while others may make and
    remove the same ones.

    Raises:
        NotADirectoryError: one of them is a file.
        OSError: the system makes no folder there.
    """
    for tries in range(_TRIES):
        if path.is_dir():
            return
        make_folder(path.parent)
        try:
            path.mkdir()
        except FileExistsError:
            if _is_a_file(path):
                raise NotADirectoryError(
                    errno.ENOTDIR, "is a file", str(path)
                ) from None
        except FileNotFoundError:
            # The one above went with its last file meanwhile, unless this is a place
            # where the system makes none.
            if tries == _TRIES - 1:
                raise
        else:
            sync_directory(path.parent)
            return


def _is_a_file(path: Path) -> bool:
    """Is something there that is no folder? Not where a folder was and has gone."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path.is_symlink()


def sync(path: Path) -> None:
    """Put a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """As `sync`, of a folder that may have gone with its last file meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        sync(path)
