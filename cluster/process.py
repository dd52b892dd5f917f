"""A command that this driver starts, its words passed on and its end reported.

Owns starting it under `cluster.guard`, which ends its whole process tree when this
process ends in whatever way. Does not own what the command does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    """Its exit status, or 128 and the signal that ended it."""
    last: str
    """The last line that it said: its error, where it had one."""
    stopped: bool
    """It was ended because somebody asked to stop."""


def run_guarded(
    words: Sequence[str],
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `python -m WORDS`, tell what it says line by line, and wait for its end. When
    `stop` is set, its process tree is ended at once: it must be safe to kill.
    """
    command = [sys.executable, "-m", "cluster.guard", "--log", "/dev/stderr", "--"]
    process = subprocess.Popen(
        [*command, sys.executable, "-m", *words],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        text=True,
        errors="replace",
    )
    assert process.stdin
    assert process.stderr
    last = [""]

    def pass_on(lines: IO[str]) -> None:
        for line in lines:
            if text := line.rstrip():
                last[0] = text
                tell(text)

    reader = threading.Thread(target=pass_on, args=(process.stderr,), daemon=True)
    reader.start()
    stopped = False
    while process.poll() is None:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if stop.is_set() and not stopped:
                stopped = True
                process.stdin.close()
    reader.join()
    return Ended(status=process.returncode, last=last[0], stopped=stopped)
