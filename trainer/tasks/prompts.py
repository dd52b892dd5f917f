"""Class names, alone and in sentences.

Owns names, their numbers, and templates. Does not own the way of texts to token ids
(`trainer.tasks.texts`) or scores (`trainer.tasks.zero_shot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def sentences(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, class by class.

    Raises:
        ValueError: no template, or one without its place for the name.
    """
    if not templates:
        raise ValueError("no template: give --templates '[\"a photo of a {}\"]'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"template {template!r} needs {{}} once, where the class name stands"
            )
    return [template.replace("{}", name) for name in names for template in templates]


def read_names(path: Path) -> list[str]:
    """Names in a text file, one a line.

    Raises:
        ValueError: no such file, or a name that stands there twice.
    """
    if not path.is_file():
        raise ValueError(
            f"--classes {path} is no file: write the names there, one a line"
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has {twice[0]!r} twice: every class needs one line")
    if not names:
        raise ValueError(f"{path} has no class name: write one a line")
    return names


def numbered(values: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Number (N,) int64 of each value among `names`; -1 where it is none."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(value, -1) for value in values], dtype=np.int64)
