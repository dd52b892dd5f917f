"""Where a run ran: `RUN/environment.json`, for people and for `trainer.report`.

Nothing reads it back into training. A resumed run describes its newest start.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import write_json
from trainer.contract import ENVIRONMENT
from trainer.engine import World

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")


def record(run: Path, world: World, *, precision: str) -> None:
    """Write down ranks, device, precision and versions, on one rank."""
    found = {
        "ranks": world.size,
        "device": _device(world.device),
        "cores of the node": os.cpu_count(),
        "threads of a rank": torch.get_num_threads(),
        "precision": precision,
        "python": platform.python_version(),
        **_versions(),
    }
    write_json(run / ENVIRONMENT, found)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU: {_cpu_model() or platform.machine()}"


def _cpu_model() -> str:
    """The processor's name, where the kernel tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else ""


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
