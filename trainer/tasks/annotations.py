"""Files of published data sets: JSON and JSON lines, read with care.

Owns errors that name the file, the line and what to do about it. Does not own what the
fields mean (each task) or the images that they name (`trainer.tasks.pictures`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CURE = "mend it, or fetch the published file again"


@dataclass(frozen=True)
class Row:
    """An object of a file, and where it stands."""

    where: str
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The text, or number as text, of the first of `names` that there is.

        Raises:
            ValueError: there is none, or it is neither.
        """
        value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.wrong(f"{names[0]!r} is {value!r}, which is no text")
        return str(value)

    def words(self, name: str) -> str:
        """The text called `name`, in which something is said.

        Raises:
            ValueError: there is none, or it is no text, or nothing but blanks.
        """
        value = self._first((name,))
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{name!r} is {value!r}, which says nothing")
        return value

    def number(self, *names: str) -> int:
        """The whole number of the first of `names` that there is.

        Raises:
            ValueError: there is none, or it is no whole number.
        """
        value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f"{names[0]!r} is {value!r}, which is no whole number")
        return value

    def name(self, *names: str) -> str:
        """The same where it is to be part of a file's name.

        Raises:
            ValueError: as `text`; or it leads to another folder.
        """
        value = self.text(*names)
        if value in {"", ".", ".."} or set(value) & set("/\\\0"):
            raise self.wrong(f"{names[0]!r} is {value!r}, which is no name of a file")
        return value

    def rows(self, name: str) -> list[Row]:
        """The list of objects called `name`.

        Raises:
            ValueError: there is none, or it holds something else.
        """
        return as_rows(self._first((name,)), f"{self.where}: {name}")

    def has(self, *names: str) -> bool:
        """Is one of `names` there, with a value?"""
        return any(self.values.get(name) is not None for name in names)

    def wrong(self, what: str) -> ValueError:
        """An error that says where."""
        return ValueError(f"{self.where}: {what}; {_CURE}")

    def _first(self, names: tuple[str, ...]) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        known = ", ".join(self.values) or "nothing"
        raise self.wrong(f"no {' or '.join(map(repr, names))}, it has {known}")


def read_object(path: Path) -> Row:
    """A JSON file that holds one object.

    Raises:
        ValueError: no such file, no JSON, no object.
    """
    text = _text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {_CURE}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; {_CURE}")
    return Row(str(path), value)


def read_lines(path: Path) -> list[Row]:
    """A file of JSON lines, an object each; blank lines are none.

    Raises:
        ValueError: no such file, a line that is no JSON object, no line at all.
    """
    rows = []
    # Not `splitlines`: it also cuts at line separators inside of a sentence.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}); {_CURE}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where} holds no JSON object; {_CURE}")
        rows.append(Row(where, value))
    if not rows:
        raise ValueError(f"{path} has no line; {_CURE}")
    return rows


def as_rows(values: Any, where: str) -> list[Row]:
    """A list of objects, numbered from 0 in what errors say.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, list):
        raise ValueError(f"{where} is no list; {_CURE}")
    rows = []
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{where}[{number}] is no object; {_CURE}")
        rows.append(Row(f"{where}[{number}]", value))
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); {_CURE}") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give the path of the published "
            "file"
        ) from error
