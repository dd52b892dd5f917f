"""Writing a file so that it is there whole or not at all (law 3)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write under a name of this attempt's own, flush to disk, rename."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_with(path, write)


def torn(folder: Path, name: str = "*") -> list[Path]:
    """What kills left half-written of files in a folder, by name or all."""
    found = folder.glob(f"tmp-{'[0-9a-f]' * 8}-{name}")
    return [path for path in found if path.is_file()]


def write_with(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` make a file under a name of this attempt's own, with the suffix that
    it will have, then rename it.
    """
    temporary = path.with_name(f"tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    write(str(temporary))
    os.replace(temporary, path)
