"""The memory benchmark is called as its help says."""

from __future__ import annotations

import re
import shlex

from benchmarks.memory import DESCRIPTION, PROG, MemoryConfig
from pipeline.config import parse


def test_the_example_of_the_help_is_understood() -> None:
    (words,) = re.findall(rf"^  python -m {PROG} (.+)$", DESCRIPTION, re.M)
    found = parse(
        MemoryConfig,
        shlex.split(words),
        prog=PROG,
        description=DESCRIPTION,
        positional="data",
    )
    assert (found.data, found.size) == ("SHARDS", 224)
