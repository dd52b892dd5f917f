"""What was measured, where and with what: one JSON file a part, filled entry by entry.

Owns the files, which entries are missing, and when a call has taken long enough. Does
not own what is measured (the modules beside this one).
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CEILINGS = "ceilings"
"""The entry that the others of its file are shares of."""
_PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy")
_SOURCES = ("trainer", "benchmarks/gpu")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the parts of one call run."""

    device: torch.device
    tiny: bool = False
    """Everything at a size that a CPU can take: a rehearsal, that measures nothing."""
    output: Path = RESULTS
    data: str | None = None
    """Dataset directory of shards; None: no part that needs one."""
    again: bool = False
    """Measure what is there already."""
    only: tuple[str, ...] = ()
    """Measure no entries but those with one of these in their key; none: all."""
    seconds: float = 420.0
    """No entry is begun after these."""
    words: tuple[str, ...] = ()
    """What `python -m benchmarks.gpu` was called with."""

    @property
    def cuda(self) -> bool:
        """There is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


class OutOfTime(Exception):
    """The call has taken long enough; the same command goes on where it stopped."""


class Record:
    """The entries of one part in OUTPUT/PART.json.

    Raises:
        ValueError: the file is of another machine or of other versions.
    """

    def __init__(self, setting: Setting, part: str) -> None:
        self.setting, self.part = setting, part
        self.path = setting.output / f"{part}.json"
        self.failed: list[str] = []
        self._began: float | None = None
        self._head = {"hardware": hardware(setting), "versions": versions()}
        self.entries: dict[str, Any] = {}
        if self.path.exists() and not setting.again:
            stored = json.loads(self.path.read_text())
            for name, value in self._head.items():
                if stored[name] != value:
                    raise ValueError(
                        f"{self.path} was measured with other {name} "
                        f"({stored[name]}, now {value}): give --again to begin anew, "
                        "or another --output"
                    )
            self.entries = stored["entries"]

    def begin(self) -> None:
        """Have the time that there is begin now, and not with the first entry."""
        if self._began is None:
            self._began = time.monotonic()

    def _spent(self) -> float:
        self.begin()
        assert self._began is not None
        return time.monotonic() - self._began

    def measure(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry `key`: the one that is there, if it is of these sources, or what
        `make` gives. An error is an entry too, and tried again by the next call; so is
        one that has not `passed`. Empty where it is missing and not asked for.

        Raises:
            OutOfTime: it is missing, and there is no time left.
        """
        found = self.entries.get(key)
        source = source_digest()
        if found and found["source"] == source and _sound(found):
            return found
        only = self.setting.only
        if only and not any(part in key for part in only) and key != CEILINGS:
            return {}
        if self._spent() > self.setting.seconds:
            raise OutOfTime(f"{self.part}: stopped before {key!r}; run it again")
        began = time.perf_counter()
        try:
            found = make()
        except Exception as error:  # a baseline that fails must not end the others
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        found["took_s"] = round(time.perf_counter() - began, 3)
        found["source"] = source
        self.entries[key] = found
        self._write()
        free(self.setting)
        if not _sound(found):
            self.failed.append(key)
        print(f"{self.part} | {key} | {brief(found)}", flush=True)
        return found

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "benchmarks.gpu", *self.setting.words])
        rehearsal = {"rehearsal": "no GPU: no time here means anything"}
        write_json(
            self.path,
            {
                **({} if self.setting.cuda else rehearsal),
                **self._head,
                "command": command,
                "entries": self.entries,
            },
        )


def _sound(entry: dict[str, Any]) -> bool:
    """Neither an error nor a check that has not passed."""
    return "error" not in entry and bool(entry.get("passed", True))


def hardware(setting: Setting) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "machine": platform.machine()}
    if not setting.cuda:
        return found | {"device": "cpu"}
    told = torch.cuda.get_device_properties(setting.device)
    return found | {
        "device": told.name,
        "memory_gib": round(told.total_memory / (1 << 30), 1),
        "multiprocessors": told.multi_processor_count,
        "l2_mib": told.L2_cache_size / (1 << 20),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of everything that a step's time depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda}


@functools.cache
def source_digest() -> str:
    """Of the code that was measured: entries of one digest may be compared."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def free(setting: Setting) -> None:
    """Give back what the last entry held."""
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)


def brief(entry: dict[str, Any]) -> str:
    """The numbers of an entry in a line."""
    shown = {k: v for k, v in entry.items() if isinstance(v, int | float | str)}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
        if name not in ("source", "reason", "what")
    )
