"""What a cache of fetched files takes of its disk."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path


def on_disk(cache: Path) -> int:
    """Bytes of all files in a cache and of those that some process still has open."""
    files = {}
    with (cache / "palimpsest.lock").open("a") as lock:
        # Nobody makes room meanwhile: what is counted is there at one time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.parent.name != "palimpsest-live":
                    status = path.stat()
                    files[status.st_ino] = status.st_size
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(f"{cache}/"):
                    status = link.stat()
                    files[status.st_ino] = status.st_size
    return sum(files.values())
