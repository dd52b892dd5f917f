"""Class names in sentences, for zero-shot classification.

Owns templates and the classes of samples. Does not own the way of texts to token ids
(`trainer.tasks.texts`) or scores (`trainer.tasks.zero_shot`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sentences(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, class by class.

    Raises:
        ValueError: no template, or one without its place for the name.
    """
    if not templates:
        raise ValueError("no template: give --zero_shot.templates '[a photo of a {}]'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"template {template!r} needs {{}} once, where the class name stands"
            )
    return [template.replace("{}", name) for name in names for template in templates]


def numbered(values: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Number (N,) int64 of each value among `names`; -1 where it is none."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(value, -1) for value in values], dtype=np.int64)
