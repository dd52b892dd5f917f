"""Switches on a command line: `--deep` alone means `--deep=true`.

Owns this one convenience, which the parser behind `pipeline.config` lacks.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

_VALUES = ("true", "false", "yes", "no")


def bare_switches(config_class: type, argv: Sequence[str]) -> list[str]:
    """`argv` with `=true` behind every flag of a yes-or-no key that has no value."""
    types = typing.get_type_hints(config_class)
    switches = {
        f"--{field.name}"
        for field in dataclasses.fields(config_class)
        if types[field.name] is bool
    }
    following = [*argv[1:], ""]
    return [
        f"{word}=true" if word in switches and after.lower() not in _VALUES else word
        for word, after in zip(argv, following, strict=True)
    ]
