"""Rows to inputs: which rows are one image with several captions, and who is who.

Owns the one rule by which rows are grouped, in two shapes that must agree: vectorised
over the batches of a scan (for the plan), and over the rows of a range (for a task).
Owns also what identifies an input, its split, and whether `--sample` takes it. Does not
own cutting into ranges (`pipeline.plan`) or what becomes of an input
(`pipeline.ranges`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.captions import BadText
from pipeline.manifest import TOKENIZER, sample_uid

TRAIN, VAL = "train", "val"
# Rows of one input: it is held in memory, and so are all of its captions.
MAX_ROWS = 65_536
# Folders beside the splits in every dataset.
_FOLDERS = (TOKENIZER, "rejected")
_LONGEST_NAME = 64
_VAL_NAMES = ("dev", "valid", "validation")
# Days that Python counts as dates: the years 1 to 9999.
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896


@dataclass(frozen=True, kw_only=True)
class Input:
    """One image with its captions, as it stands in the corpus."""

    row: int
    """Number of its first row in its source."""
    rows: list[Mapping[str, Any]]
    """Its rows, at most `MAX_ROWS` of them, all with the first one's image."""
    n_rows: int
    """How many there are."""
    images_differ: bool
    """Had a later row another image than the first?"""
    locator: str
    """What identifies it in its source: its id, its path, or its row."""
    uid: int
    split: str
    has_split: bool
    """False where the split column is empty: it fails, and lies with `train`."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The rule for one source: columns that identify, split and group its rows."""

    source_name: str
    key: str | None
    """Column of the identity; None where every row is an input of its own."""
    split: str | None
    """Column that names the split."""
    group: str | None
    """Column by whose hash the split is chosen; None for the uid's."""
    val: float
    """Share that is held out where no column names the split."""
    sample: float | None
    """Share of inputs that is taken, by the hash of the uid."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the plan must read."""
        names = (self.key, self.split)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Columns that a task must read to tell inputs and their splits apart."""
        names = (*self.columns, self.group)
        return tuple(dict.fromkeys(name for name in names if name))

    def starts(self, batch: pa.RecordBatch, last: pa.RecordBatch | None) -> np.ndarray:
        """Whether an input starts at each row (rows,) of a batch; `last` is the row
        before it, as a batch of one.
        """
        starts = np.zeros(batch.num_rows, bool)
        if self.key is None:
            return ~starts
        keys = self._column(batch, last, self.key)
        alone = _alone(keys)
        offset = len(keys) - batch.num_rows
        change = np.ones(len(keys), bool)
        change[1:] = _differs(keys) | alone[1:] | alone[:-1]
        if self.split:
            change[1:] |= _differs(self._column(batch, last, self.split))
        return change[offset:]

    def split_names(self, batch: pa.RecordBatch) -> set[str]:
        """Splits that the split column names in a batch; ValueError as `split_name`."""
        if self.split is None:
            return set()
        values = self._column(batch, None, self.split).unique()
        texts = [text for cell in _cells(values) if (text := _text(cell))]
        return {split_name(text, self.split) for text in texts}

    def inputs(
        self,
        rows: Iterable[Mapping[str, Any]],
        first_row: int,
        image: str | None = None,
    ) -> Iterator[Input]:
        """Inputs of consecutive rows, which begin with an input's first; those that
        `--sample` leaves out are left out. `image`: the column of images, if it is
        among those of the rows.
        """
        group: _Rows | None = None
        for number, row in enumerate(rows, first_row):
            if group is not None and not self._new(group.last, row):
                group.add(row)
                continue
            if group is not None:
                yield from self._input(group)
            group = _Rows(number, row, image)
        if group is not None:
            yield from self._input(group)

    def uids(
        self, batch: pa.RecordBatch, rows: np.ndarray, first_row: int
    ) -> Iterator[int]:
        """Uids of the inputs that start at `rows` of a batch, whose first row has the
        number `first_row` in the source.
        """
        cells: list[Any] = [None] * len(rows)
        if self.key is not None:
            cells = _cells(self._column(batch, None, self.key).take(pa.array(rows)))
        for row, cell in zip(rows, cells, strict=True):
            locator = self._locator(cell, first_row + int(row))
            yield sample_uid(self.source_name, locator)

    def taken(self, uid: int) -> bool:
        """Does `--sample` take this input?"""
        return self.sample is None or _share("sample", f"{uid:016x}") < self.sample

    def split_of(self, uid: int, row: Mapping[str, Any]) -> str | None:
        """The split of an input by its first row; None where its cell is empty."""
        if self.split:
            text = _text(row[self.split])
            return split_name(text, self.split) if text else None
        if not self.val:
            return TRAIN
        text = _text(row[self.group]) if self.group else ""
        # A corpus may stand in the order of its ids' hashes; the split must not follow.
        held_out = _share("split", text or f"{uid:016x}") < self.val
        return VAL if held_out else TRAIN

    def _input(self, group: _Rows) -> Iterator[Input]:
        first = group.rows[0]
        locator = self._locator(first[self.key] if self.key else None, group.number)
        uid = sample_uid(self.source_name, locator)
        if not self.taken(uid):
            return
        split = self.split_of(uid, first)
        yield Input(
            row=group.number,
            rows=group.rows,
            n_rows=group.n_rows,
            images_differ=group.images_differ,
            locator=locator,
            uid=uid,
            split=split or TRAIN,
            has_split=split is not None,
        )

    def _locator(self, cell: Any, row: int) -> str:
        if self.key is None:
            return str(row)
        return _text(cell) or f"row:{row}"

    def _new(self, before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        if self.key is None:
            return True
        key, last = row[self.key], before[self.key]
        if not _text(key) or not _text(last) or key != last:
            return True
        if self.split is None:
            return False
        return _value(row[self.split]) != _value(before[self.split])

    def _column(
        self, batch: pa.RecordBatch, last: pa.RecordBatch | None, name: str
    ) -> pa.Array:
        """A column as it compares, with the value before it in front where there is
        one.
        """
        column = batch.column(batch.schema.get_field_index(name))
        if last is not None:
            before = last.column(last.schema.get_field_index(name)).cast(column.type)
            column = pa.concat_arrays([before, column])
        return _comparable(column)


class _Rows:
    """The rows of an input as they come, of bounded size: of their images one stays."""

    def __init__(self, number: int, first: Mapping[str, Any], image: str | None):
        self.number, self.rows, self.last = number, [first], first
        self.n_rows, self.images_differ = 1, False
        self._image = image

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self.n_rows += 1
        if self.n_rows <= MAX_ROWS:
            row = self._with_first_image(row)
            self.rows.append(row)
        self.last = row

    def _with_first_image(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._image is None or isinstance(row[self._image], BadText):
            return row
        first = self.rows[0][self._image]
        self.images_differ |= bool(row[self._image] != first)
        return {**row, self._image: first}


def is_comparable(kind: pa.DataType) -> bool:
    """Whether cells of this type may identify, group or name a split: those that Arrow
    and Python tell apart alike and write as the same text on every machine. Times are
    not: what Python makes of them depends on packages and time zones.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in _COMPARABLE)


