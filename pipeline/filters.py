"""Which inputs are left out, and captions made of columns.

Owns the checks of sizes, token counts and uids, the user's own function and what it is
given, and caption templates. Does not own conditions over columns (`pipeline.where`),
rules about captions (`pipeline.captions`), comparisons between inputs
(`pipeline.compare`) or the counts (`pipeline.manifest.Accounting`).
"""

from __future__ import annotations

import importlib
import math
import re
import string
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.captions import BadText
from pipeline.options import FilterOptions
from pipeline.reasons import is_taken

if TYPE_CHECKING:
    from PIL import Image

_REASON = re.compile(r"[a-z0-9_]{1,64}")
# The function's module is part of what makes a dataset.
FUNCTION_CURE = (
    "mend it and choose a new --output: what was made with the old function does not "
    "mix with the new"
)
# About 60,000 uids.
_UID_BLOCK = 1 << 20


class Filtered(Exception):
    """An input that is left out. `reason` is the code it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        # Both are arguments, because unpickling calls the class with them.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def check_source_size(width: int, height: int, options: FilterOptions) -> None:
    """Check a source image's sides in pixels, as it is shown (orientation applied).

    Raises:
        Filtered: too_small, or aspect.
    """
    size = f"{width}x{height}"
    if min(width, height) < options.min_size:
        raise Filtered("too_small", f"{size}, filter.min_size is {options.min_size}")
    limit = options.max_aspect
    if limit and max(width, height) > limit * min(width, height):
        raise Filtered("aspect", f"{size}, filter.max_aspect is {limit:g}")


def check_tokens(counts: Sequence[int], options: FilterOptions) -> None:
    """Check the numbers of tokens of an input's captions, separators not counted.

    Raises:
        Filtered: short_caption where the longest has too few, long_caption where the
            shortest has too many.
    """
    if max(counts) < options.min_tokens:
        detail = f"{max(counts)} tokens, filter.min_tokens is {options.min_tokens}"
        raise Filtered("short_caption", detail)
    if options.max_tokens and min(counts) > options.max_tokens:
        detail = f"{min(counts)} tokens, filter.max_tokens is {options.max_tokens}"
        raise Filtered("long_caption", detail)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What `--filter.function` is called with."""

    image: Image.Image
    """The image as it would be written, RGB."""
    captions: list[str]
    """Cleaned captions, at least one."""
    width: int
    """Of the source, in pixels."""
    height: int
    """Of the source, in pixels."""
    columns: Mapping[str, Any]
    """The columns that `--columns.keep` names, as they stand in the first row."""


