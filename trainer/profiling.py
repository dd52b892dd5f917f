"""Where the time and memory of a few steps go: a trace of rank 0, and allocations.

Owns RUN/profile, the names of the parts of a step in a trace, and the peak of memory.
Does not own what is measured in every step (`trainer.loop`, `trainer.limits`).
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.files import write_with
from trainer.options import ProfileConfig

PROFILE = "profile"
TRACE = "rank-0.trace.json.gz"
MEMORY = "rank-0.memory.pickle"
_GIB = 1 << 30
_KIB = 1 << 10
# A step of a large model makes some ten thousand; the oldest go first.
_MOST_ALLOCATIONS = 1_000_000


def span(name: str) -> Any:
    """Name a part of a step in traces: `with span("data"):`, or over a function. Costs
    microseconds while nothing is recorded.
    """
    return torch.profiler.record_function(name)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: what PyTorch has allocated
    on a GPU, or all of the process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / _GIB


class Profiler:
    """Records the steps that `profile.first_step` and `profile.steps` name, as far as
    this call takes them.

    Args:
        config: the `profile` keys.
        run: run directory.
        tell: prints a line.
    """

    def __init__(
        self, config: ProfileConfig, run: Path, tell: Callable[[str], None]
    ) -> None:
        self._steps = range(config.first_step, config.first_step + config.steps)
        self._memory, self._folder, self._tell = config.memory, run / PROFILE, tell
        self._running: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Call before the step numbered `step` from 0, and once more after the last
        step: records from here on, or writes what has been recorded.
        """
        if step in self._steps and not self._running:
            self._start(step)
        elif self._running and step not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, if anything is being recorded."""
        if not self._running:
            return
        profile, self._running = self._running, None
        profile.stop()
        self._folder.mkdir(exist_ok=True)
        write_with(self._folder / TRACE, profile.export_chrome_trace)
        told = f"profile written: {self._folder / TRACE} (open it in ui.perfetto.dev)"
        if self._snapshots:
            write_with(self._folder / MEMORY, torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
            told += f", {self._folder / MEMORY} (pytorch.org/memory_viz)"
        self._tell(told)

    @property
    def _snapshots(self) -> bool:
        return self._memory and torch.cuda.is_available()

    def _start(self, step: int) -> None:
        self._tell(f"recording steps {step + 1} to {self._steps.stop}")
        if self._snapshots:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._running = torch.profiler.profile(
            record_shapes=True, profile_memory=self._memory
        )
        self._running.start()