_COMPARABLE = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    *(pa.types.is_fixed_size_binary, pa.types.is_integer, pa.types.is_floating),
    *(pa.types.is_boolean, pa.types.is_decimal128, pa.types.is_decimal256),
    *(pa.types.is_date32, pa.types.is_null),
)


def split_name(value: str, column: str) -> str:
    """The name of a split as a dataset has it: lower case, and `val` for its kin.

    Raises:
        ValueError: it cannot be the name of a folder of shards.
    """
    name = re.sub(r"[\s\-]+", "_", value.strip().lower())
    if not re.fullmatch(r"[a-z0-9_]+", name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"--split.column {column}: {value[:_LONGEST_NAME]!r} is no name for a "
            "split; use letters, digits and '_', such as train, val, test"
        )
    if name in _FOLDERS:
        raise ValueError(
            f"--split.column {column}: {value!r} cannot be a split, because a dataset "
            f"has a folder {name!r} of its own; rename it in the corpus"
        )
    return VAL if name in _VAL_NAMES else name


def split_order(names: Iterable[str]) -> tuple[str, ...]:
    """Splits with those that are held out before train: where one image lies in two,
    the earlier keeps it.
    """
    return tuple(sorted(set(names), key=lambda name: (name == TRAIN, name)))


def _share(use: str, text: str) -> float:
    digest = hashlib.sha256(f"{use}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _value(cell: Any) -> Any:
    """A cell of a row as it compares: text that is not UTF-8, dates beyond Python's and
    what is not a number are like none. `_comparable` is the same for a column.
    """
    unknown = isinstance(cell, BadText) or (isinstance(cell, float) and isnan(cell))
    return None if unknown else cell


def _comparable(column: pa.Array) -> pa.Array:
    """A column as its cells compare: as `_value`, but for text."""
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    if pa.types.is_float16(column.type):
        # Exact; and Arrow compares no halves.
        column = column.cast(pa.float32())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if pa.types.is_date32(column.type):
        days = column.cast(pa.int32())
        inside = pc.and_(
            pc.greater_equal(days, _FIRST_DAY), pc.less_equal(days, _LAST_DAY)
        )
        return pc.if_else(inside, column, pa.scalar(None, column.type))
    return column


def _text(cell: Any) -> str:
    """A cell that identifies, as text; empty where it identifies nothing."""
    cell = _value(cell)
    if cell is None:
        return ""
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            return cell.hex()
    return cell if isinstance(cell, str) else str(cell)


def _cells(values: pa.Array) -> list[Any]:
    """Cells of an array, with None for text that is not UTF-8."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in values]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _differs(values: pa.Array) -> np.ndarray:
    """Whether each value but the first differs from the one before it (rows - 1,)."""
    if len(values) < 2:
        return np.zeros(0, bool)
    nulls = pc.is_null(values).to_numpy(zero_copy_only=False)
    unequal = pc.fill_null(pc.not_equal(values[1:], values[:-1]), False)
    return unequal.to_numpy(zero_copy_only=False) | (nulls[1:] != nulls[:-1])


def _alone(keys: pa.Array) -> np.ndarray:
    """Whether each key (rows,) identifies nothing, so that its row is an input."""
    alone = pc.is_null(keys).to_numpy(zero_copy_only=False)
    if not (pa.types.is_large_string(keys.type) or pa.types.is_string(keys.type)):
        if pa.types.is_large_binary(keys.type) or pa.types.is_binary(keys.type):
            alone = alone | _equal(pc.binary_length(keys), 0)
        return alone
    alone = alone | _equal(pc.binary_length(keys), 0)
    try:
        keys.validate(full=True)
    except pa.ArrowInvalid:
        broken = [value.is_valid and _cell(value) is None for value in keys]
        alone = alone | np.array(broken, bool)
    return alone


def _equal(values: pa.Array, to: int) -> np.ndarray:
    return pc.fill_null(pc.equal(values, to), False).to_numpy(zero_copy_only=False)
