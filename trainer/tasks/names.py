"""Tasks by name. A task adds its module and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pipeline.config import ConfigError, nearest

if TYPE_CHECKING:
    from trainer.tasks.base import Spec

_MODULES = {
    "matching": "trainer.tasks.matching",
    "retrieval": "trainer.tasks.retrieval",
    "zero_shot": "trainer.tasks.zero_shot",
    "linear_probe": "trainer.tasks.linear_probe",
    "nlvr2": "trainer.tasks.nlvr2",
    "snli_ve": "trainer.tasks.snli_ve",
    "vqa": "trainer.tasks.vqa",
}
NAMES = tuple(_MODULES)


def find(name: str, *, also: tuple[str, ...] = ()) -> Spec:
    """What a task is.

    Args:
        also: what else a command takes in its place, to be said where there is no such
            task.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in _MODULES:
        known = (*also, *NAMES)
        raise ConfigError(
            f"--task {name!r} is none of {', '.join(known)}.{nearest(name, known)}"
        )
    spec: Spec = importlib.import_module(_MODULES[name]).SPEC
    return spec


def fine_tuned() -> tuple[str, ...]:
    """Names of the tasks that a model learns; others are measured on it as it is."""
    return tuple(name for name in NAMES if find(name).finetune is not None)
