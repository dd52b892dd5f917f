"""Makes each step of a trainer last as long as the file PACE says, in seconds. While
there is a second number in it, a process takes so many batches and no more.

Python imports this at its start when its directory is on PYTHONPATH. So a test can hit
a step, a checkpoint or a start without a model that keeps the machine busy.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACED = "trainer.loop"


def pace(taken: int) -> float | None:
    """Seconds before the next batch of a process that has taken some; None for not
    yet.
    """
    found = Path(os.environ["PACE"]).read_text().split()
    # Whoever writes the file empties it first.
    if not found or (len(found) > 1 and taken >= int(found[1])):
        return None
    return float(found[0])


class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        following = module.next_batch
        taken = 0

        def next_batch(*words: object) -> object:
            nonlocal taken
            while (seconds := pace(taken)) is None:
                time.sleep(0.005)
            time.sleep(seconds)
            taken += 1
            return following(*words)

        module.next_batch = next_batch  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACED:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found and found.origin:
            found.loader = Loader(fullname, found.origin)
        return found


if "PACE" in os.environ:
    sys.meta_path.insert(0, Finder())