def load_function(name: str) -> Callable[[Candidate], None]:
    """The user's `module:function`, wrapped: it raises Filtered with the reason that
    the function returns, and nothing where that is None or empty.

    What else the function may do stops the run, because it would do it for a thousand
    inputs more: RuntimeError where it raises, ValueError where it returns anything but
    a reason. Running out of memory is the input's fault, and passed on.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, _, attribute = name.partition(":")
    flag = f"--filter.function {name}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{flag}: module {module_name!r} cannot be imported ({error}); run the "
            "command in the folder that has it, or submit the job with --working-dir"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{flag}: importing module {module_name!r} raised {error!r}; mend it"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        from pipeline.config import nearest

        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"{flag}: module {module_name!r} has no function {attribute!r}."
            f"{nearest(attribute, names)}"
        )
    return _Function(name=name, function=function)


@dataclass(frozen=True, kw_only=True)
class _Function:
    name: str
    function: Callable[[Candidate], object]

    def __call__(self, candidate: Candidate) -> None:
        try:
            reason = self.function(candidate)
        except MemoryError:
            raise
        except BaseException as error:  # sys.exit() too, which would end the decoder
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RuntimeError(
                f"--filter.function {self.name} raised {error!r} in line "
                f"{place.lineno} of {place.name}, on an image of {candidate.width}x"
                f"{candidate.height} with caption {candidate.captions[0]!r}; "
                + FUNCTION_CURE
            ) from error
        if reason is None or reason == "":
            return
        if not isinstance(reason, str) or not _REASON.fullmatch(reason):
            raise ValueError(
                f"--filter.function {self.name} returned {reason!r}; return None to "
                "keep an input, or a reason of small letters, digits and '_' to drop it"
            )
        if is_taken(reason):
            raise ValueError(
                f"--filter.function {self.name} returned {reason!r}, under which other "
                "inputs are counted; return a reason of your own, such as "
                f"'my_{reason}'"
            )
        raise Filtered(reason, f"by {self.name}")


@dataclass(frozen=True, kw_only=True)
class UidLists:
    """Inputs that are wanted, and that are not: sorted uint64 arrays; None for all."""

    allow: np.ndarray | None = None
    deny: np.ndarray | None = None

    def reason(self, uid: int) -> str | None:
        """Why the input is left out: denied, not_allowed, or None where it is not."""
        if self.deny is not None and _holds(self.deny, uid):
            return "denied"
        if self.allow is not None and not _holds(self.allow, uid):
            return "not_allowed"
        return None


def load_uids(url: str) -> np.ndarray:
    """Uids of a text file, 16 hex digits a line, sorted and each once (uids,) uint64.

    Takes 16 bytes of memory per uid. Empty lines are skipped.

    Raises:
        ValueError: another line is no uid; its number is named.
        OSError: the file cannot be read.
    """
    from pipeline.storage import open_file

    with open_file(url) as file:
        blocks = list(_uid_blocks(file, url))
    uids = np.unique(np.concatenate([np.empty(0, np.uint64), *blocks]))
    uids.flags.writeable = False
    return uids


def _uid_blocks(file: BinaryIO, url: str) -> Iterator[np.ndarray]:
    first = 1
    while lines := file.readlines(_UID_BLOCK):
        words = [line.strip() for line in lines]
        for number, word in enumerate(words, first):
            if word and not re.fullmatch(rb"[0-9a-fA-F]{16}", word):
                raise ValueError(
                    f"line {number} of {url} is no uid: {word[:40]!r}; every line is "
                    f"16 hex digits, as in the column uid of a dataset's "
                    "parquet files"
                )
        digits = bytes.fromhex(b"".join(words).decode("ascii"))
        yield np.frombuffer(digits, ">u8").astype(np.uint64)
        first += len(lines)


def _holds(uids: np.ndarray, uid: int) -> bool:
    # A plain int beyond 63 bits would turn the comparison into one of floats.
    wanted = np.uint64(uid)
    place = int(np.searchsorted(uids, wanted))
    return place < len(uids) and bool(uids[place] == wanted)


class Template:
    """A caption made of columns: `{title}, {colour}`; braces are written twice."""

    def __init__(self, text: str, names: Sequence[str]) -> None:
        """Parse `text` over columns `names`.

        Raises:
            ValueError: braces do not match, a column is not there, or none is used.
        """
        flag = f"--columns.template {text!r}"
        try:
            fields = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"{flag}: {error}; write a column as {{title}}, a brace as {{{{"
            ) from error
        for _, name, layout, conversion in fields:
            if layout or conversion:
                raise ValueError(
                    f"{flag}: a column stands alone in its braces, without '!' or ':'; "
                    f"write {{{name}}}"
                )
            if name is not None and name not in names:
                # Here alone: the parser behind it costs every decoder its start.
                from pipeline.config import nearest

                raise ValueError(
                    f"{flag}: no column {name!r}.{nearest(name, names)} "
                    f"The columns are: {', '.join(names)}"
                )
        # Text, and the column that follows it.
        self._parts = [(before, name) for before, name, _, _ in fields]
        if not self.columns:
            raise ValueError(f"{flag} names no column: write them as {{title}}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are used, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, row: Mapping[str, Any]) -> str | None:
        """The caption of a row, or None where one of its columns is empty."""
        texts = {name: _field(row[name]) for name in self.columns}
        if not all(texts.values()):
            return None
        return "".join(
            before + (texts[name] if name is not None else "")
            for before, name in self._parts
        )


def _field(value: Any) -> str:
    """A cell as text; the texts of a list stand side by side."""
    nothing = isinstance(value, float) and math.isnan(value)
    if value is None or nothing or isinstance(value, BadText):
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_field, value)))
    return str(value).strip()
