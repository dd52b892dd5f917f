"""A run directory for whoever reads one, wherever the run lies.

Owns the one way from a command's RUN to a local folder. Does not own what is brought of
a run behind a URL (`trainer.run_copy`), which needs torch, as reading a local one does
not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainer.storage import local_path


@contextlib.contextmanager
def local_run(run: str, *, weights: bool = False) -> Iterator[Path]:
    """The local directory of a run: itself, or what is brought here of a run behind a
    URL, with its newest checkpoint if `weights` are wanted. Files that are added or
    changed there are brought to the URL at the end.

    Raises:
        ValueError, OSError: no run, or storage that cannot be reached. The message has
            the cure.
    """
    path = local_path(run)
    if path is not None:
        yield path
        return
    from trainer.run_copy import brought_run

    with brought_run(run, weights=weights) as path:
        yield path
