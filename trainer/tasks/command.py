"""Command lines whose keys depend on the task.

Owns finding the task before the rest is parsed, and joining its keys with those of the
command. Does not own either (`trainer.tasks.finetuning`, `trainer.tasks.evaluation`,
each task).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path

import yaml


def given_task(argv: Sequence[str]) -> str | None:
    """What `argv` gives for --task, by a flag or in its --config; None if neither
    does.
    """
    found: str | None = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--task":
            return value
        if name == "--config" and Path(value).is_file():
            keys = yaml.safe_load(Path(value).read_text())
            found = keys.get("task") if isinstance(keys, dict) else None
    return found


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
