"""Keys of `python -m pipeline.preprocess`, and the transform that they decide.

Owns every key's name, default, help text and the checks that need no file. Does not
own how keys are parsed (`pipeline.config`) or obeyed (the module named in each class).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Pillow's own warning threshold for decompression bombs.
_BOMB_PIXELS = 89_478_485
# JPEG stores sides in 16 bits; the encoder stops a little earlier.
_MAX_SIDE = 16_384
# Positions inside a range have six digits in a sample's key.
_MAX_SHARD_SAMPLES = 1_000_000
_SMALLEST_VOCABULARY = 64


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which columns of the corpus hold what."""

    image: str | None = None
    """Column with the image: encoded bytes, or a path relative to the table's folder.
    Default: the first of image, image_path, filepath, path, file, ... that exists."""
    caption: list[str] | str | None = None
    """Column or columns ([title,alt]) with captions: a string or a list of strings per
    row. Default: the first of caption, captions, text, title, ... that exists."""
    id: str | None = None
    """Column that identifies an input. Adjacent rows with one id are one image with
    several captions. Default: the image's path, or the row number for bytes."""
    keep: list[str] | str = ()  # type: ignore[assignment]
    """Columns to pass through, as strings, into each sample's json and the parquet."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the caption columns that were given."""
        return _names(self.caption)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the passthrough columns."""
        return _names(self.keep)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are decoded and written (`pipeline.images`)."""

    size: int = 256
    """Shorter side of the written JPEG in pixels; smaller images are enlarged."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    max_pixels: int = _BOMB_PIXELS
    """Images whose header claims more pixels than this fail without being decoded."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How inputs are cut into shards (`pipeline.plan`)."""

    samples: int = 10_000
    """Inputs per range; each range makes at most one shard per split."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which inputs are held out (`pipeline.plan`)."""

    column: str | None = None
    """Column that names the split of each row: train, val (also dev, valid,
    validation), test. Default: hash the group against `split.val`."""
    val: float = 0.05
    """Share of inputs held out as `val` when there is no split column; 0 for none.
    With several splits every image is read twice, first to compare the splits."""
    group: str | None = None
    """Column whose equal values never lie in two splits. Default: each input alone."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the corpus is called in the dataset."""

    name: str | None = None
    """Name of the source: part of every sample's identity and of the mixture.
    Default: the input's file name without its suffix."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read, and how to write it."""

    input: str
    """The corpus: a Parquet, TSV or CSV file, or a folder of Parquet files."""
    output: str
    """Directory of the dataset: new, empty, or an unfinished run of this command."""
    tokenizer: str = "train:8000"
    """Directory or hub name of a Hugging Face fast tokenizer, or train:N for a
    lower-case WordPiece of N entries trained on the captions that are not held out."""
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    """Which columns hold what."""
    image: ImageOptions = field(default_factory=ImageOptions)
    """How images are written."""
    shard: ShardOptions = field(default_factory=ShardOptions)
    """How inputs are cut into shards."""
    split: SplitOptions = field(default_factory=SplitOptions)
    """Which inputs are held out."""
    source: SourceOptions = field(default_factory=SourceOptions)
    """What the corpus is called."""
    workers: int | None = None
    """CPUs of the Ray that this command starts itself (default: all of this machine).
    On a running cluster (RAY_ADDRESS, `ray job submit`): most tasks at a time."""
    limit: int | None = None
    """Only the first this many inputs: for trying things out."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the key and the cure."""
        _between("image.size", self.image.size, 16, _MAX_SIDE)
        _between("image.quality", self.image.quality, 1, 100)
        _between("image.max_pixels", self.image.max_pixels, 1, 1 << 40)
        _between("shard.samples", self.shard.samples, 1, _MAX_SHARD_SAMPLES)
        _between("split.val", self.split.val, 0, 0.99)
        if self.split.column and self.split.group:
            raise ValueError(
                "--split.column takes the split from the corpus, --split.group decides "
                "it by hash: give only one of them"
            )
        for key in ("workers", "limit"):
            if (value := getattr(self, key)) is not None:
                _between(key, value, 1, 1 << 60)
        if self.trained_vocabulary is not None:
            _between(
                "tokenizer train:N",
                self.trained_vocabulary,
                _SMALLEST_VOCABULARY,
                1 << 20,
            )
        if not re.fullmatch(r"[\w.\-]+", self.source_name, re.ASCII):
            raise ValueError(
                f"source name {self.source_name!r} must be letters, digits, '_', '-' "
                "and '.': give one with --source.name"
            )

    @property
    def trained_vocabulary(self) -> int | None:
        """N of `--tokenizer train:N`, or None where a tokenizer is loaded."""
        found = re.fullmatch(r"train:(.*)", self.tokenizer)
        if not found:
            return None
        if not found[1].isdecimal():
            raise ValueError(
                f"--tokenizer {self.tokenizer!r}: N in train:N is a number of "
                "vocabulary entries, such as train:8000"
            )
        return int(found[1])

    @property
    def source_name(self) -> str:
        """Name of the source, given or from the input."""
        return self.source.name or Path(self.input).stem


def _names(value: Sequence[str] | str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"--{key} is {value}, but must lie between {low} and {high}")
