"""From rows to inputs, splits and ranges: everything fixed before the first image.

Owns grouping rows into inputs, their locators and keys, splits, duplicates by
identity, cutting into ranges, and the captions a tokenizer is trained on. Does not own
reading (`pipeline.sources`) or processing (`pipeline.ranges`). The plan depends on the
corpus and the config alone, so any driver makes the same one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.captions import BadText, clean_captions
from pipeline.columns import Columns, holds_paths
from pipeline.manifest import TOKENIZER, sample_uid
from pipeline.options import PreprocessConfig
from pipeline.sources import RowRange, Source, decoded_cells

TRAIN, VAL = "train", "val"
# Folders beside the splits in every dataset.
_FOLDERS = (TOKENIZER, "rejected")
_VAL_NAMES = ("dev", "valid", "validation")
# Ranges have six digits in a sample's key.
_MAX_RANGES = 1_000_000
# Enough to fix a vocabulary; more only costs the driver time.
_TOKENIZER_ROWS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class RangeInputs:
    """The inputs of one range, as sent to the task that processes them."""

    number: int
    rows: RowRange
    row_counts: np.ndarray
    """Rows of each input (inputs,)."""
    locators: list[str]
    splits: list[str]
    duplicate: np.ndarray
    """Inputs (inputs,) that are counted as duplicates and not processed."""
    copied: np.ndarray
    """Inputs (inputs,) whose image a held-out split has: they make no sample, and count
    as duplicates unless they would have failed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every input of the corpus, in order. N inputs, S splits."""

    source: Source
    source_name: str
    columns: Columns
    range_inputs: int
    first_rows: np.ndarray
    """First row of each input, and the end of the last (N + 1,)."""
    locators: pa.Array | None
    """Locator of each input (N,); None where it is the row number."""
    split_names: tuple[str, ...]
    """Held-out splits first: where one image lies in two, the earlier keeps it."""
    splits: np.ndarray
    """Place of each input's split in `split_names` (N,)."""
    duplicate: np.ndarray
    """Inputs (N,) whose locator another input has."""
    copied: np.ndarray
    """Inputs (N,) whose image a held-out split has, once the splits are compared."""

    @property
    def n_inputs(self) -> int:
        """Inputs of the corpus."""
        return len(self.splits)

    @property
    def n_rows(self) -> int:
        """Rows of the corpus that the inputs cover."""
        return int(self.first_rows[-1])

    @property
    def n_ranges(self) -> int:
        """Ranges, the last of which may be shorter."""
        return -(-self.n_inputs // self.range_inputs)

    def range(self, number: int) -> RangeInputs:
        """Inputs of range `number`."""
        start = number * self.range_inputs
        stop = min(start + self.range_inputs, self.n_inputs)
        rows = self.first_rows[start : stop + 1]
        names = [self.split_names[place] for place in self.splits[start:stop]]
        return RangeInputs(
            number=number,
            rows=self.source.part(int(rows[0]), int(rows[-1])),
            row_counts=np.diff(rows),
            locators=_locators(self.locators, self.first_rows, start, stop),
            splits=names,
            duplicate=self.duplicate[start:stop],
            copied=self.copied[start:stop],
        )

    def without(self, copied: np.ndarray) -> Plan:
        """The plan that keeps no sample of inputs (N,) whose image is held out."""
        return dataclasses.replace(self, copied=copied)

    def tokenizer_captions(self) -> Iterator[str]:
        """Captions of inputs that are not held out: of every one, or of an evenly
        spaced two million rows.
        """
        train = np.zeros(len(self.split_names), bool)
        train[[name == TRAIN for name in self.split_names]] = True
        used = train[self.splits] & ~self.duplicate
        row_used = np.repeat(used, np.diff(self.first_rows))
        chosen = np.flatnonzero(row_used)
        stride = -(-len(chosen) // _TOKENIZER_ROWS)
        for name in self.columns.captions:
            column = self.source.column(name)
            for start in range(0, len(chosen), 65_536 * max(stride, 1)):
                taken = chosen[start : start + 65_536 * max(stride, 1) : max(stride, 1)]
                cells = decoded_cells(column.take(taken))
                good = [cell for cell in cells if not isinstance(cell, BadText)]
                yield from clean_captions(good)


def make_plan(config: PreprocessConfig, source: Source, columns: Columns) -> Plan:
    """Group rows into inputs and give each its split.

    Raises:
        ValueError: empty or unusable split names, or image cells that are URLs.
    """
    keys = _row_keys(source, columns)
    row_splits = _row_splits(source, columns)
    first_rows = _boundaries(source.n_rows, keys, row_splits)
    if config.limit is not None:
        first_rows = first_rows[: config.limit + 1]
    _refuse_many_ranges(config, len(first_rows) - 1)
    starts = first_rows[:-1]
    locators = keys.take(starts) if keys is not None else None
    if row_splits is not None:
        names = row_splits.take(starts).to_pylist()
    else:
        names = _hashed_splits(config, source, columns, locators, first_rows)
    # Held out before train, so that `train` gives way.
    split_names = tuple(sorted(set(names), key=lambda name: (name == TRAIN, name)))
    place = {name: number for number, name in enumerate(split_names)}
    splits = np.array([place[name] for name in names], dtype=np.int64)
    return Plan(
        source=source,
        source_name=config.source_name,
        columns=columns,
        range_inputs=config.shard.samples,
        first_rows=first_rows,
        locators=locators,
        split_names=split_names,
        splits=splits,
        duplicate=_repeats(locators, splits),
        copied=np.zeros(len(splits), bool),
    )


def _refuse_many_ranges(config: PreprocessConfig, n_inputs: int) -> None:
    if n_inputs > _MAX_RANGES * config.shard.samples:
        raise ValueError(
            f"--shard.samples {config.shard.samples} cuts {n_inputs} inputs into more "
            f"than {_MAX_RANGES} ranges, which is all that keys can number; give at "
            f"least {-(-n_inputs // _MAX_RANGES)}"
        )


def across_splits(digests: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Inputs (N,) whose image another split has and keeps.

    `digests` (N,) are 16-byte strings, empty where an input claims no image because it
    makes no sample; `splits` (N,) places in `Plan.split_names`, of which the lowest
    keeps an image.
    """
    _, image = np.unique(digests, return_inverse=True)
    keeper = np.full(image.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(keeper, image, splits)
    return (splits > keeper[image]) & (digests != b"")


def _row_keys(source: Source, columns: Columns) -> pa.Array | None:
    """What identifies each row's input, or None where each row is its own."""
    name = columns.id or (
        columns.image if holds_paths(source.schema, columns) else None
    )
    if name is None:
        return None
    flag = "columns.id" if columns.id else "columns.image"
    keys = _text_column(source, flag, name)
    if name == columns.image:
        _refuse_urls(keys)
    empty = pc.fill_null(pc.equal(keys, ""), True)
    # Rows without a key are inputs of their own, or they would all be one.
    rows = [f"row:{row}" for row in np.flatnonzero(empty)]
    return pc.replace_with_mask(keys, empty, pa.array(rows, pa.large_string()))


def _text_column(source: Source, flag: str, name: str) -> pa.Array:
    """A column as text, every cell of which is UTF-8."""
    column = source.column(name)
    binary = pa.types.is_large_binary(column.type)
    try:
        if not binary:
            column = column.cast(pa.large_string())
        text = column.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid as error:
        for row, cell in enumerate(column.cast(pa.large_binary())):
            if not _is_utf8(cell.as_py()):
                raise ValueError(
                    f"--{flag} {name}: row {row} is not UTF-8 text; write the column "
                    "as UTF-8, or binary identities as hexadecimal text"
                ) from error
        raise
    return text


def _is_utf8(data: bytes | None) -> bool:
    try:
        (data or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse_urls(keys: pa.Array) -> None:
    urls = pc.fill_null(pc.match_substring_regex(keys, "^https?://"), False)
    if pc.any(urls).as_py():
        raise ValueError(
            "the image column holds URLs; download them first (img2dataset writes "
            "Parquet and files), then give that table as --input"
        )


def _row_splits(source: Source, columns: Columns) -> pa.Array | None:
    if columns.split is None:
        return None
    cells = _text_column(source, "split.column", columns.split)
    empty = pc.fill_null(pc.equal(cells, ""), True)
    if pc.any(empty).as_py():
        raise ValueError(
            f"--split.column {columns.split}: row {pc.index(empty, True).as_py()} is "
            "empty; every row needs a split, or use --split.val instead"
        )
    values = cells.dictionary_encode()
    names = [_split_name(name, columns.split) for name in values.dictionary.to_pylist()]
    return pa.array(names, pa.large_string()).take(values.indices)


def _split_name(value: str, column: str) -> str:
    name = re.sub(r"[\s\-]+", "_", value.strip().lower())
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(
            f"--split.column {column}: {value!r} is no name for a split; use letters, "
            "digits and '_', such as train, val, test"
        )
    if name in _FOLDERS:
        raise ValueError(
            f"--split.column {column}: {value!r} cannot be a split, because a dataset "
            f"has a folder {name!r} of its own; rename it in the corpus"
        )
    return VAL if name in _VAL_NAMES else name


def _boundaries(
    n_rows: int, keys: pa.Array | None, splits: pa.Array | None
) -> np.ndarray:
    """Row at which each input starts, and the end. Adjacent rows with one key are one
    input; a change of split ends it.
    """
    if keys is None:
        return np.arange(n_rows + 1)
    change = np.zeros(n_rows, bool)
    change[0] = True
    for values in (keys, splits):
        if values is not None and n_rows > 1:
            differs = pc.not_equal(values[1:], values[:-1])
            change[1:] |= differs.to_numpy(zero_copy_only=False)
    return np.append(np.flatnonzero(change), n_rows)


def _hashed_splits(
    config: PreprocessConfig,
    source: Source,
    columns: Columns,
    locators: pa.Array | None,
    first_rows: np.ndarray,
) -> list[str]:
    """`val` for the share of groups whose hash is small, whatever other rows are."""
    n_inputs = len(first_rows) - 1
    if not config.split.val:
        return [TRAIN] * n_inputs
    alone = _locators(locators, first_rows, 0, n_inputs)
    groups: Sequence[str | None] = [None] * n_inputs
    if columns.group:
        column = _text_column(source, "split.group", columns.group)
        groups = column.take(first_rows[:-1]).to_pylist()
    names = []
    for group, locator in zip(groups, alone, strict=True):
        text = group or f"{sample_uid(config.source_name, locator):016x}"
        # A corpus may stand in the order of its ids' hashes; the split must not follow.
        digest = hashlib.sha256(f"split\0{text}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        names.append(VAL if share < config.split.val else TRAIN)
    return names


def _locators(
    locators: pa.Array | None, first_rows: np.ndarray, start: int, stop: int
) -> list[str]:
    if locators is None:
        return [str(row) for row in first_rows[start:stop]]
    return locators[start:stop].to_pylist()


def _repeats(locators: pa.Array | None, splits: np.ndarray) -> np.ndarray:
    """Inputs (N,) whose locator came before or is held out elsewhere."""
    repeats = np.zeros(len(splits), bool)
    if locators is None:
        return repeats
    codes = locators.dictionary_encode().indices.to_numpy()
    order = np.lexsort((np.arange(len(codes)), splits, codes))
    repeats[order[1:]] = codes[order[1:]] == codes[order[:-1]]
    return repeats
