"""Command lines whose keys depend on the task.

Owns joining the keys of a task with those of the command. Does not own either
(`trainer.tasks.finetuning`, `trainer.tasks.evaluation`, each task).
"""

from __future__ import annotations

import functools
from dataclasses import make_dataclass


@functools.cache
def joined(command: type, task: type) -> type:
    """A frozen dataclass with the keys of a command and those of a task."""

    def check(self: object) -> None:
        for part in (command, task):
            if hasattr(part, "__post_init__"):
                part.__post_init__(self)

    made = make_dataclass(
        command.__name__,
        [],
        bases=(task, command),
        namespace={"__post_init__": check},
        frozen=True,
        kw_only=True,
    )
    made.__doc__, made.__module__ = command.__doc__, command.__module__
    return made
